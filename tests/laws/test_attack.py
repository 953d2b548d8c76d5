"""The laws of projected gradient descent (D2)."""

import inspect
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers import strategies as draw
from helpers.implementations import both, project, training_attack
from helpers.tolerance import assert_close
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import absld
import absld_min
from absld import attack

EPSILON = 0.1


def network(impl, seed=0, dtype=draw.DTYPE):
    return impl.build_model("convnet", 3, "test", seed).to(dtype).eval().requires_grad_(False)


def soft_labels(n, seed=0):
    random = torch.Generator().manual_seed(seed)
    return F.softmax(3 * torch.randn(n, 3, generator=random, dtype=draw.DTYPE), dim=1)


def noise_like(x, seed=0, size=0.001):
    random = torch.Generator().manual_seed(seed)
    return size * torch.randn(x.shape, generator=random, dtype=x.dtype)


def kl(impl, labels):
    return lambda logits: len(logits) * impl.soft_label_kl(logits, labels)


def climb(impl, forward, objective, x_nat, noise, epsilon=EPSILON, step_size=EPSILON / 4, steps=4):
    return impl.pgd(
        forward, objective, x_nat, noise, epsilon=epsilon, step_size=step_size, steps=steps
    )


@both
@given(
    st.lists(st.tuples(draw.on_a_grid(-2, 3), draw.on_a_grid(-1, 2)), min_size=1), st.floats(0, 1)
)
def test_projection_is_the_formula(impl, pixels, epsilon):
    """Also where x_nat lies outside of the box: the box has the last word."""
    x_adv, x_nat = torch.tensor(pixels, dtype=draw.DTYPE).unbind(1)
    expected = [oracles.project(a, n, epsilon) for a, n in pixels]
    assert project(impl, x_adv, x_nat, epsilon).tolist() == expected


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=draw.seeds,
    epsilon=st.floats(0, 0.5),
    step_size=st.floats(0.001, 1),
    steps=st.integers(1, 4),
)
@example(seed=0, epsilon=0.0, step_size=0.1, steps=4)
def test_result_is_in_ball_and_box(impl, dtype, seed, epsilon, step_size, steps):
    x_nat = draw.images(seed, dtype=dtype)
    labels = soft_labels(len(x_nat), seed).to(dtype)
    noise = noise_like(x_nat, seed, size=1.0)
    x_adv = climb(
        impl, network(impl, dtype=dtype), kl(impl, labels), x_nat, noise, epsilon, step_size, steps
    )
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert ((x_adv >= x_nat - epsilon) & (x_adv <= x_nat + epsilon)).all()
    if epsilon == 0:
        assert torch.equal(x_adv, x_nat)


@given(draw.seeds, st.floats(0, 0.5))
def test_a_start_without_a_step_is_in_ball_and_box(seed, epsilon):
    x_nat = draw.images(seed)
    noise = noise_like(x_nat, seed, size=1.0)
    x_adv = climb(absld, lambda x: x, lambda z: z.sum(), x_nat, noise, epsilon, steps=0)
    assert torch.equal(x_adv, absld.project_linf(x_nat + noise, x_nat, epsilon))
    assert ((x_adv - x_nat).abs() <= epsilon + 1e-9).all() and ((x_adv >= 0) & (x_adv <= 1)).all()


NEGATIVE = torch.tensor([0.1, 0.1, -0.1, 0.1], dtype=draw.DTYPE).view(4, 1, 1, 1)


@pytest.mark.parametrize("epsilon", [-0.1, -1e-9, float("nan"), NEGATIVE], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_negative_radius_is_refused(epsilon, steps):
    x_nat, labels = draw.images(0), soft_labels(4)
    noise = torch.zeros_like(x_nat)
    with pytest.raises(ValueError, match="epsilon must be 0 or more, not"):
        climb(absld, network(absld), kl(absld, labels), x_nat, noise, epsilon, steps=steps)
    with pytest.raises(ValueError, match="epsilon must be 0 or more, not"):
        absld.project_linf(x_nat, x_nat, epsilon)
    with pytest.raises(ValueError, match="epsilon must be 0 or more, not"):
        absld.TrainingAttack(epsilon, 0.1, steps)(network(absld), attack.kl(labels), x_nat, noise)


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, *({"step_size": size} for size in (-1.0, float("nan"), float("inf")))]
)
def test_steps_that_cannot_be_taken_are_refused(wrong):
    x_nat, objective = draw.images(0), attack.kl(soft_labels(4))
    with pytest.raises(ValueError, match=r"(step_size|steps) must be 0 or more"):
        climb(absld, network(absld), objective, x_nat, torch.zeros_like(x_nat), **wrong)


def test_radius_and_step_size_of_each_image_are_its_own():
    """A batch attacked with the radii of its images is the images attacked one by one."""
    x_nat, labels = draw.images(0), soft_labels(4)
    noise, sizes = noise_like(x_nat), torch.tensor([0.01, 0.02, 0.03, 0.0], dtype=draw.DTYPE)
    sizes = sizes.view(4, 1, 1, 1)
    together = climb(absld, network(absld), attack.kl(labels), x_nat, noise, 3 * sizes, sizes)
    for i, size in enumerate(sizes.flatten().tolist()):
        one = slice(i, i + 1)
        alone = climb(
            absld, network(absld), attack.kl(labels[one]), x_nat[one], noise[one], 3 * size, size
        )
        torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="step_size must be 0 or more"):
        climb(absld, network(absld), attack.kl(labels), x_nat, noise, 3 * sizes, -sizes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("steps", [0, 2])
def test_noise_that_is_not_finite_is_refused(value, steps):
    """In one pixel of one image."""
    x_nat, objective = draw.images(0), attack.kl(soft_labels(4))
    noise = noise_like(x_nat)
    noise[3, 2, 1, 0] = value
    with pytest.raises(ValueError, match="noise must be finite"):
        climb(absld, network(absld), objective, x_nat, noise, steps=steps)


def test_radii_and_noise_of_other_shapes_are_refused():
    """(8,) would be a radius for each column of pixels, (1,3,8,8) the same noise for all images."""
    x_nat, pgd = draw.images(0), inspect.unwrap(absld.pgd)
    with pytest.raises(ValueError, match=r"epsilon must be \(4,1,1,1\), not \(8,\)"):
        inspect.unwrap(attack.check_radius)(torch.full((8,), 0.1), x_nat)
    with pytest.raises(ValueError, match=r"noise must be \(4,3,8,8\), not \(1, 3, 8, 8\)"):
        pgd(torch.abs, torch.sum, x_nat, x_nat[:1], epsilon=0.1, step_size=0.1, steps=1)
    with pytest.raises(ValueError, match=r"labels must be \(4\), not \(1,\)"):
        inspect.unwrap(attack.margins)(torch.zeros(4, 3), torch.zeros(1).long())


def test_radii_and_noise_on_an_accelerator_are_not_read():
    """The meta device has no values: whoever asks for one fails."""
    x, radii = torch.zeros(4, 3, 8, 8, device="meta"), torch.zeros(4, 1, 1, 1, device="meta")
    assert climb(absld, torch.abs, torch.sum, x, x, radii).device.type == "meta"


@both
@given(draw.seeds, st.integers(1, 3))
def test_the_order_of_a_batch_changes_no_image(impl, seed, cut):
    x_nat, labels = draw.images(seed), soft_labels(4, seed)
    noise = noise_like(x_nat, seed)
    whole = climb(impl, network(impl), kl(impl, labels), x_nat, noise)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    moved = climb(impl, network(impl), kl(impl, labels[order]), x_nat[order], noise[order])
    assert torch.equal(moved, whole[order])
    parts = [
        climb(impl, network(impl), kl(impl, labels[index]), x_nat[index], noise[index])
        for index in (slice(cut), slice(cut, None))
    ]
    assert torch.equal(torch.cat(parts), whole)


@both
@given(draw.seeds)
def test_kl_and_soft_cross_entropy_climb_alike(impl, seed):
    x_nat, labels = draw.images(seed), soft_labels(4, seed)
    noise = noise_like(x_nat, seed)

    def cross_entropy(logits):
        return F.cross_entropy(logits, labels, reduction="sum")

    by_kl = climb(impl, network(impl), kl(impl, labels), x_nat, noise)
    assert torch.equal(climb(impl, network(impl), cross_entropy, x_nat, noise), by_kl)


@both
@given(draw.seeds)
def test_closed_form_of_a_linear_model(impl, seed):
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(3 * 8 * 8, generator=random, dtype=draw.DTYPE)
    x_nat = draw.images(seed, n=2)

    def forward(x):
        score = x.flatten(1) @ weight
        return torch.stack([score, -score], dim=1)

    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=draw.DTYPE)
    x_adv = climb(impl, forward, kl(impl, labels), x_nat, torch.zeros_like(x_nat), steps=6)
    # p_student - p_label: the student can only be less sure than a label of 0 or 1.
    direction = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1) * weight.sign().view(1, 3, 8, 8)
    torch.testing.assert_close(x_adv, (x_nat + EPSILON * direction).clamp(0, 1))


@both
def test_the_first_gradient_is_taken_at_the_unclipped_start(impl):
    """A start outside the ball is where the first gradient is taken."""
    seen = []

    def forward(x):
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :3]

    x_nat = draw.images(0)
    climb(impl, forward, kl(impl, soft_labels(4)), x_nat, torch.full_like(x_nat, 2.0))
    assert torch.equal(seen[0], x_nat + 2.0)


@both
@given(draw.seeds)
def test_more_steps_do_not_lower_the_objective(impl, seed):
    x_nat, labels, net = draw.images(seed), soft_labels(4, seed), network(impl, seed)
    noise = noise_like(x_nat, seed)
    objective = kl(impl, labels)
    x_adv = climb(impl, net, objective, x_nat, noise, epsilon=0.01, step_size=0.001, steps=8)
    assert objective(net(x_adv)) >= objective(net(x_nat + noise)) - 1e-6


# --- No traces ---


def trace(model):
    """All that an attack must not change: tensors, gradients, flags, the global generator."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return tensors, parameters, modes, torch.get_rng_state()


def same(first, second):
    """Are two traces equal? Gradients by identity: not even a copy may take their place."""
    return (
        first[0].keys() == second[0].keys()
        and all(torch.equal(first[0][name], second[0][name]) for name in first[0])
        and all(a[0] == b[0] and a[1] is b[1] for a, b in zip(first[1], second[1], strict=True))
        and first[2] == second[2]
        and torch.equal(first[3], second[3])
    )


def mixed(seed=0):
    """A network with frozen and trainable weights, gradients on some, modules in both modes:
    all drawn from the seed."""
    model = absld.build_model("convnet", 3, "test", seed).to(draw.DTYPE)
    random = torch.Generator().manual_seed(seed)

    def coin():
        return bool(torch.randint(2, (), generator=random))

    for module in model.modules():
        module.training = coin()
    for parameter in model.parameters():
        parameter.requires_grad_(coin())
        if parameter.requires_grad and coin():
            parameter.grad = torch.ones_like(parameter)
    return model


@both
def test_training_attack_leaves_no_trace(impl):
    """absld_min's may set the mode, which its absld_step sets next; the package's may not."""
    model = impl.build_model("convnet", 3, "test").to(draw.DTYPE)
    model.train() if impl is absld else model.eval()
    x_nat, before = draw.images(0), trace(model)
    x_adv = training_attack(impl, EPSILON)(model, soft_labels(4), x_nat, noise_like(x_nat))
    assert not x_adv.requires_grad and not torch.equal(x_adv, x_nat)
    assert same(trace(model), before)


@both
def test_training_attack_keeps_batch_norm_out_of_it(impl):
    """The result is that of eval mode, and nothing is counted."""
    model, x_nat = impl.build_model("convnet", 3, "test").to(draw.DTYPE), draw.images(0)
    attack, given = training_attack(impl, EPSILON), (soft_labels(4), x_nat, noise_like(x_nat))
    in_eval, before = attack(model.eval(), *given), trace(model)
    assert torch.equal(attack(model.train(), *given), in_eval)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name]), name


@given(draw.seeds)
def test_frozen_eval_leaves_no_trace(seed):
    model, x_nat = mixed(seed), draw.images(seed)
    before = trace(model)
    with absld.frozen_eval(model) as frozen:
        assert frozen is model
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model(x_nat)
    assert same(trace(model), before)
    absld.TrainingAttack(EPSILON, EPSILON / 4, 2)(
        model, attack.kl(soft_labels(4)), x_nat, noise_like(x_nat)
    )
    assert same(trace(model), before)


@given(draw.seeds)
def test_frozen_eval_that_is_left_by_an_exception_leaves_no_trace(seed):
    model = mixed(seed)
    before = trace(model)
    with pytest.raises(ZeroDivisionError), absld.frozen_eval(model):
        raise ZeroDivisionError
    assert same(trace(model), before)

    def objective(logits):
        raise ZeroDivisionError

    x_nat = draw.images(seed)
    with pytest.raises(ZeroDivisionError):
        absld.TrainingAttack(EPSILON, EPSILON / 4, 2)(model, objective, x_nat, noise_like(x_nat))
    assert same(trace(model), before)


def test_nested_frozen_eval_leaves_no_trace():
    """As a teacher that is the student, or an evaluation inside an attack."""
    model = mixed()
    before = trace(model)
    with absld.frozen_eval(model):
        with absld.frozen_eval(model):
            pass
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert same(trace(model), before)


def test_frozen_eval_of_a_shared_module_leaves_no_trace():
    """Each flag is put back as such: a parent's `train` would reach the shared child again."""
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(nn.Sequential(shared), nn.Sequential(shared))
    shared.eval()
    before = trace(model)
    with absld.frozen_eval(model):
        pass
    assert same(trace(model), before) and model[1].training and not shared.training


def test_frozen_eval_that_fails_half_way_leaves_no_trace():
    """The mode is set module by module: also what was set before the fault is taken back."""

    class Stubborn(nn.Linear):
        def train(self, mode=True):
            if not mode:
                raise ZeroDivisionError
            return super().train(mode)

    model = nn.Sequential(nn.Linear(2, 2), Stubborn(2, 2))
    before = trace(model)
    with pytest.raises(ZeroDivisionError), absld.frozen_eval(model):
        pass
    assert same(trace(model), before) and model[0].training


def test_the_package_attacks_under_no_grad_too():
    x_nat, net = draw.images(0), network(absld)
    given = net, attack.kl(soft_labels(4)), x_nat, noise_like(x_nat)
    expected = climb(absld, *given)
    with torch.no_grad():
        assert torch.equal(climb(absld, *given), expected)


def cut(x):
    return x.detach().flatten(1)[:, :3]


@pytest.mark.parametrize(
    ("mode", "forward"),
    [
        (torch.inference_mode, network(absld)),
        (torch.no_grad, cut),
        (torch.enable_grad, cut),
        (torch.enable_grad, lambda x: torch.ones(4, 3, dtype=x.dtype, requires_grad=True)),
    ],
    ids=["inference_mode", "cut, no_grad", "cut", "another input"],
)
def test_an_attack_without_a_gradient_is_refused_by_name(mode, forward):
    x_nat, objective = draw.images(0), attack.kl(soft_labels(4))
    with mode(), pytest.raises(absld.UsageError, match="no gradient reaches the images"):
        climb(absld, forward, objective, x_nat, torch.zeros_like(x_nat))


# --- Threads ---


def run_in_threads(function, count=3):
    """Call function(number) in threads that begin together; return the results."""
    results, start = [None] * count, threading.Barrier(count)

    def run(number):
        start.wait()
        results[number] = function(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize("wrap", [lambda net, n: net, lambda net, n: nn.Sequential(net)])
def test_threads_have_a_network_one_after_another(wrap):
    """Also networks that share a module. It is as before afterwards."""
    model = mixed()
    before, inside, most = trace(model), [], []

    def use(number):
        for _ in range(20):
            with absld.frozen_eval(wrap(model, number)), absld.frozen_eval(model):
                inside.append(number)
                most.append(len(inside))
                model(draw.images(0))
                inside.remove(number)

    run_in_threads(use)
    assert len(most) == 60 and max(most) == 1 and same(trace(model), before)


def test_threads_have_different_networks_at_once():
    met = threading.Barrier(3)

    def use(number):
        with absld.frozen_eval(mixed(number)):
            met.wait(30)

    run_in_threads(use)
    assert not met.broken


def test_a_thread_that_fails_leaves_the_network_to_the_others():
    model = mixed()
    before = trace(model)

    def use(number):
        with pytest.raises(ZeroDivisionError), absld.frozen_eval(model):
            raise ZeroDivisionError
        return True

    assert run_in_threads(use) == [True] * 3 and same(trace(model), before)


@both
def test_an_attack_that_raises_leaves_no_gradients(impl):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()

    def objective(logits):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        climb(impl, model, objective, draw.images(0), torch.zeros(4, 3, 8, 8))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@both
def test_training_attack_is_the_release_s(impl, monkeypatch):
    used = {}

    def record(forward, objective, x_nat, noise, **settings):
        used.update(settings)
        return x_nat

    module = absld_min if impl is absld_min else attack
    monkeypatch.setattr(module, "pgd", record)
    x_nat = draw.images(0)
    training_attack(impl, 8 / 255)(network(impl), soft_labels(4), x_nat, x_nat)
    assert used.pop("norm", "linf") == "linf"
    assert used == {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}


# --- Objectives of the package ---


@given(draw.labelled())
def test_kl_is_the_formula(case):
    logits, soft = case[0], absld.soften(*case)
    expected = len(logits) * oracles.soft_label_kl((logits / 2).tolist(), soft.tolist())
    assert_close(attack.kl(soft)(logits / 2), expected, scale=500)


@given(draw.labelled())
def test_cross_entropy_is_the_formula(case):
    logits, labels, temperature = case
    sums, _ = oracles.class_risk_sums(logits.tolist(), labels.tolist(), len(temperature))
    assert_close(attack.cross_entropy(labels)(logits), sum(sums), scale=500)


@given(draw.labelled(), st.floats(-5, 30))
def test_margin_is_the_formula(case, confidence):
    logits, labels, _ = case
    expected = oracles.margin(logits.tolist(), labels.tolist(), confidence)
    assert_close(attack.margin(labels, confidence)(logits), expected, scale=500)
    at_default = oracles.margin(logits.tolist(), labels.tolist(), 50.0)
    assert_close(attack.margin(labels)(logits), at_default, scale=500)


def test_margin_has_no_gradient_beyond_its_confidence():
    """An image that is wrong by more gets no gradient; nor does an unconcerned class."""
    logits = torch.tensor([[60.0, 0.0, 1.0], [40.0, 0.0, 1.0], [-3.0, 0.0, 1.0]])
    logits.requires_grad_()
    objective = attack.margin(torch.tensor([1, 1, 1]))(logits)
    assert objective.item() == 50.0 + 40.0 + 1.0
    objective.backward()
    assert logits.grad.tolist() == [[0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [0.0, -1.0, 1.0]]


@given(draw.seeds, st.sampled_from(["kl", "cross_entropy", "margin"]))
def test_an_image_is_attacked_alike_in_any_batch(seed, name):
    """What each objective promises: it sums over the batch."""
    x_nat, net = draw.images(seed), network(absld, seed)
    given = soft_labels(4, seed) if name == "kl" else torch.arange(4) % 3
    objective, noise = getattr(attack, name), noise_like(x_nat, seed)
    whole = climb(absld, net, objective(given), x_nat, noise, steps=2)
    alone = [
        climb(absld, net, objective(given[i : i + 1]), x_nat[i : i + 1], noise[i : i + 1], steps=2)
        for i in range(4)
    ]
    assert torch.equal(torch.cat(alone), whole)
