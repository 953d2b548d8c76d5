"""`absld.evaluate` on real networks: its subsets, what it leaves unchanged, what it refuses.

That it computes the worst case is tested in tests/equivalence/test_evaluation_oracle.py.
"""

import inspect
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import strategies as draw
from torch import nn

import absld
from absld.errors import CheckpointError, NonFiniteError, Stopped
from absld.evaluation import evaluate as evaluations
from absld.evaluation.attacks import AttackBatch, AutoAttackPart, parse_attacks
from absld.evaluation.evaluate import evaluate
from absld.evaluation.surrogates import (
    InsideRange,
    LogOdds,
    clamps_input,
    output_bounds,
    surrogates,
)

C = 3


def network(seed=0, dtype=torch.float32):
    model = absld.build_model("convnet", C, "worst case", seed).to(dtype)
    with torch.no_grad():
        model.linear.weight *= 40  # margins that differ, and classes that all occur
    return model.eval()


def images(seed=0, n=24, classes=C):
    labels = torch.arange(n) % classes
    return absld.InMemoryImages(draw.images(seed, n), labels, tuple("abc"[:classes]))


def some_right(seed=0, n=24):
    """A network and images of which it has about three quarters right."""
    model, data = network(seed), images(seed, n)
    with torch.no_grad():
        said = model(data.images).argmax(1)
    labels = torch.where(torch.arange(n) % 4 == 0, (said + 1) % C, said)
    return model, absld.InMemoryImages(data.images, labels, data.classes)


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


class Odd:
    """An attack that returns what it is told."""

    name, cost = "odd", 1.0

    def __init__(self, make=lambda x: x, restarts=1):
        self.make, self.restarts = make, restarts

    def perturb(self, model, batch):
        return self.make(batch.x_nat)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", -0.1),
        ("epsilon", 2.0),
        ("epsilon", float("nan")),
        ("epsilon", True),
        ("epsilon", None),
        ("restarts", 0),
        ("restarts", 1.5),
        ("examples", 0),
        ("examples", -3),
        ("examples", 2.5),
        ("batch_size", 0),
        ("batch_size", 7.5),
        ("batch_size", True),
        ("seed", None),
        ("attacks", ["fgsm"]),
        ("attacks", None),
        ("attacks", [object()]),
        ("attacks", [Odd(restarts=0)]),
        ("attacks", [Odd(restarts=1.5)]),
        ("attacks", [Odd(lambda x: None)]),
        ("attacks", [Odd(lambda x: x[:, :, 1:])]),
        ("attacks", [Odd(lambda x: (x * 255).byte())]),
        ("before", [[0]]),
        ("before", torch.full((2, 24), -1.0)),
        ("before", torch.full((3, 24), -1)),
        ("before", torch.full((2, 23), -1)),
        ("before", torch.full((2, 24), C)),
        ("before", torch.full((2, 24), -2)),
        ("data", (torch.rand(2, 3, 8, 8), torch.zeros(2))),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_arguments_that_are_not_such_are_refused(name, value):
    model, data = some_right()
    call = inspect.unwrap(evaluate)  # its own words, not those of the types that tests enforce
    arguments = {"model": model, "data": data, "epsilon": 0.1, "attacks": "fgsm", name: value}
    with pytest.raises(absld.UsageError):
        call(**arguments)


def test_numbers_may_be_of_numpy_or_fractions_and_images_float64():
    """The first are settings; the last is what an attack returns."""
    model, data = some_right()
    call = inspect.unwrap(evaluate)
    expected = evaluate(model, data, epsilon=0.03125, attacks="cw2", examples=9).predictions
    numbers = {"examples": np.int64(9), "epsilon": np.float32(0.03125), "batch_size": np.uint8(4)}
    assert torch.equal(call(model, data, attacks="cw2", **numbers).predictions, expected)
    numbers["epsilon"] = "1/32"
    assert torch.equal(call(model, data, attacks="cw2", **numbers).predictions, expected)
    found = evaluate(model, data, epsilon=0.1, attacks=[Odd(lambda x: x.double())])
    assert torch.equal(*found.predictions)


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
        made_inside = absld.InMemoryImages(data.images.clone(), data.labels.clone(), data.classes)
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
    with pytest.raises(CheckpointError, match="the network writes into its input"):
        absld.validate(Writer(WRITES[write]), data, epsilon=0.1)
    assert torch.equal(data.images, before)


def test_a_negative_radius_is_refused_in_validation():
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\], not -0\.1"):
        absld.validate(network(), images(), epsilon=-0.1)


# --- Networks that hide their gradients ---


def centred():
    model = network()
    with torch.no_grad():
        model.linear.bias -= model(images(n=60).images).mean(0)
    return model


def clamp(x):
    return x.clamp(0, 1)


class Bounded(nn.Module):
    """A network behind a function that may bound its outputs, and one of its input.

    Its logits are about 0 in the mean over images, as those of a trained network.
    """

    def __init__(self, bound, scale=1.0, before=lambda x: x):
        super().__init__()
        self.net, self.bound, self.scale, self.before = centred(), bound, scale, before

    def forward(self, x):
        return self.bound(self.scale * self.net(self.before(x)))


@pytest.mark.parametrize(
    "change",
    [
        {"bound": torch.sigmoid, "scale": 32.0},
        {"bound": torch.tanh, "scale": 16.0},
        {"bound": torch.tanh, "scale": 16.0, "before": clamp},
    ],
    ids=["sigmoid", "tanh", "tanh, clamped input"],
)
def test_a_margin_attack_breaks_as_many_images_behind_a_bounded_function(change, monkeypatch):
    """By the log-odds, which for a sigmoid are the logits."""
    model, data = Bounded(lambda z: z), images(n=60)
    data = absld.InMemoryImages(data.images, model(data.images).argmax(1), data.classes)

    def robust(net):
        return int(evaluate(net, data, epsilon=0.03, attacks="cw10").robust.sum())

    found = robust(Bounded(**change))
    assert found == robust(model)
    monkeypatch.setattr(evaluations, "surrogates", lambda model, x: [model])
    assert robust(Bounded(**change)) > found


CLAMPS = {
    "clamp": clamp,
    "relu": torch.relu,
    "hardtanh": lambda x: nn.functional.hardtanh(2 * x - 1) / 2 + 0.5,
    "from above": lambda x: 1 - torch.relu(1 - x),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_black_and_white_images_are_attacked_behind_a_clamp(name, monkeypatch):
    model, data = Bounded(lambda z: z), images(n=60)
    ends = data.images.round()
    data = absld.InMemoryImages(ends, model(ends).argmax(1), data.classes)

    def robust(net):
        return int(evaluate(net, data, epsilon=0.03, attacks="cw10").robust.sum())

    clamped = Bounded(lambda z: z, before=CLAMPS[name])
    assert clamps_input(clamped.eval(), data.images)
    assert robust(clamped) == robust(model) < 60
    monkeypatch.setattr(evaluations, "surrogates", lambda model, x: [model])
    assert robust(clamped) > robust(model)


@pytest.mark.parametrize("kind", ["convnet", "resnet18", "its gradient cut", "max pooling first"])
def test_networks_that_clamp_nothing_are_attacked_as_they_are(kind):
    """Also where all is black: a region without gradient is not a clamp."""
    model = {
        "its gradient cut": Bounded(lambda z: z.detach()),
        "max pooling first": Bounded(lambda z: z, before=nn.MaxPool2d(2)),
    }.get(kind) or absld.build_model(kind, C, "plain")
    model, x = model.eval(), images(n=3).images
    for black in (x, x.round(), torch.zeros_like(x)):
        assert surrogates(model, black) == [model]


def test_a_network_inside_of_the_range_predicts_the_same():
    x, model = images().images.round(), network()
    torch.testing.assert_close(InsideRange(model)(x), model(x), rtol=1e-3, atol=1e-3)


def far(then):
    """Do something else with pixels far outside of the range."""
    return lambda x: then(x) if x.abs().max() > 2 else x


def refuse(x):
    raise ValueError("pixels must be in [0,1]")


def leave(x):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (torch.sigmoid, (0, 1)),
        (lambda z: z.softmax(1), (0, 1)),
        (torch.tanh, (-1, 1)),
        (lambda z: z.clamp(-1, 7), (-1, 7)),
        (lambda z: 5 * z.softmax(1), (0, 5)),
        (lambda z: z, None),
        (lambda z: z.log_softmax(1), None),
        (lambda z: 1e-4 * z, None),
        (lambda z: 300 * z, None),
        (nn.LayerNorm(C, elementwise_affine=False), None),
        (torch.zeros_like, None),
        (lambda z: z * torch.nan, None),
    ],
)
@pytest.mark.parametrize(
    "before",
    [lambda x: x, clamp, far(refuse), far(leave), far(lambda x: x * torch.nan)],
    ids=["taken", "clamped", "refused", "left", "NaN"],
)
def test_bounds_are_found_where_outputs_saturate(before, bound, expected):
    """Whatever the network does with images far outside of the pixel range."""
    found = output_bounds(Bounded(bound, 99.0, before), images(n=32).images)
    assert found == (expected and pytest.approx(expected, abs=1e-2))


@pytest.mark.parametrize("bound", [torch.relu, nn.functional.logsigmoid, lambda z: -torch.relu(z)])
def test_one_sided_bounds_are_found(bound):
    found = output_bounds(Bounded(bound, 99.0), images(n=32).images)
    assert found and min(abs(end) for end in found) < 1e-5


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_outputs_of_untrained_networks_are_not_bounded(classes):
    """They hardly depend on the image, so that many images have nearly the same largest output."""
    for seed in range(3):
        model = absld.build_model("convnet", classes, "untrained", seed).eval()
        assert output_bounds(model, images(n=32).images) is None


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_images_do_not_tell_that_outputs_are_bounded(n):
    assert output_bounds(Bounded(torch.tanh, 8.0, clamp), images(n=n).images) is None


def test_a_signal_that_comes_while_bounds_are_looked_for_ends_the_evaluation():
    def signal(x):
        raise Stopped(143)

    with pytest.raises(Stopped):
        output_bounds(Bounded(torch.tanh, before=far(signal)), images().images)


def test_log_odds_predict_the_same_classes():
    """Also where a sigmoid is 0 or 1 in float32."""
    x, model = images(n=60).images, Bounded(torch.sigmoid, 48.0)
    log_odds = LogOdds(model, 0.0, 1.0)(x)
    unsaturated = model(x).amax(1) < 1
    assert log_odds.isfinite().all() and 0 < unsaturated.sum() < len(x)
    assert torch.equal(log_odds.argmax(1)[unsaturated], model.net(x).argmax(1)[unsaturated])


@pytest.mark.parametrize("then", [refuse, leave])
def test_a_network_that_refuses_pixels_outside_of_0_to_1_is_evaluated(then):
    def outside(x):
        return then(x) if x.min() < 0 or x.max() > 1 else x

    found = [
        evaluate(Bounded(lambda z: z, 1.0, before), images(), epsilon=0.01, attacks="cw2")
        for before in (lambda x: x, outside)
    ]
    assert torch.equal(found[0].predictions, found[1].predictions)
