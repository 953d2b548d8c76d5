"""Calibration of soft labels against plain Python, and its laws."""

import math

import pytest
import torch
from helpers import oracles
from helpers import strategies as draw
from hypothesis import example, given

from absld.evaluation.calibration import BINS, best_temperature, calibration, entropies


def by_hand(logits, labels):
    rows = [oracles.softmax(row) for row in logits.tolist()]
    right = [
        max(range(len(row)), key=row.__getitem__) == y for row, y in zip(rows, labels, strict=True)
    ]
    bins = {}
    for row, hit in zip(rows, right, strict=True):
        bins.setdefault(min(int(max(row) * BINS), BINS - 1), []).append((hit, max(row)))
    n = len(rows)
    return {
        "accuracy": sum(right) / n,
        "confidence": sum(map(max, rows)) / n,
        "error": sum(abs(sum(h - c for h, c in own)) for own in bins.values()) / n,
        "entropy": sum(-sum(p * math.log(p) for p in row if p) for row in rows) / n,
        "nll": -sum(
            oracles.log_softmax(row)[y] for row, y in zip(logits.tolist(), labels, strict=True)
        )
        / n,
    }


@given(draw.labelled(bound=5.0))
@example((torch.zeros(3, 4, dtype=draw.DTYPE), torch.tensor([0, 1, 3]), None))
def test_calibration_is_the_formula(given):
    logits, labels, _ = given
    found = calibration(logits, labels)._asdict()
    expected = by_hand(logits, labels.tolist())
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    assert 0 <= found["error"] <= 1 and 1 / 20 <= found["temperature"] <= 20


def test_the_best_temperature_undoes_a_factor():
    """Labels drawn from the probabilities are best told by them; times 3, by a third of that."""
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(40000, 4, generator=random, dtype=draw.DTYPE)
    labels = torch.multinomial(logits.softmax(1), 1, generator=random).squeeze(1)
    assert best_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert best_temperature(3 * logits, labels) == pytest.approx(3, abs=0.1)
    assert best_temperature(logits / 4, labels) == pytest.approx(0.25, abs=0.01)
    assert calibration(logits, labels).error < 0.02
    assert calibration(4 * logits, labels).error > 0.1


def test_entropies_of_known_labels():
    one_hot = torch.tensor([[200.0, 0, 0]], dtype=draw.DTYPE)
    assert entropies(one_hot).item() == pytest.approx(0, abs=1e-12)
    assert entropies(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
