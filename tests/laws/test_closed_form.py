"""The robust accuracy of a linear classifier has a closed form, and every attack reaches it."""

import pytest
import torch
from helpers.linear import sample

import absld
from absld.evaluation.attacks import SquareSearch, autoattack_parts

NAMES = ["fgsm", "pgd20", "pgd20-sat", "cw30"]


def strongest(x, direction, epsilon, norm):
    """Images (N,P) in ball and box that are farthest in a direction (N,P)."""
    if norm == "linf":
        return torch.where(direction > 0, x + epsilon, x - epsilon).clamp(0, 1)
    # Along the direction, pixels stop at the box; the length grows to epsilon, if it gets there.
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), 1e3, dtype=x.dtype)
    for _ in range(200):
        middle = (low + high) / 2
        short = ((x + middle * direction).clamp(0, 1) - x).norm(dim=1, keepdim=True) < epsilon
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    return (x + low * direction).clamp(0, 1)


def is_robust(model, data, epsilon, norm="linf"):
    """Closed form (N,): no wrong class can overtake the true one, inside the ball and the box."""
    x, weight, bias = data.images.flatten(1), model.weight.detach(), model.bias.detach()
    robust = torch.ones(len(x), dtype=torch.bool)
    for k in range(len(bias)):
        direction = weight[k] - weight[data.labels]
        most = strongest(x, direction, epsilon, norm)
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


@pytest.mark.parametrize("classes", [2, 4])
def test_gradient_attacks_of_autoattack_reach_the_closed_form_in_the_l2_norm(classes):
    """Together; the images are too small for its search."""
    pytest.importorskip("pyautoattack")
    model, data = sample(6, classes, n=30, dtype=torch.float32)
    parts = [part for part in autoattack_parts(classes) if part.name != "square"]
    evaluation = absld.evaluate(model, data, epsilon=0.2, norm="l2", attacks=parts)
    expected = is_robust(model, data, 0.2, "l2")
    assert torch.equal(evaluation.robust, expected) and 5 <= int(expected.sum()) <= 25


@pytest.mark.parametrize(("norm", "epsilon", "most"), [("linf", 0.05, 2), ("l2", 0.1, 2)])
def test_a_search_without_gradients_nearly_reaches_the_closed_form(
    norm, epsilon, most, double_precision
):
    model, data = sample(3, 2)
    search = SquareSearch("search", queries=400)
    evaluation = absld.evaluate(model, data, epsilon=epsilon, norm=norm, attacks=[search])
    expected = is_robust(model, data, epsilon, norm)
    assert not (expected & ~evaluation.robust).any()
    assert int((evaluation.robust & ~expected).sum()) <= most


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("epsilon", [0.1, 0.2, 0.5])
def test_attacks_in_the_l2_norm_reach_the_closed_form(classes, epsilon, double_precision):
    """Each breaks no robust image; together they break all others, but for one near the border:
    the box comes after the ball, so a step of finite size ends a little inside of the ball."""
    model, data = sample(1, classes)
    expected = is_robust(model, data, epsilon, "l2")
    robust = torch.ones_like(expected)
    for name in ("fgsm", "pgd20", "pgd20-sat", "cw30", "cw200"):
        found = absld.evaluate(model, data, epsilon=epsilon, norm="l2", attacks=name).robust
        assert not (expected & ~found).any(), name
        assert int((found & ~expected).sum()) <= (8 if name == "fgsm" else 2), name
        robust &= found
    assert int((robust & ~expected).sum()) <= 1 and 1 <= int(expected.sum()) < 70
