"""Do the probabilities of a classifier mean what they say? Of clean images, in [0,1] and nats."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BINS = 15


class Calibration(NamedTuple):
    """How sure a classifier is, and how often it is right.

    accuracy, confidence: means, of being right and of the greatest probability. error: expected
    calibration error over 15 bins of equal width. entropy, nll: means, in nats. temperature: what
    the logits would be divided by for the least nll; above 1 means too sure, below 1 too unsure.
    """

    accuracy: float
    confidence: float
    error: float
    entropy: float
    nll: float
    temperature: float


def calibration(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Calibration:
    """The calibration of logits against the labels. Source: decided here."""
    logits = logits.double()
    probabilities = F.softmax(logits, dim=1)
    confidence, said = probabilities.max(1)
    return Calibration(
        accuracy=(said == labels).double().mean().item(),
        confidence=confidence.mean().item(),
        error=expected_calibration_error(confidence, said == labels),
        entropy=entropies(logits).mean().item(),
        nll=F.cross_entropy(logits, labels).item(),
        temperature=best_temperature(logits, labels),
    )


def entropies(logits: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """The entropy of each image's soft label, in nats: 0 is one-hot, log C is uniform."""
    log_p = F.log_softmax(logits, dim=1)
    return -(log_p.exp() * log_p).sum(1)


def expected_calibration_error(confidence: Float[Tensor, " n"], right: Tensor) -> float:
    """The mean over images of |accuracy - confidence| of their bin."""
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.float64)
    gap.scatter_add_(0, bins, right.double() - confidence.double())
    return gap.abs().sum().item() / len(confidence)


def best_temperature(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> float:
    """The temperature in [1/20, 20] of the least cross-entropy, which is convex in its inverse."""
    from scipy.optimize import minimize_scalar

    def nll(log_inverse: float) -> float:
        return F.cross_entropy(logits * math.exp(log_inverse), labels).item()

    found = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded")
    return math.exp(-float(found.x))
