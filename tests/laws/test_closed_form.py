"""The robust accuracy of a linear classifier has a closed form, and every attack reaches it."""

import pytest
import torch
from helpers.linear import sample

import absld
from absld.evaluation.attacks import SquareSearch, autoattack_parts

NAMES = ["fgsm", "pgd20", "pgd20-sat", "cw30"]


def is_robust(model, data, epsilon):
    """Closed form (N,): no wrong class can overtake the true one, inside the ball and the box."""
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
def test_every_attack_reaches_the_closed_form_of_two_classes(name, epsilon, double_precision):
    model, data = sample(3, 2)
    evaluation = absld.evaluate(model, data, epsilon=epsilon, attacks=name)
    expected = is_robust(model, data, epsilon)
    assert torch.equal(evaluation.robust, expected)
    if epsilon == 0.05:
        assert 0.1 < expected.double().mean() < 0.8


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("epsilon", [0.01, 0.03, 0.1])
def test_attacks_together_reach_the_closed_form_of_several_classes(
    classes, epsilon, double_precision
):
    """The margin towards another class may be beyond the nearest one: the attacks together."""
    model, data = sample(1, classes)
    evaluation = absld.evaluate(
        model, data, epsilon=epsilon, attacks="pgd20-sat,cw30,cw200", restarts=5
    )
    assert torch.equal(evaluation.robust, is_robust(model, data, epsilon))


@pytest.mark.parametrize(
    ("part", "classes"),
    [(part, classes) for classes in (2, 3, 4) for part in autoattack_parts(classes)],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_part_of_autoattack_reaches_the_closed_form(part, classes):
    pytest.importorskip("pyautoattack")
    model, data = sample(5, classes, n=30, dtype=torch.float32)
    evaluation = absld.evaluate(model, data, epsilon=0.04, attacks=[part])
    expected = is_robust(model, data, 0.04)
    assert 5 <= int(expected.sum()) <= 25
    assert not (expected & ~evaluation.robust).any()
    missed = int((evaluation.robust & ~expected).sum())
    assert missed <= (4 if part.name == "square" else 0)  # a search at random finds most


@pytest.mark.parametrize("classes", [2, 4])
def test_autoattack_as_a_whole_reaches_the_closed_form(classes):
    pytest.importorskip("pyautoattack")
    model, data = sample(6, classes, n=30, dtype=torch.float32)
    evaluation = absld.evaluate(model, data, epsilon=0.04, attacks="autoattack")
    assert torch.equal(evaluation.robust, is_robust(model, data, 0.04))


def test_a_search_without_gradients_nearly_reaches_the_closed_form(double_precision):
    model, data = sample(3, 2)
    search = SquareSearch("search", queries=400)
    evaluation = absld.evaluate(model, data, epsilon=0.05, attacks=[search])
    missed = evaluation.robust & ~is_robust(model, data, 0.05)
    assert int(missed.sum()) <= 2
