"""absld.evaluate: the worst case of every image, what is passed over, and what is left alone."""

import inspect
from dataclasses import dataclass

import pytest
import strategies as draw
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.errors import CheckpointError, NonFiniteError
from absld.evaluation import evaluate as evaluations
from absld.evaluation.attacks import parse_attack, parse_attacks
from absld.evaluation.evaluate import PENDING, evaluate, paired

C = 3


def network(seed=0, dtype=torch.float64):
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


@dataclass
class Breaks:
    """An attack that breaks certain images of networks that read their label off a pixel."""

    name: str
    numbers: tuple = ()
    restarts: int = 1
    cost: float = 1.0

    def __post_init__(self):
        self.given = []

    def perturb(self, model, x_nat, labels, index, *, restart, epsilon, seed):
        self.given.append((restart, index.tolist()))
        x_adv = x_nat.clone()
        hit = torch.isin(index, torch.tensor(self.numbers, dtype=torch.long))
        x_adv[hit, 0, 0, 0] = 1 - x_adv[hit, 0, 0, 0]
        return x_adv


class Readable(nn.Module):
    """Two classes: is the first pixel above a half?"""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        bright = x[:, 0, 0, 0] - 0.5 + 0 * self.unused
        return torch.stack([-bright, bright], 1)


def readable(n=10, wrong=()):
    x = torch.full((n, 3, 2, 2), 0.5, dtype=torch.float64)
    labels = torch.arange(n) % 2
    x[:, 0, 0, 0] = labels.double() * 0.8 + 0.1
    x[list(wrong), 0, 0, 0] = 1 - x[list(wrong), 0, 0, 0]
    return absld.ImageSet(x, labels, ("dark", "bright"))


# --- The worst case ---


@pytest.mark.parametrize("each", [False, True])
def test_the_mean_of_the_minimum_not_the_minimum_of_the_means(each):
    first, second = Breaks("one", (1, 2, 3)), Breaks("two", (3, 4))
    found = evaluate(
        Readable(), readable(wrong=[0]), epsilon=1.0, attacks=[first, second], each=each
    )
    assert found.withstood.tolist() == [False] * 5 + [True] * 5
    assert found.right[0].tolist() == [False] + [True] * 9
    if each:  # figures of their own, but for the image that was wrong when clean
        assert found.right.sum(1).tolist() == [9, 6, 7]
        assert [first.given, second.given] == [[(0, list(range(1, 10)))]] * 2
    else:  # what is broken is not attacked again
        assert found.right.sum(1).tolist() == [9, 6, 5]
        assert first.given == [(0, list(range(1, 10)))]
        assert second.given == [(0, [4, 5, 6, 7, 8, 9])]
    assert found.robust.tolist() == [2 / 5, 3 / 5] and found.clean.tolist() == [4 / 5, 1.0]
    # Of a broken image the first wrong class: dark 0, 2, 4 said bright; bright 1, 3 said dark.
    assert found.confusion().tolist() == [[2, 3], [2, 3]]


def test_restarts_are_for_what_is_left():
    attack = Breaks("again", (1, 2), restarts=3)
    found = evaluate(Readable(), readable(6), epsilon=1.0, attacks=[attack])
    assert attack.given == [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 3, 4, 5]), (2, [0, 3, 4, 5])]
    assert found.withstood.tolist() == [True, False, False, True, True, True]
    attack = Breaks("all", tuple(range(6)), restarts=3)
    evaluate(Readable(), readable(6), epsilon=1.0, attacks=[attack])
    assert len(attack.given) == 1


def test_what_an_attack_returns_is_put_into_the_ball_and_the_box():
    """A cheat breaks nothing, nor does NaN."""
    found = evaluate(Readable(), readable(), epsilon=0.3, attacks=[Breaks("cheat", (1, 2))])
    assert found.withstood.all()

    class Nothing(Breaks):
        def perturb(self, model, x_nat, *_, **__):
            return x_nat * torch.nan

    assert evaluate(Readable(), readable(), epsilon=0.3, attacks=[Nothing("nan")]).withstood.all()


@given(draw.seeds, st.sampled_from([0.0, 0.02, 0.1]))
def test_both_ways_of_going_through_the_attacks_have_the_same_worst_case(seed, epsilon):
    model, data = some_right(seed, 12)
    settings = {"epsilon": epsilon, "attacks": "fgsm,pgd5,cw5", "restarts": 2}
    one, other = (evaluate(model, data, each=each, **settings) for each in (False, True))
    assert torch.equal(one.withstood, other.withstood)
    assert (one.right.sum(1) <= other.right.sum(1)).all()
    assert (one.right[1:] <= one.right[:-1]).all()  # what is broken stays broken


@pytest.mark.parametrize("each", [False, True])
def test_epsilon_0_is_clean_accuracy(each):
    model, data = some_right()
    names = "fgsm,pgd20,pgd20-sat,cw30"
    found = evaluate(model, data, epsilon=0.0, attacks=names, restarts=2, each=each)
    assert torch.equal(found.predictions, found.predictions[:1].expand(5, -1))
    assert torch.equal(found.robust, found.clean)


# --- What decides, and what does not ---


@given(draw.seeds, st.integers(1, 30))
def test_batches_change_nothing(seed, batch_size):
    model, data = some_right(seed, 15)
    settings = {"epsilon": 0.05, "attacks": "pgd5,cw5", "restarts": 2}
    whole = evaluate(model, data, **settings)
    assert torch.equal(
        evaluate(model, data, batch_size=batch_size, **settings).predictions, whole.predictions
    )


def test_a_subset_says_of_its_images_what_the_whole_says():
    model, data = some_right(1, 60)
    whole = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5")
    some = evaluate(model, data, epsilon=0.05, attacks="pgd5,cw5", examples=20)
    assert len(some.labels) == 20
    assert torch.equal(some.predictions, whole.predictions[:, some.index])
    again = evaluate(network(9), data, epsilon=0.05, attacks="fgsm", examples=20)
    assert torch.equal(again.index, some.index)  # the same images for another network


def test_the_seed_decides_the_starts():
    attack = parse_attack("pgd1")
    data = images()
    index = torch.arange(len(data))

    def made(**changed):
        settings = {"restart": 0, "epsilon": 0.1, "seed": 0} | changed
        return attack.perturb(network(), data.images, data.labels, index, **settings)

    assert torch.equal(made(), made())
    assert not torch.equal(made(), made(seed=1)) and not torch.equal(made(), made(restart=1))
    assert (made() - data.images).abs().max() <= 0.1 + 1e-12


def interrupted_and_resumed(model, data, stop_after, **settings):
    """The evaluation, raised out of after so many batches and gone on with; and how many batches
    it took in all."""
    seen, before = [], None

    def on_batch(progress, evaluation):
        seen.append(progress)
        if len(seen) == stop_after:
            seen.append(evaluation.predictions.clone())
            raise KeyboardInterrupt

    try:
        return evaluate(model, data, on_batch=on_batch, **settings), seen
    except KeyboardInterrupt:
        before = seen.pop()
    return evaluate(model, data, before=before, on_batch=on_batch, **settings), seen


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("stop_after", range(1, 12, 2))
def test_an_interruption_changes_nothing(stop_after, each):
    model, data = some_right(2, 20)
    settings = {"epsilon": 0.05, "attacks": "fgsm,pgd3,cw3", "batch_size": 7, "each": each}
    whole, batches = interrupted_and_resumed(model, data, 10**9, **settings)
    resumed, seen = interrupted_and_resumed(model, data, stop_after, **settings)
    assert torch.equal(resumed.predictions, whole.predictions)
    assert len(seen) == len(batches)  # nothing twice
    assert (whole.predictions != PENDING).all()


def test_progress():
    model, data = some_right(2, 20)
    seen = []
    evaluate(
        model,
        data,
        epsilon=0.05,
        attacks="fgsm,pgd3,cw3",
        batch_size=7,
        on_batch=lambda progress, evaluation: seen.append(progress),
    )
    assert [p.attack for p in seen] == sorted(
        (p.attack for p in seen), key=["clean", "fgsm", "pgd3", "cw3"].index
    )
    for progress in seen:
        assert 0 < progress.done <= progress.total and 0 < progress.cost[0] <= progress.cost[1]
    costs = [p.cost[0] for p in seen]
    assert costs == sorted(costs) and seen[-1].cost[0] == pytest.approx(seen[-1].cost[1])
    assert seen[-1].done == seen[-1].total


# --- What is left alone ---


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_and_torch_are_as_before(fails):
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


# --- Networks that are none ---


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (lambda z: z[:, :2], CheckpointError, r"\(2, 2\)"),
        (lambda z: (z, z), CheckpointError, "tuple"),
        (lambda z: z * torch.nan, NonFiniteError, "of clean images"),
        (lambda z: z / 0, NonFiniteError, "NaN or infinity"),
    ],
)
def test_outputs_that_are_no_logits(change, kind, said):
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return change(self.net(x))

    with pytest.raises(kind, match=said):
        evaluate(Changed(), images(), epsilon=0.1, attacks="fgsm")


def test_a_network_that_cuts_its_gradient_is_attacked_in_vain():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x.detach())

    model, data = some_right()
    found = evaluate(Cut(), data, epsilon=0.1, attacks="fgsm,cw5")
    assert torch.equal(found.predictions[1], found.predictions[0])
    _ = model


# --- Figures ---


def test_classes_without_images():
    model, data = some_right()
    only = data.subset((data.labels != 1).nonzero().squeeze(1))
    found = evaluate(model, only, epsilon=0.05, attacks="fgsm")
    assert found.clean.isnan().tolist() == [False, True, False]
    assert (
        found.class_intervals(found.withstood)[1].value
        != found.class_intervals(found.withstood)[1].value
    )
    assert set(found.metrics(found.withstood)) == set(absld.metrics.METRICS)
    assert found.confusion()[1].sum() == 0


def test_the_figures_are_those_of_the_counts():
    model, data = some_right(3, 40)
    found = evaluate(model, data, epsilon=0.05, attacks="pgd5")
    for k in range(C):
        of_class = data.labels == k
        share = found.withstood[of_class].double().mean().item()
        interval = found.class_intervals(found.withstood)[k]
        assert found.robust[k] == pytest.approx(share) == pytest.approx(interval.value)
        assert interval.low <= interval.value <= interval.high
        assert int(found.confusion()[k].sum()) == int(of_class.sum())
        assert int(found.confusion()[k, k]) == int(found.withstood[of_class].sum())
    for name, each in found.metrics(found.withstood).items():
        expected = absld.metrics.METRICS[name](found.robust).item()
        assert each.value == pytest.approx(expected) and each.low <= each.high


def test_differences_of_a_network_and_another():
    data = images(4, 60)
    ours, theirs = (evaluate(network(s), data, epsilon=0.02, attacks="fgsm") for s in (0, 1))
    found = paired(ours, theirs)
    for name, metric in absld.metrics.METRICS.items():
        expected = (metric(ours.robust) - metric(theirs.robust)).item()
        assert found.robust[name].value == pytest.approx(expected)
        assert found.robust[name].low <= found.robust[name].high
    mirrored = paired(theirs, ours)
    assert mirrored.robust["average"].value == pytest.approx(-found.robust["average"].value)
    itself = paired(ours, ours)
    assert all(tuple(each) == (0.0, 0.0, 0.0) for each in itself.robust.values())


def test_names_of_attacks_are_those_of_the_rows():
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
def test_settings_out_of_range(name, value):
    model, data = some_right()
    call = inspect.unwrap(evaluate)  # its own words, not those of the types that tests enforce
    with pytest.raises(absld.UsageError):
        call(model, data, **{"epsilon": 0.1, name: value})
