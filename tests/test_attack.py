"""The laws of projected gradient descent (D2)."""

import oracles
import pytest
import strategies as draw
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from absld_min import Config, attack, build_model, pgd, project_linf, soft_label_kl

EPSILON = 0.1


def network(seed=0, dtype=draw.DTYPE):
    return build_model("convnet", 3, "test", seed).to(dtype).eval().requires_grad_(False)


def soft_labels(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    return F.softmax(3 * torch.randn(n, 3, generator=random, dtype=draw.DTYPE), dim=1)


def noise_like(x, seed=0, size=0.001):
    random = torch.Generator().manual_seed(seed)
    return size * torch.randn(x.shape, generator=random, dtype=x.dtype)


def kl(labels):
    return lambda logits: len(logits) * soft_label_kl(logits, labels)


def climb(forward, objective, x_nat, noise, epsilon=EPSILON, step_size=EPSILON / 4, steps=4):
    return pgd(forward, objective, x_nat, noise, epsilon=epsilon, step_size=step_size, steps=steps)


@given(st.lists(st.tuples(st.floats(-2, 3), st.floats(-1, 2)), min_size=1), st.floats(0, 1))
def test_projection_is_the_formula(pixels, epsilon):
    """Also where x_nat lies outside of the box: the box has the last word."""
    x_adv, x_nat = torch.tensor(pixels, dtype=draw.DTYPE).unbind(1)
    expected = [oracles.project(a, n, epsilon) for a, n in pixels]
    assert project_linf(x_adv, x_nat, epsilon).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(draw.seeds, st.floats(0, 0.5), st.floats(0.001, 1), st.integers(1, 4))
def test_result_is_in_ball_and_box(dtype, seed, epsilon, step_size, steps):
    x_nat = draw.images(seed, dtype=dtype)
    labels = soft_labels(len(x_nat), seed).to(dtype)
    noise = noise_like(x_nat, seed, size=1.0)
    x_adv = climb(network(dtype=dtype), kl(labels), x_nat, noise, epsilon, step_size, steps)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert ((x_adv >= x_nat - epsilon) & (x_adv <= x_nat + epsilon)).all()
    if epsilon == 0:
        assert torch.equal(x_adv, x_nat)


@given(draw.seeds)
def test_epsilon_zero_returns_the_image(seed):
    x_nat = draw.images(seed)
    x_adv = climb(network(), kl(soft_labels(4)), x_nat, noise_like(x_nat), epsilon=0.0)
    assert torch.equal(x_adv, x_nat)


@given(draw.seeds, st.integers(1, 3))
def test_batches_do_not_matter(seed, cut):
    x_nat, labels = draw.images(seed), soft_labels(4, seed)
    noise = noise_like(x_nat, seed)
    whole = climb(network(), kl(labels), x_nat, noise)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = climb(network(), kl(labels[order]), x_nat[order], noise[order])
    assert torch.equal(moved, whole[order])
    parts = [
        climb(network(), kl(labels[index]), x_nat[index], noise[index])
        for index in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


@given(draw.seeds)
def test_kl_and_soft_cross_entropy_climb_alike(seed):
    x_nat, labels = draw.images(seed), soft_labels(4, seed)
    noise = noise_like(x_nat, seed)

    def cross_entropy(logits):
        return F.cross_entropy(logits, labels, reduction="sum")

    by_kl = climb(network(), kl(labels), x_nat, noise)
    assert torch.equal(climb(network(), cross_entropy, x_nat, noise), by_kl)


@given(draw.seeds)
def test_closed_form_of_a_linear_model(seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(3 * 8 * 8, generator=random, dtype=draw.DTYPE)
    x_nat = draw.images(seed, n=2)

    def forward(x):
        score = x.flatten(1) @ weight
        return torch.stack([score, -score], dim=1)

    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=draw.DTYPE)
    x_adv = climb(forward, kl(labels), x_nat, torch.zeros_like(x_nat), steps=6)
    # p_student - p_label: the student can only be less sure than a label of 0 or 1.
    direction = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1) * weight.sign().view(1, 3, 8, 8)
    torch.testing.assert_close(x_adv, (x_nat + EPSILON * direction).clamp(0, 1))


def test_the_start_is_not_clipped():
    """A start outside the ball is where the first gradient is taken."""
    seen = []

    def forward(x):
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :3]

    x_nat = draw.images(0)
    climb(forward, kl(soft_labels(4)), x_nat, torch.full_like(x_nat, 2.0))
    assert torch.equal(seen[0], x_nat + 2.0)


@given(draw.seeds)
def test_more_steps_do_not_lower_the_objective(seed):
    x_nat, labels, net = draw.images(seed), soft_labels(4, seed), network(seed)
    noise = noise_like(x_nat, seed)
    objective = kl(labels)
    x_adv = climb(net, objective, x_nat, noise, epsilon=0.01, step_size=0.001, steps=8)
    assert objective(net(x_adv)) >= objective(net(x_nat + noise)) - 1e-6


def state_of(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    return tensors, grads, torch.get_rng_state()


def test_training_attack_leaves_no_trace():
    model = build_model("convnet", 3, "test").double().train()
    x_nat = draw.images(0)
    before = state_of(model)
    x_adv = attack(Config(epsilon=EPSILON), model, soft_labels(4), x_nat, noise_like(x_nat))
    after = state_of(model)
    assert not x_adv.requires_grad and not torch.equal(x_adv, x_nat)
    assert before[1] == after[1] and torch.equal(before[2], after[2])
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name


def test_an_attack_that_raises_leaves_no_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()

    def objective(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        climb(model, objective, draw.images(0), torch.zeros(4, 3, 8, 8))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_training_attack_scales_its_step_with_epsilon(monkeypatch):
    used = {}
    monkeypatch.setattr("absld_min.pgd", lambda *args, **settings: used.update(settings))
    attack(Config(epsilon=8 / 255), network(), None, None, None)
    assert used == {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}
