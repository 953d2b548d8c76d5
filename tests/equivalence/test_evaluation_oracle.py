"""absld.evaluate against a plain-Python oracle; progress, resuming, what attacks may return, and
the figures, of one network and of two. What it leaves alone is in test_worst_case."""

import itertools
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from helpers.small_networks import network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.errors import NonFiniteError, UsageError
from absld.evaluation.attacks import SquareSearch, autoattack_parts
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import PENDING, evaluate
from absld.evaluation.intervals import bootstrap, resample
from absld.metrics import METRICS

C = 3
NAMES = ("ant", "bee", "cat")


class Reader(nn.Module):
    """The class is written in the first pixel: 0, 0.5 or 1; in the second, how sure it is."""

    def forward(self, x):
        first, second = x[:, 0, 0, :, None].unbind(1)
        places = torch.arange(C) / 2
        return (1 + 9 * second) * (first * places - places**2 / 2)


def written(said, labels):
    """Images of which the reader says so."""
    images = torch.zeros(len(said), 3, 2, 2, dtype=draw.DTYPE)
    images[:, 0, 0, 0] = torch.tensor(said) / 2
    images[:, 0, 0, 1] = torch.arange(len(said)) / len(said)  # equal logits look bounded
    return absld.InMemoryImages(images, torch.tensor(labels), NAMES)


@dataclass
class Writes:
    """An attack after which the reader says what is written, by restart and number."""

    name: str
    said: list
    cost: float = 1.0
    attacked: list = field(default_factory=list)

    @property
    def restarts(self):
        return len(self.said)

    def perturb(self, model, batch):
        self.attacked += [(batch.restart, number) for number in batch.index.tolist()]
        x_adv = batch.x_nat.clone()
        x_adv[:, 0, 0, 0] = torch.tensor(self.said[batch.restart])[batch.index] / 2
        return x_adv


@st.composite
def worlds(draw):
    """Labels, what is said of clean images, and of each attack and restart."""
    n = draw(st.integers(1, 12))
    # Mostly right, so that several attacks have something left.
    labels = draw(st.lists(st.integers(0, C - 1), min_size=n, max_size=n))
    shift = st.sampled_from([0, 0, 0, 1, 2])

    def said():
        moved = draw(st.lists(shift, min_size=n, max_size=n))
        return [(label + by) % C for label, by in zip(labels, moved, strict=True)]

    restarts = draw(st.lists(st.integers(1, 3), max_size=3))
    return labels, said(), [[said() for _ in range(tries)] for tries in restarts]


def attacks_of(world):
    return [Writes(f"attack {k}", said) for k, said in enumerate(world[2])]


def run(world, attacks, **settings):
    labels, clean, _ = world
    settings = {"epsilon": 1.0, "attacks": attacks} | settings
    return evaluate(Reader(), written(clean, labels), **settings)


class Stop(Exception):
    pass


def stops(after):
    """An observer that raises at the batch of this number."""
    left = [after]

    def on_batch(progress, evaluation):
        left[0] -= 1
        if left[0] == 0:
            raise Stop(evaluation.predictions.clone())

    return on_batch


# --- The worst case ---


@given(worlds(), st.booleans(), st.integers(1, 13), st.integers(1, 40))
def test_it_is_the_oracles(world, each, batch_size, stop):
    """The classes said, who is attacked and who is not, and that once; also gone on with after any
    batch."""
    labels, clean, tries = world
    rows, attacked = oracles.evaluation(labels, clean, tries, each)
    attacks, settings = attacks_of(world), {"each": each, "batch_size": batch_size}
    try:
        found = run(world, attacks, on_batch=stops(stop), **settings)
    except Stop as stopped:
        found = run(world, attacks, before=stopped.args[0], **settings)
    assert found.predictions.tolist() == rows
    for attack, expected in zip(attacks, attacked, strict=True):
        assert len(attack.attacked) == len(expected) and set(attack.attacked) == expected
    robust = [all(row[k] == label for row in rows) for k, label in enumerate(labels)]
    assert found.robust.tolist() == robust
    assert found.confusion().tolist() == oracles.confusion(labels, rows, C)
    for k in range(C):
        of_class = [right for right, label in zip(robust, labels, strict=True) if label == k]
        expected = sum(of_class) / len(of_class) if of_class else math.nan
        share = found.robust_accuracy[k].item()
        assert share == expected or (math.isnan(share) and math.isnan(expected))
        interval = found.class_intervals(found.robust)[k]
        assert interval.value == pytest.approx(expected, nan_ok=True)


@given(worlds())
def test_confusion_adds_up_and_both_modes_agree_on_the_worst_case(world):
    one, other = (run(world, attacks_of(world), each=each) for each in (False, True))
    assert torch.equal(one.robust, other.robust)
    assert torch.equal(one.confusion(), other.confusion())
    everyone = one.counts(torch.ones_like(one.robust))
    assert torch.equal(one.confusion().sum(1), everyone)
    assert torch.equal(one.confusion().diagonal(), one.counts(one.robust))


def test_the_parts_of_autoattack_are_one_attack_where_each_is_run_alone():
    """The first part tries what another attack has broken; the second only what the first left."""
    labels = [0, 1, 2, 0]
    said = {"fgsm": [1, 1, 2, 0], "apgd-ce": [0, 0, 2, 0], "square": [0, 1, 0, 0]}
    attacks = [Writes(name, [row]) for name, row in said.items()]
    seen = []
    found = run(
        (labels, labels, None), attacks, each=True, on_batch=lambda done, _: seen.append(done)
    )
    attacked = [[number for _, number in attack.attacked] for attack in attacks]
    assert attacked == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    assert found.predictions[1:].tolist() == [[1, 1, 2, 0], [0, 0, 2, 0], [0, 0, 0, 0]]
    assert seen[-1].total == 3 and seen[-1].cost == pytest.approx((4 / 3 + 11, 4 / 3 + 11))


@pytest.mark.parametrize("each", [False, True])
def test_epsilon_0_is_clean_accuracy_under_every_attack(each):
    x = draw.images(3, 12, dtype=torch.float32)
    model = network(0, torch.float32, classes=4)
    labels = model(x).argmax(1)
    labels[::4] = (labels[::4] + 1) % 4
    attacks = [
        SquareSearch("search", 5),
        *absld.evaluation.attacks.parse_attacks("fgsm,pgd2,cw2", 4, 2),
    ]
    try:
        absld.evaluation.attacks.import_autoattack()
        # The real square search would make 5,000 queries to no end.
        attacks += [part for part in autoattack_parts(4) if part.name != "square"]
    except UsageError:
        pass
    data = absld.InMemoryImages(x, labels, tuple("abcd"))
    found = evaluate(model, data, epsilon=0.0, attacks=attacks, each=each)
    assert torch.equal(found.predictions, found.predictions[:1].expand(1 + len(attacks), -1))
    assert int(found.robust.sum()) == 9


def test_bytes_are_the_same_images():
    model = network(0, torch.float32)
    whole = (draw.images(2, 12) * 255).round().to(torch.uint8)
    sets = [absld.InMemoryImages(x, torch.arange(12) % C, NAMES) for x in (whole, whole / 255)]
    one, other = (evaluate(model, data, epsilon=0.02, attacks="pgd3") for data in sets)
    assert torch.equal(one.predictions, other.predictions)
    assert (one.predictions >= 0).all() and (one.predictions < C).all()


# --- What an attack returns ---


@dataclass
class Returns:
    """An attack that returns something made of the images, whatever that is."""

    make: object
    name: str = "odd"
    restarts: int = 1
    cost: float = 1.0

    def perturb(self, model, batch):
        return self.make(batch.x_nat)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 5,
        lambda x: x - 0.2,
        lambda x: torch.where(x > 0.5, torch.nan, x + 0.3),
        lambda x: torch.where(x > 0.5, torch.inf, -torch.inf),
        lambda x: x.clone().contiguous(memory_format=torch.channels_last),
    ],
)
def test_the_network_is_shown_what_is_allowed(make):
    data = absld.InMemoryImages(draw.images(0, 6), torch.zeros(6, dtype=torch.long), NAMES)
    shown = []

    class Watched(nn.Module):
        def forward(self, x):
            shown.append(x.clone())
            return torch.eye(C)[0].repeat(len(x), 1)

    evaluate(Watched(), data, epsilon=0.1, attacks=[Returns(make)])
    x, x_adv = data.images, shown[-1]
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert ((x_adv >= x - 0.1) & (x_adv <= x + 0.1)).all()
    made = make(x)
    kept = made.isfinite() & (made >= 0) & (made <= 1) & ((made - x).abs() <= 0.1)
    assert torch.equal(x_adv[kept], made[kept])
    assert torch.equal(x_adv[~made.isfinite()], x[~made.isfinite()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_network_that_fails_under_attack_only(value):
    """Of one image; said is of which attack."""

    class Fails(nn.Module):
        def forward(self, x):
            logits = Reader()(x)
            logits[x[:, 0, 1, 1] > 0, 1] = value
            return logits

    data = written([0, 1, 2], [0, 1, 2])
    pushed = Returns(lambda x: x + torch.tensor([0, 0, 0.5]).view(3, 1, 1, 1))
    with pytest.raises(NonFiniteError, match="NaN or infinity under odd"):
        evaluate(Fails(), data, epsilon=0.5, attacks=[pushed])
    assert evaluate(Fails(), data, epsilon=0.0, attacks=[pushed]).robust.all()


def test_an_attack_that_raises_leaves_the_network_as_it_was():
    def fails(x):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        raise Stop

    model = absld.build_model("convnet", C, "test").train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    data = absld.InMemoryImages(draw.images(0, 3), torch.arange(3), NAMES)
    said = [row for row in evaluate(model, data, epsilon=0.1, attacks=()).predictions]
    data = replace(data, labels=said[0])
    with pytest.raises(Stop):
        evaluate(model, data, epsilon=0.1, attacks=[Returns(fails)])
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.requires_grad for parameter in model.parameters())


# --- Going on ---


@pytest.mark.parametrize("each", [False, True])
def test_going_on_is_the_same_with_random_numbers_of_batches_too(each, double_precision):
    """A search draws for a whole batch; stopped after every batch there is."""
    model, x = network(), draw.images(1, 14)
    labels = model(x).argmax(1)
    labels[::5] = (labels[::5] + 1) % C
    data = absld.InMemoryImages(x, labels, NAMES)
    settings = {
        "epsilon": 0.1,
        "attacks": [
            SquareSearch("search", 4, restarts=2),
            *absld.evaluation.attacks.parse_attacks("pgd2", C, 2),
        ],
        "examples": 11,
        "batch_size": 3,
        "each": each,
        "seed": 5,
    }
    batches = []
    whole = evaluate(model, data, on_batch=lambda *given: batches.append(given[0]), **settings)
    assert len(batches) >= 8 and (whole.correct.sum(1).diff() < 0).any()
    for after in range(1, len(batches) + 1):
        with pytest.raises(Stop) as stopped:
            evaluate(model, data, on_batch=stops(after), **settings)
        before = stopped.value.args[0]
        given, rest = before.clone(), []
        resumed = evaluate(
            model, data, before=before, on_batch=lambda *g, rest=rest: rest.append(g[0]), **settings
        )
        assert torch.equal(resumed.predictions, whole.predictions)
        assert torch.equal(before, given)  # it is not written to
        assert rest == batches[after:]  # progress, too, is as if nothing had been


def test_who_has_everything_does_nothing():
    world = ([0, 1, 2], [0, 1, 2], [[[0, 1, 0]]])
    whole = run(world, attacks_of(world))
    attacks = attacks_of(world)
    again = run(world, attacks, before=whole.predictions, on_batch=stops(1))
    assert torch.equal(again.predictions, whole.predictions) and not attacks[0].attacked


# --- Progress ---


@pytest.mark.parametrize(
    "each",
    [
        False,
        True,
    ],
)
def test_progress_by_hand(each):
    """Five images, one wrong when clean; the first attack costs 2 and breaks two, the second costs
    5 with two restarts. A clean image costs a third."""
    labels = [0, 1, 2, 0, 1]
    attacks = [Writes("one", [[0, 0, 0, 0, 1]], 2.0), Writes("two", [labels, labels], 5.0)]
    seen = []
    run(
        (labels, [1, 1, 2, 0, 1], None),
        attacks,
        each=each,
        batch_size=2,
        on_batch=lambda progress, _: seen.append(progress),
    )
    clean, one, two = 5 / 3, 4 * 2, (4 if each else 2) * 10
    expected = [
        # After two clean images one is known to be wrong, so four are to be attacked.
        ("clean", 2, 5, 2 / 3, clean + 4 * 2 + 4 * 10),
        ("clean", 4, 5, 4 / 3, clean + 4 * 2 + 4 * 10),
        ("clean", 5, 5, clean, clean + 4 * 2 + 4 * 10),
        # Images 1 and 2 are broken, which the second attack need not try, unless it must.
        ("one", 2, 4, clean + 4, clean + one + two),
        ("one", 4, 4, clean + one, clean + one + two),
    ]
    steps = 2 if each else 1
    for k in range(1, steps + 1):
        done = two / steps * k
        expected.append(("two", 2 * k, 2 * steps, clean + one + done, clean + one + two))
    assert [(*progress[:3], *progress[3]) for progress in seen] == [
        (name, done, total, pytest.approx(cost), pytest.approx(whole))
        for name, done, total, cost, whole in expected
    ]


@given(worlds(), st.booleans(), st.integers(1, 5))
def test_progress_never_goes_back(world, each, batch_size):
    seen = []
    run(
        world,
        attacks_of(world),
        each=each,
        batch_size=batch_size,
        on_batch=lambda progress, evaluation: seen.append((progress, evaluation)),
    )
    costs = [progress.cost for progress, _ in seen]
    for progress, evaluation in seen:
        assert 0 < progress.done <= progress.total
        assert progress.attack in evaluation.attacks
    assert all(a[0] < b[0] and a[1] >= b[1] - 1e-9 for a, b in itertools.pairwise(costs))
    assert costs[-1][0] == pytest.approx(costs[-1][1])
    assert (seen[-1][1].predictions != PENDING).all()


# --- Examples ---


def test_fewer_examples_than_classes_are_of_different_classes():
    data = written([0] * 30, [k % C for k in range(30)])
    for seed in range(5):
        found = evaluate(Reader(), data, epsilon=0.1, attacks=(), examples=2, seed=seed)
        assert len(found.labels.unique()) == 2
        assert torch.equal(found.labels, data.labels[found.index])
        assert sum(map(math.isnan, found.clean_accuracy.tolist())) == 1
    chosen = {
        tuple(evaluate(Reader(), data, epsilon=0.1, attacks=(), examples=9, seed=s).index.tolist())
        for s in range(5)
    }
    assert len(chosen) == 5  # the seed decides


def test_attacks_are_told_budget_seed_and_restart():
    told = []

    class Listens(Writes):
        def perturb(self, model, batch):
            told.append((batch.restart, batch.epsilon, batch.seed))
            return super().perturb(model, batch)

    labels = [0, 1, 2]
    attack = Listens("listens", [labels, labels])
    run((labels, labels, None), [attack], epsilon=0.07, seed=5)
    assert told == [(restart, 0.07, 5) for restart in (0, 1)]


def test_attacks_know_images_by_their_number_in_the_set():
    labels = [k % C for k in range(30)]
    world = (labels, labels, [[labels]])
    attacks = attacks_of(world)
    found = run(world, attacks, examples=7, batch_size=3)
    assert [number for _, number in attacks[0].attacked] == found.index.tolist()
    assert found.robust.all()


# --- Figures ---


def seen_by(said, labels, each=True):
    """An evaluation of the reader, of which this was said: rows clean, then one attack each."""
    clean, *attacked = said
    attacks = [Writes(f"attack {k}", [row]) for k, row in enumerate(attacked)]
    return run((labels, clean, None), attacks, each=each)


@pytest.mark.parametrize(
    "right",
    [(20, 21, 3), (20, 30, 9), (10, 1, 0), (19, 29, 10)],
    ids=["middle", "high", "NSD above 1", "all alike"],
)
def test_metrics_are_of_the_classes_with_the_bootstrap_of_the_seed(right):
    sizes, labels, said = (20, 30, 10), [], []
    for k, (size, of_these) in enumerate(zip(sizes, right, strict=True)):
        labels += [k] * size
        said += [k] * of_these + [(k + 1) % C] * (size - of_these)
    found = replace(seen_by([said], labels), seed=7)
    result = found.metrics(found.robust)
    expected = oracles.metrics([k / n for k, n in zip(right, sizes, strict=True)])
    random = absld.seeding.generator("bootstrap", 7)
    replicates = resample(found.robust[None], found.labels, random)[:, 0]
    for name, (value, low, high) in result.items():
        assert value == pytest.approx(expected[name])
        assert 0 <= low <= value <= high
        plain = bootstrap(value, METRICS[name](replicates))
        assert low == pytest.approx(max(plain.low, 0.0))
        if name == "normalized_std":
            assert high == pytest.approx(plain.high)
        else:
            assert high == pytest.approx(min(plain.high, 1.0))
    if right == (10, 1, 0):
        assert result["normalized_std"].high > result["normalized_std"].value > 1


def test_differences_by_hand():
    """Clean 1 and 1 against 3/4 and 1; robust 1/2 and 3/4 against 1/4 and 1/2. Enough images that
    no resampled worst class is 0."""
    labels = 30 * ([0] * 4 + [1] * 4)
    ours = seen_by([30 * [0, 0, 0, 0, 1, 1, 1, 1], 30 * [0, 0, 1, 1, 1, 1, 1, 0]], labels)
    theirs = seen_by([30 * [0, 0, 0, 1, 1, 1, 1, 1], 30 * [0, 1, 1, 1, 1, 1, 0, 0]], labels)
    found = paired_differences(ours, theirs)
    assert found.clean["average"].value == pytest.approx(1 / 8)
    assert found.clean["gap"].value == pytest.approx(-1 / 4)
    assert found.robust["average"].value == pytest.approx(5 / 8 - 3 / 8)
    assert found.robust["worst"].value == pytest.approx(1 / 2 - 1 / 4)
    assert found.robust["gap"].value == pytest.approx(0)
    assert found.rho.value == pytest.approx((1 / 2 - 1 / 4) / (1 / 4) + (5 / 8 - 3 / 8) / (3 / 8))
    for each in (*found.clean.values(), *found.robust.values(), found.rho):
        assert each.low <= each.value <= each.high


@pytest.mark.parametrize(
    "times",
    [
        1,
        20,
    ],
)
def test_of_itself_there_is_no_difference(times):
    labels = times * ([0] * 6 + [1] * 6)
    ours = seen_by([times * [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0]], labels)
    found = paired_differences(ours, ours)
    zero = (0.0, 0.0, 0.0)
    assert {tuple(each) for each in (*found.clean.values(), *found.robust.values())} == {zero}
    assert tuple(found.rho) == zero


def test_intervals_of_differences_are_of_pairs():
    """Two networks that are apart in one image of 200, and right in half of the others: resampled
    apart from one another, the difference would be uncertain by ten points."""
    labels = [0, 1] * 100
    said = [k % 4 // 2 for k in range(200)]
    ours, theirs = (seen_by([[first, *said[1:]]], labels) for first in (0, 1))
    for found in (
        paired_differences(ours, theirs).robust["average"],
        paired_differences(ours, theirs).clean["average"],
    ):
        assert found.value == pytest.approx(1 / 200)
        # The image is drawn 5 times or more once in 270; 2.5 % lie above 3 and below 0.
        assert -2 / 200 - 1e-9 <= found.low <= found.high <= 2 / 200 + 1e-9


@pytest.mark.parametrize("change", ["index", "labels", "fewer"])
def test_networks_on_other_images_are_refused(change):
    ours = seen_by([[0, 1, 2]], [0, 1, 2])
    theirs = {
        "index": replace(ours, index=ours.index + 1),
        "labels": replace(ours, labels=ours.labels.flip(0)),
        "fewer": seen_by([[0, 1]], [0, 1]),
    }[change]
    for pair in ((ours, theirs), (theirs, ours)):
        with pytest.raises(UsageError, match="not evaluated on the same images") as caught:
            paired_differences(*pair)
        assert "--examples" in caught.value.hint
