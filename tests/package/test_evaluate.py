"""`absld.evaluate` on real networks: its subsets, what it leaves unchanged, what it refuses.

That it computes the worst case is tested in tests/equivalence/test_evaluation_oracle.py.
"""

import inspect
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import strategies as draw
from torch import nn

import absld
from absld.errors import CheckpointError, NonFiniteError
from absld.evaluation import evaluate as evaluations
from absld.evaluation.attacks import (
    AttackBatch,
    AutoAttackPart,
    LogOdds,
    output_bounds,
    parse_attacks,
)
from absld.evaluation.evaluate import evaluate

C = 3


def network(seed=0, dtype=torch.float32):
    model = absld.build_model("convnet", C, "worst case", seed).to(dtype)
    with torch.no_grad():
        model.linear.weight *= 40  # margins that differ, and classes that all occur
    return model.eval()


def images(seed=0, n=24, classes=C):
    labels = torch.arange(n) % classes
    return absld.ImageSet(draw.images(seed, n), labels, tuple("abc"[:classes]))


def some_right(seed=0, n=24):
    """A network and images of which it has about three quarters right."""
    model, data = network(seed), images(seed, n)
    with torch.no_grad():
        said = model(data.images).argmax(1)
    labels = torch.where(torch.arange(n) % 4 == 0, (said + 1) % C, said)
    return model, absld.ImageSet(data.images, labels, data.classes)


def test_a_subset_has_the_predictions_of_the_whole_set():
    model, data = some_right(1, 60)
    whole = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5")
    some = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5", examples=20)
    assert len(some.labels) == 20
    assert torch.equal(some.predictions, whole.predictions[:, some.index])
    again = evaluate(network(9), data, epsilon=0.05, attacks="fgsm", examples=20)
    assert torch.equal(again.index, some.index)  # the same images for another network


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_the_random_state_are_unchanged(fails):
    model, data = some_right()
    model.train()
    model[1].eval()
    model.linear.bias.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()

    def on_batch(progress, evaluation):
        if fails and progress.attack == "pgd2":
            raise KeyboardInterrupt

    def run():
        evaluate(model, data, epsilon=0.001, attacks="fgsm,pgd2,cw2", on_batch=on_batch)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda z: z[:, :2], CheckpointError, r"\(2, 2\)"),
        (lambda z: (z, z), CheckpointError, "tuple"),
        (lambda z: z * torch.nan, NonFiniteError, "of clean images"),
        (lambda z: z / 0, NonFiniteError, "NaN or infinity"),
    ],
)
def test_outputs_that_are_not_logits_are_refused(change, kind, said):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return change(self.net(x))

    with pytest.raises(kind, match=said):
        evaluate(Changed(), images(), epsilon=0.1, attacks="fgsm")


def test_classes_without_images_have_no_accuracy():
    model, data = some_right()
    only = data.subset((data.labels != 1).nonzero().squeeze(1))
    found = evaluate(model, only, epsilon=0.05, attacks="fgsm")
    assert found.clean_accuracy.isnan().tolist() == [False, True, False]
    assert (
        found.class_intervals(found.robust)[1].value != found.class_intervals(found.robust)[1].value
    )
    assert set(found.metrics(found.robust)) == set(absld.metrics.METRICS)
    assert found.confusion()[1].sum() == 0


def test_the_rows_have_the_names_of_the_attacks():
    model, data = some_right()
    found = evaluate(model, data, epsilon=0.05, attacks=parse_attacks("fgsm,cw2", C))
    assert found.attacks == ("clean", "fgsm", "cw2") and found.predictions.shape == (3, len(data))
    assert evaluations.evaluate is absld.evaluate


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -0.1),
        ("epsilon", 2.0),
        ("epsilon", float("nan")),
        ("restarts", 0),
        ("examples", 0),
        ("examples", -3),
        ("batch_size", 0),
        ("attacks", ["fgsm"]),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    model, data = some_right()
    call = inspect.unwrap(evaluate)  # its own words, not those of the types that tests enforce
    with pytest.raises(absld.UsageError):
        call(model, data, **{"epsilon": 0.1, name: value})


# --- Threads and modes of torch ---


def in_threads(functions):
    """Call functions in threads that begin together; return their results."""
    start, results = threading.Barrier(len(functions)), {}

    def run(number, function):
        start.wait()
        results[number] = function()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[number] for number in range(len(functions))]


def test_threads_may_evaluate_one_network():
    """Also inside other networks. Afterwards it is in train mode and trainable, as before."""
    model, data = some_right(n=12)
    model.train()

    def run(network):
        return evaluate(network, data, epsilon=0.05, attacks="pgd2,cw2", batch_size=6).predictions

    expected = run(model)
    networks = [model, nn.Sequential(model), model]
    found = in_threads([lambda network=network: run(network) for network in networks])
    assert all(torch.equal(predictions, expected) for predictions in found)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_threads_run_autoattack_one_after_another(monkeypatch):
    """Also on different networks: it draws from torch's global generators, which all share."""
    inside, most, drawn = [], [], set()

    def perturb(x, labels):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        drawn.add(torch.rand(()).item())
        inside.pop()
        return x

    def part():
        return SimpleNamespace(perturb=perturb, n_target_classes=9)

    def suite(*given, **settings):
        return SimpleNamespace(apgd=part(), apgd_targeted=part(), fab=part(), square=part())

    fake = SimpleNamespace(AutoAttack=suite)
    monkeypatch.setattr("absld.evaluation.attacks.import_autoattack", lambda: fake)
    attack, x = AutoAttackPart("square"), images(n=2)
    batch = AttackBatch(x.images, x.labels, torch.arange(2), 0.1)
    networks = [network(seed) for seed in range(4)]
    in_threads([lambda model=model: attack.perturb(model, batch) for model in networks])
    assert most == [1] * 4 and len(drawn) == 1


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_evaluations_run_in_any_mode_of_torch(mode):
    """Autocast computes the network in bfloat16, as is asked for. The images are made inside."""
    model, data = some_right()

    def run(data):
        evaluation = evaluate(model, data, epsilon=0.01, attacks="pgd5,cw5")
        return evaluation.predictions, *absld.validate(model, data, epsilon=0.01)

    outside = run(data)
    with MODES[mode]():
        made_inside = absld.ImageSet(data.images.clone(), data.labels.clone(), data.classes)
        inside = run(made_inside)
    for one, other in zip(outside, inside, strict=True):
        assert one.shape == other.shape and not other.is_inference()
        assert mode == "autocast" or torch.equal(one, other)


def test_a_network_made_under_inference_mode_is_refused_by_name():
    with torch.inference_mode():
        model = network()
    with pytest.raises(CheckpointError, match=r"made under torch\.inference_mode") as caught:
        evaluate(model, images(), epsilon=0.1)
    assert caught.value.hint == "make or load it outside of inference_mode"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_type_are_named(dtype):
    with pytest.raises(CheckpointError, match="does not take images") as caught:
        evaluate(network(dtype=dtype), images(), epsilon=0.1)
    assert caught.value.hint == "its weights must be torch.float32"


# --- Networks that write into their input ---


class Writer(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.net, self.write = network(), write

    def forward(self, x):
        self.write(x)
        return self.net(x)


WRITES = {
    "in place": lambda x: x.mul_(2).sub_(1),
    "ReLU in place, which changes no pixel": torch.relu_,
    "of a view": lambda x: x.view(-1)[::2].zero_(),
    "detached": lambda x: x.detach().zero_(),
    "data": lambda x: x.data.zero_(),
    "numpy": lambda x: x.detach().numpy().fill(0),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_network_that_writes_into_its_input_is_refused(write):
    data = images()
    before = data.images.clone()
    with pytest.raises(CheckpointError, match="the network writes into its input"):
        evaluate(Writer(WRITES[write]), data, epsilon=0.1, attacks="pgd2")
    if write not in ("data", "numpy"):  # of which torch does not know
        with pytest.raises(CheckpointError, match="the network writes into its input"):
            absld.validate(Writer(WRITES[write]), data, epsilon=0.1)
    else:
        absld.validate(Writer(WRITES[write]), data, epsilon=0.1)
    assert torch.equal(data.images, before)


def test_a_negative_radius_is_refused_in_validation():
    with pytest.raises(ValueError, match=r"epsilon must be 0 or more, not -0\.1"):
        absld.validate(network(), images(), epsilon=-0.1)


# --- Bounded outputs ---


class Bounded(nn.Module):
    def __init__(self, bound, scale=1.0):
        super().__init__()
        self.net, self.bound, self.scale = network(), bound, scale

    def forward(self, x):
        return self.bound(self.scale * self.net(x))


@pytest.mark.parametrize(
    ("bound", "scale"), [(torch.sigmoid, 16.0), (torch.tanh, 8.0)], ids=["sigmoid", "tanh"]
)
def test_a_margin_attack_breaks_as_many_images_behind_a_sigmoid(bound, scale, monkeypatch):
    """By the log-odds, which for a sigmoid are the logits."""
    model, data = some_right(n=60)

    def robust(net):
        return int(evaluate(net, data, epsilon=0.04, attacks="cw10").robust.sum())

    found = robust(Bounded(bound, scale))
    assert found == robust(model)
    monkeypatch.setattr(evaluations, "output_bounds", lambda *given: None)
    assert robust(Bounded(bound, scale)) > found


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (torch.sigmoid, (0, 1)),
        (lambda z: z.softmax(1), (0, 1)),
        (torch.tanh, (-1, 1)),
        (lambda z: z.clamp(-1, 7), (-1, 7)),
        (lambda z: z, None),
        (torch.relu, None),
        (nn.LayerNorm(C, elementwise_affine=False), None),
        (torch.zeros_like, None),
        (lambda z: z * torch.nan, None),
    ],
)
def test_bounds_are_found_where_outputs_saturate(bound, expected):
    found = output_bounds(Bounded(bound), images().images)
    assert found == (expected and pytest.approx(expected, abs=1e-5))


def test_log_odds_predict_the_same_classes():
    """Also where a sigmoid is 0 or 1 in float32."""
    x, model = images().images, Bounded(torch.sigmoid, 24.0)
    log_odds = LogOdds(model, 0.0, 1.0)(x)
    unsaturated = model(x).amax(1) < 1
    assert log_odds.isfinite().all() and 0 < unsaturated.sum() < len(x)
    assert torch.equal(log_odds.argmax(1)[unsaturated], model.net(x).argmax(1)[unsaturated])


def test_a_network_that_refuses_pixels_outside_of_0_to_1_is_evaluated():
    class Strict(Bounded):
        def forward(self, x):
            assert x.min() >= 0 and x.max() <= 1
            return super().forward(x)

    found = [
        evaluate(kind(lambda z: z), images(), epsilon=0.01, attacks="cw2").predictions
        for kind in (Bounded, Strict)
    ]
    assert torch.equal(*found)
