"""On a linear classifier robust accuracy has a closed form, and every attack reaches it."""

import pytest
import torch
from torch import nn

import absld
from absld.evaluation.attacks import AutoAttackPart, SquareSearch, parse_attack, parse_attacks
from absld.evaluation.autoattack import parts

SIDE = 4
NAMES = ["fgsm", "pgd20", "pgd20-sat", "cw30"]


class Linear(nn.Module):
    """Logits W x + b of images (N,3,4,4), in float64 or float32."""

    def __init__(self, classes, seed, dtype):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=random, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(classes, dtype=dtype))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def sample(seed, classes, n=80, dtype=torch.float64):
    """Images with many pixels at the ends of the box, and any labels."""
    random = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, 3, SIDE, SIDE, generator=random, dtype=dtype) * 1.6 - 0.3).clamp(0, 1)
    model = Linear(classes, seed, dtype)
    with torch.no_grad():
        # Centred, so that about all classes occur and the margins are small.
        model.bias -= model(images).mean(0)
        labels = model(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % classes  # and some are wrong from the start
    names = tuple(map(str, range(classes)))
    return model, absld.ImageSet(images, labels, names)


def withstands(model, data, epsilon):
    """In closed form: no wrong class can overtake the true one, inside the ball and the box."""
    x, weight, bias = data.images.flatten(1), model.weight.detach(), model.bias.detach()
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    robust = torch.ones(len(x), dtype=torch.bool)
    for k in range(len(bias)):
        direction = weight[k] - weight[data.labels]
        most = torch.where(direction > 0, high, low)
        gain = (direction * most).sum(1) + bias[k] - bias[data.labels]
        robust &= (gain < 0) | (data.labels == k)
    return robust


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epsilon", [0.0, 0.01, 0.05, 0.3])
def test_two_classes(name, epsilon):
    model, data = sample(3, 2)
    evaluation = absld.evaluate(model, data, epsilon=epsilon, attacks=name)
    expected = withstands(model, data, epsilon)
    assert torch.equal(evaluation.withstood, expected)
    if epsilon == 0.05:
        assert 0.1 < expected.double().mean() < 0.8


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.1])
def test_several_classes(classes, epsilon):
    """The margin towards another class may be beyond the nearest one: the attacks together."""
    model, data = sample(1, classes)
    evaluation = absld.evaluate(
        model, data, epsilon=epsilon, attacks="pgd20-sat,cw30,cw200", restarts=5
    )
    assert torch.equal(evaluation.withstood, withstands(model, data, epsilon))


@pytest.mark.parametrize(
    ("part", "classes"), [(part, classes) for classes in (2, 3, 4) for part in parts(classes)]
)
def test_autoattack(part, classes):
    pytest.importorskip("pyautoattack")
    model, data = sample(5, classes, n=30, dtype=torch.float32)
    evaluation = absld.evaluate(model, data, epsilon=0.04, attacks=[AutoAttackPart(part)])
    expected = withstands(model, data, 0.04)
    assert 5 <= int(expected.sum()) <= 25
    assert not (expected & ~evaluation.withstood).any()
    missed = int((evaluation.withstood & ~expected).sum())
    assert missed <= (4 if part == "square" else 0)  # a search at random finds most


@pytest.mark.parametrize("classes", [2, 4])
def test_autoattack_as_a_whole(classes):
    pytest.importorskip("pyautoattack")
    model, data = sample(6, classes, n=30, dtype=torch.float32)
    evaluation = absld.evaluate(model, data, epsilon=0.04, attacks="autoattack")
    assert torch.equal(evaluation.withstood, withstands(model, data, 0.04))


def test_a_search_without_gradients_reaches_it_nearly():
    model, data = sample(3, 2)
    search = SquareSearch("search", queries=400)
    evaluation = absld.evaluate(model, data, epsilon=0.05, attacks=[search])
    missed = evaluation.withstood & ~withstands(model, data, 0.05)
    assert int(missed.sum()) <= 2


def test_the_names_mean_what_this_field_means_by_them():
    scale = 8 / 255
    found = {name: parse_attack(name) for name in [*NAMES, "pgd7", "cw100"]}
    steps = {name: (attack.steps, attack.step_size * scale) for name, attack in found.items()}
    assert steps == {
        "fgsm": (1, pytest.approx(8 / 255)),
        "pgd20": (20, pytest.approx(0.003)),
        "pgd20-sat": (20, pytest.approx(2 / 255)),
        "cw30": (30, pytest.approx(2 / 255)),
        "pgd7": (7, pytest.approx(0.003)),
        "cw100": (100, pytest.approx(2 / 255)),
    }
    assert [found[name].uniform_start for name in NAMES] == [False, True, True, False]
    assert [found[name].objective for name in NAMES[2:]] == ["cross-entropy", "margin"]
    attacks = parse_attacks(" clean, PGD20 ,cw30", 10, restarts=3)
    assert [(a.name, a.restarts) for a in attacks] == [("pgd20", 3), ("cw30", 3)]
    assert parse_attacks("fgsm", 10, restarts=3)[0].restarts == 1


@pytest.mark.parametrize("name", ["pgd", "pgd0", "pgd-5", "cw30-sat", "fgsm2", "apgd-ce", "x"])
def test_other_names_are_refused(name):
    with pytest.raises(absld.UsageError, match="no attack"):
        parse_attacks(f"fgsm,{name}", 10)


def test_autoattack_is_its_parts_and_few_classes_have_fewer():
    pytest.importorskip("pyautoattack")
    named = {c: [a.name for a in parse_attacks("autoattack", c)] for c in (2, 3, 4, 10)}
    assert named[10] == named[4] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert named[2] == named[3] == ["apgd-ce", "fab-t", "square"]
