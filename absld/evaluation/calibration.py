"""Calibration: whether a classifier is as often correct as it is confident, on clean images."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.dataset import ImageSet, pixels

BINS = 15


class Calibration(NamedTuple):
    """Calibration of a classifier. Source: Guo et al. 2017 (arXiv 1706.04599).

    accuracy; confidence: mean greatest probability; error: expected calibration error over 15 bins
    of equal width, all in [0,1]. entropy, nll: means in nats. temperature: divisor of the logits
    with the least nll; above 1 means overconfident, below 1 underconfident.
    """

    accuracy: float
    confidence: float
    error: float
    entropy: float
    nll: float
    temperature: float


def compute_logits(model: nn.Module, data: ImageSet, batch_size: int) -> Tensor:
    """Compute logits (N,C) of clean images, on the CPU."""
    with frozen_eval(model), torch.no_grad():
        parts = [model(pixels(images)).cpu() for images, _ in data.batches(batch_size)]
    return torch.cat(parts)


def calibration(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Calibration:
    """Compute the calibration of logits against the labels."""
    logits = logits.double()
    confidence, predictions = F.softmax(logits, dim=1).max(1)
    correct = predictions == labels
    return Calibration(
        accuracy=correct.double().mean().item(),
        confidence=confidence.mean().item(),
        error=expected_calibration_error(confidence, correct),
        entropy=entropies(logits).mean().item(),
        nll=F.cross_entropy(logits, labels).item(),
        temperature=best_temperature(logits, labels),
    )


def entropies(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Compute the entropy of each soft label in nats: 0 for one-hot, log C for uniform."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


def expected_calibration_error(
    confidence: Float[Tensor, " n"], correct: Bool[Tensor, " n"]
) -> float:
    """Compute the mean over images of |accuracy - confidence| of their bin."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64)
    gap.scatter_add_(0, bins, correct.double() - confidence.double())
    return gap.abs().sum().item() / len(confidence)


def best_temperature(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """Find the temperature in [1/20, 20] with the least nll, which is convex in its inverse."""
    from scipy.optimize import minimize_scalar

    def nll(log_inverse: float) -> float:
        return F.cross_entropy(logits * math.exp(log_inverse), labels).item()

    optimum = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded")
    return math.exp(-float(optimum.x))
