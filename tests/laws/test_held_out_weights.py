"""The class weights of WAT and FRL, from figures of held-out images."""

import math

import pytest
import torch
from helpers import strategies as draw
from hypothesis import given
from hypothesis import strategies as st

from absld.config.settings import TrainConfig
from absld.methods import build_method
from absld.methods.held_out import (
    cost_sensitive_weights,
    hedge_weights,
    raise_multipliers,
)
from absld.metrics import class_sums

NAN, INF = math.nan, math.inf
fractions = st.floats(0, 1)


def classes_of(values):
    return st.lists(values, min_size=2, max_size=8).map(
        lambda numbers: torch.tensor(numbers, dtype=draw.DTYPE)
    )


@given(classes_of(st.floats(0, 1e4)), st.floats(0, 100))
def test_hedge_weights_sum_to_the_number_of_classes_and_depend_on_differences(costs, shift):
    weights = hedge_weights(costs, 0.1)
    assert weights.sum().item() == pytest.approx(len(costs) - 1)
    assert (weights[costs.argsort(stable=True)].diff() >= 0).all(), "a larger cost weighs no less"
    torch.testing.assert_close(hedge_weights(costs + shift, 0.1), weights, rtol=1e-6, atol=1e-9)


@given(classes_of(fractions), classes_of(fractions), fractions)
def test_multipliers_are_in_their_simplex_and_rise_where_a_class_errs_more(old, errors, overall):
    size = min(len(old), len(errors))
    old, errors = old[:size] / size, errors[:size]
    error = torch.tensor(overall, dtype=draw.DTYPE)  # of all images
    new = raise_multipliers(old, errors, error, rate=0.05, slack=0.1, most=0.5)
    plain = [
        max(0.0, m + 0.05 * (e - overall - 0.1))
        for m, e in zip(old.tolist(), errors.tolist(), strict=True)
    ]
    if sum(plain) > 0.5:
        plain = [0.5 * m / sum(plain) for m in plain]
    assert new.tolist() == pytest.approx(plain, rel=1e-6, abs=1e-9)
    weights = cost_sensitive_weights(new)
    assert weights.sum().item() == pytest.approx(1) and (weights > 0).all()


@pytest.mark.parametrize("absent", [[1], [0, 1, 2]])
def test_a_class_without_held_out_images_moves_as_the_rest(absent):
    """By the mean's cost, with WAT; not at all, with FRL; nothing is NaN without any image."""
    seen = torch.tensor([k for k in range(3) if k not in absent], dtype=torch.long)
    values = torch.arange(len(seen)).float()
    sums = class_sums(values, seen, 3)
    wat, frl = (build_method(TrainConfig(method=name), 3) for name in ("wat", "frl"))
    wat.cost.add(*sums)
    wat.end_epoch(0.1)
    mean = 0.5 if len(seen) else 0.0
    costs = [0.0, 0.5, 1.0] if len(seen) else [0.0] * 3
    assert wat.total_costs.tolist() == [*costs, mean]
    frl.clean_error.add(*sums)
    report = frl.end_epoch(0.1)
    moved = [0.0, 0.0, 0.05 * (0.5 - 0.1)] if len(seen) else [0.0] * 3
    assert frl.multipliers[0].tolist() == pytest.approx(moved)
    assert frl.multipliers[1].tolist() == [0.0] * 3
    assert report["clean_error"].isnan().sum() == len(absent)


def test_an_infinite_cost_is_the_largest_that_counts():
    """Or the sum of costs would be infinite for ever, and the weights NaN."""
    wat = build_method(TrainConfig(method="wat"), 3)
    for _ in range(2):
        wat.cost.add(torch.tensor([INF, 1.0, 1.0]), torch.ones(3, dtype=torch.long))
        weights = wat.end_epoch(0.1)["class_weight"]
    assert weights.isfinite().all() and weights[0] == weights.max()
    # The mean is infinite, too, and shares the weight with the class.
    assert weights.tolist() == pytest.approx([3.0, 1.5, 1.5])
