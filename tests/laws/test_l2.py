"""The laws of projected gradient descent in the L2 norm."""

import inspect
import math

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from hypothesis import given
from hypothesis import strategies as st

import absld
from absld import attack

EPSILON = 0.5


def length(x):
    """L2 norms (N,)."""
    return x.flatten(1).norm(dim=1)


def noise_like(x, seed, size=1.0):
    random = torch.Generator().manual_seed(seed)
    return size * torch.randn(x.shape, generator=random, dtype=x.dtype)


def climb(forward, objective, x_nat, noise=None, epsilon=EPSILON, step_size=EPSILON / 4, steps=4):
    noise = torch.zeros_like(x_nat) if noise is None else noise
    settings = {"epsilon": epsilon, "step_size": step_size, "steps": steps, "norm": "l2"}
    return absld.pgd(forward, objective, x_nat, noise, **settings)


def weight(seed, dtype=draw.DTYPE):
    return noise_like(torch.zeros(3, 8, 8, dtype=dtype), seed)


# --- Projection ---


@given(draw.seeds, st.floats(0, 20), st.floats(0, 5))
def test_a_projection_is_in_ball_and_box(seed, epsilon, size):
    """In both: the box, which comes last, leads out of no ball around an image."""
    x_nat = draw.images(seed)
    x_adv = absld.project_l2(x_nat + noise_like(x_nat, seed, size), x_nat, epsilon)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    rounding = 2**-53 * math.sqrt(x_nat[0].numel())  # of the pixels, up to half of a last bit each
    assert (length(x_adv - x_nat) <= epsilon * (1 + 1e-12) + rounding).all()
    again = absld.project_l2(x_adv, x_nat, epsilon)
    torch.testing.assert_close(again, x_adv, rtol=0, atol=1e-12)


@given(draw.seeds, st.floats(0, 5))
def test_a_projection_leaves_alone_what_is_inside(seed, epsilon):
    x_nat = draw.images(seed)
    x_adv = absld.project_l2(x_nat + noise_like(x_nat, seed), x_nat, epsilon)
    wider = 1.001 * epsilon + 1e-9
    assert torch.equal(absld.project_l2(x_adv, x_nat, wider), x_adv)


@given(
    st.lists(st.tuples(draw.on_a_grid(-1, 1), draw.on_a_grid(0, 1)), min_size=1), st.floats(0, 0.4)
)
def test_a_projection_is_the_formula(pixels, epsilon):
    delta, x_nat = torch.tensor(pixels, dtype=draw.DTYPE).T.unsqueeze(1).unbind()
    expected = oracles.project_l2((x_nat + delta)[0].tolist(), x_nat[0].tolist(), epsilon)
    found = absld.project_l2(x_nat + delta, x_nat, epsilon)[0]
    assert found.tolist() == pytest.approx(expected, rel=0, abs=1e-12)


@given(draw.seeds, st.floats(0, 0.49), draw.seeds)
def test_without_the_box_no_point_of_the_ball_is_nearer(seed, epsilon, other):
    x_nat = torch.full((4, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    far = x_nat + noise_like(x_nat, seed)
    projected = absld.project_l2(far, x_nat, epsilon)
    inside = absld.project_l2(projected + noise_like(x_nat, other, 0.1), x_nat, epsilon)
    assert (length(far - projected) <= length(far - inside) + 1e-12).all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_far_points_are_projected_without_overflow(size):
    x_nat = torch.full((4, 3, 8, 8), 0.5)
    direction = noise_like(x_nat, 0)
    x_adv = absld.project_l2(x_nat + size * direction, x_nat, 0.1)
    expected = direction / length(direction).view(4, 1, 1, 1) if size > 1 else 0 * direction
    torch.testing.assert_close(x_adv, x_nat + 0.1 * expected)


# --- Steps ---


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("steps", "step_size"), [(1, 10 * EPSILON), (1, EPSILON), (6, 0.25)])
def test_closed_form_of_a_linear_model(scale, steps, step_size):
    """x + epsilon w / |w|, however large the gradients are."""
    w, x_nat = weight(0, torch.float32), torch.full((2, 3, 8, 8), 0.5)
    x_adv = climb(
        lambda x: scale * (x * w),
        torch.sum,
        x_nat,
        epsilon=EPSILON,
        step_size=step_size,
        steps=steps,
    )
    torch.testing.assert_close(x_adv, (x_nat + EPSILON * w / w.norm()))


@given(draw.seeds, st.floats(0.01, 0.2), st.integers(1, 4))
def test_a_step_has_its_size(seed, step_size, steps):
    x_nat = torch.full((3, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    w = weight(seed)
    x_adv = climb(lambda x: x * w, torch.sum, x_nat, epsilon=9.0, step_size=step_size, steps=steps)
    torch.testing.assert_close(length(x_adv - x_nat), torch.full((3,), steps * step_size).double())


def test_an_image_without_a_gradient_makes_no_step():
    """Beside images that have one."""
    x_nat, w = draw.images(0), weight(0)
    has_gradient = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=draw.DTYPE).view(4, 1, 1, 1)
    x_adv = climb(lambda x: has_gradient * x * w, torch.sum, x_nat)
    moved = length(x_adv - x_nat) > 0
    assert moved.tolist() == [True, False, True, False] and x_adv.isfinite().all()


def test_entries_that_are_not_finite_hide_no_image():
    nan, inf = math.nan, math.inf
    gradient = torch.tensor([[nan, 3.0, 4.0], [inf, 1.0, 0.0], [-inf, nan, inf], [nan, nan, nan]])
    half = 0.5**0.5
    expected = torch.tensor([[0, 0.6, 0.8], [1, 0, 0], [-half, 0, half], [0, 0, 0]])
    assert torch.allclose(attack.normalize_l2(gradient), expected)


@given(draw.seeds)
def test_an_image_is_attacked_alike_in_any_batch(seed):
    x_nat, net = draw.images(seed), absld.build_model("convnet", 3, "test", seed).double().eval()
    labels, noise = torch.arange(4) % 3, noise_like(x_nat, seed, 0.01)
    whole = climb(net, attack.cross_entropy(labels), x_nat, noise)
    for i in range(4):
        one = slice(i, i + 1)
        alone = climb(net, attack.cross_entropy(labels[one]), x_nat[one], noise[one])
        torch.testing.assert_close(alone, whole[one], rtol=0, atol=1e-12)


@given(draw.seeds)
def test_each_image_has_a_radius_of_its_own(seed):
    x_nat, w = torch.full((4, 3, 8, 8), 0.5, dtype=draw.DTYPE), weight(seed)
    radii = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=draw.DTYPE)
    x_adv = climb(lambda x: x * w, torch.sum, x_nat, epsilon=radii.view(4, 1, 1, 1), steps=6)
    torch.testing.assert_close(length(x_adv - x_nat), radii)


def test_a_training_attack_has_its_norm():
    model = absld.build_model("convnet", 3, "test").double()
    x_nat, labels = draw.images(0), torch.arange(4) % 3
    given = model, attack.cross_entropy(labels), x_nat, noise_like(x_nat, 0, 0.01)
    x_adv = absld.TrainingAttack(EPSILON, EPSILON / 4, 4, "l2")(*given)
    assert (length(x_adv - x_nat) <= EPSILON + 1e-12).all()
    assert (x_adv - x_nat).abs().max() > EPSILON / 20  # more than a pixel's share
    with absld.frozen_eval(model):
        assert torch.equal(climb(*given), x_adv)


# --- Starts ---


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 1)])
def test_starts_are_uniform_in_the_ball(shape):
    """The share of the volume within a start's distance is uniform in [0,1], and all directions
    are alike. A largest distance of distributions beyond the bound: once in a million tries."""
    n, random = 4000, torch.Generator().manual_seed(0)
    drawn = attack.uniform_noise_(torch.empty(n, *shape, dtype=draw.DTYPE), EPSILON, "l2", random)
    share = (length(drawn) / EPSILON) ** math.prod(shape)
    assert share.max() <= 1 + 1e-9
    reached = torch.arange(1, n + 1) / n
    assert (share.sort().values - reached).abs().max() <= math.sqrt(math.log(2e6) / (2 * n))
    direction = drawn.flatten(1) / length(drawn).unsqueeze(1)
    assert direction.mean(0).abs().max() < 5 / math.sqrt(n * direction.shape[1])


# --- Misuse ---


@pytest.mark.parametrize("norm", ["l1", "L2", "", None])
def test_another_norm_is_refused_by_name(norm):
    """Without the tests' type checks, which users have not."""
    with pytest.raises(ValueError, match="norm must be one of linf, l2, not "):
        inspect.unwrap(attack.geometry)(norm)


def test_images_without_pixels_and_negative_radii_are_refused():
    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"images must have pixels, not the shape \(4,\)"):
        absld.project_l2(x, x, 0.1)
    with pytest.raises(ValueError, match=r"epsilon must be 0 or more, not -0\.1"):
        absld.project_l2(draw.images(0), draw.images(0), -0.1)


@given(draw.seeds)
def test_more_steps_do_not_lower_the_objective(seed):
    x_nat, net = draw.images(seed), absld.build_model("convnet", 3, "test", seed).double().eval()
    objective = attack.cross_entropy(torch.arange(4) % 3)
    x_adv = climb(net, objective, x_nat, epsilon=0.05, step_size=0.005, steps=8)
    assert objective(net(x_adv)) >= objective(net(x_nat)) - 1e-9
