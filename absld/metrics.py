"""What is said of the accuracies of the classes, and how sure it is. Accuracies are in [0,1]."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Fairness(NamedTuple):
    """Average and worst class accuracy, and NSD: their standard deviation over their mean."""

    average: float
    worst: float
    normalized_std: float


def class_hits(
    predicted: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> Int[Tensor, " c"]:
    """Per class, the number of images that were predicted right; adds up over batches."""
    return labels[predicted == labels].bincount(minlength=num_classes)


def fairness(class_accuracy: Float[Tensor, " c"], ddof: int = 0) -> Fairness:
    """Average, worst and normalized_std of class accuracies, where NaN is a class with no image.

    `ddof=0` is the standard deviation of the population, 1 of a sample. If all accuracies are 0,
    normalized_std is 0. Source: spec, Evaluation.
    """
    accuracy = present(class_accuracy)
    nsd = normalized_std(accuracy, ddof)
    return Fairness(accuracy.mean().item(), accuracy.min().item(), nsd.item())


def worst_tenth(class_accuracy: Float[Tensor, " c"]) -> float:
    """Mean accuracy of the worst 10 % of the classes, at least one. Source: spec, Evaluation."""
    return METRICS["worst_tenth"](present(class_accuracy)).item()


def present(class_accuracy: Float[Tensor, " c"]) -> Float[Tensor, " p"]:
    """The accuracies of the classes that have images, in float64 on the CPU."""
    return class_accuracy[~class_accuracy.isnan()].cpu().double()


def normalized_std(accuracy: Tensor, ddof: int = 0) -> Tensor:
    """Standard deviation over mean of accuracies (...,C); 0 where all are 0."""
    return accuracy.std(-1, correction=ddof) / accuracy.mean(-1).clamp_min(1e-12)


# Each takes accuracies (...,C) to (...), so that it takes thousands of resampled sets at once.
METRICS: dict[str, Callable[[Tensor], Tensor]] = {
    "average": lambda accuracy: accuracy.mean(-1),
    "worst": lambda accuracy: accuracy.amin(-1),
    "worst_tenth": lambda accuracy: (
        accuracy.sort(-1).values[..., : max(1, accuracy.shape[-1] // 10)].mean(-1)
    ),
    "gap": lambda accuracy: accuracy.amax(-1) - accuracy.amin(-1),
    "normalized_std": normalized_std,
}
"""Name -> what it says of class accuracies (...,C): their mean; the least; the mean of the worst
10 % of the classes; best minus worst; population standard deviation over mean (NSD)."""


def rho(ours: Tensor, base: Tensor) -> Tensor:
    """How much better class accuracies (...,C) are than a baseline's: the sum of the relative gains
    in worst class and average (...).

    A gain over 0 is infinite; where there is none, it is 0. Source: spec, peers.
    """

    def gain(metric: Callable[[Tensor], Tensor]) -> Tensor:
        mine, theirs = metric(ours), metric(base)
        return torch.where(mine == theirs, 0.0, (mine - theirs) / theirs)

    return gain(METRICS["worst"]) + gain(METRICS["average"])


# --- Uncertainty ---


def class_sums(
    values: Float[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> tuple[Float[Tensor, " c"], Int[Tensor, " c"]]:
    """Per class: the sum of the values of its images, and the number of images. Both add up over
    batches, in any order."""
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)
    return torch.where(member, values.unsqueeze(1), 0).sum(0), member.sum(0)


class ClassMean:
    """The mean of each class over an epoch. sums (C,) in float; counts (C,): images."""

    def __init__(self, num_classes: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.sums = torch.zeros(num_classes, dtype=dtype)
        self.counts = torch.zeros(num_classes, dtype=torch.long)

    def add(self, sums: Float[Tensor, " c"], counts: Int[Tensor, " c"]) -> None:
        """Add a batch; the state follows it to its device."""
        self.sums = self.sums.to(sums.device) + sums.to(self.sums.dtype)
        self.counts = self.counts.to(counts.device) + counts

    def mean(self) -> Float[Tensor, " c"]:
        """The mean of each class; NaN for a class that was not seen."""
        mean = self.sums / self.counts
        # A NaN that was observed is no absence.
        return mean.masked_fill((self.counts > 0) & mean.isnan(), torch.inf)

    def reset(self) -> None:
        """Start the next epoch."""
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)


class ClassAccuracies(NamedTuple):
    """Accuracy of each class (C,) in [0,1]; NaN for a class without images."""

    clean: Float[Tensor, " c"]
    robust: Float[Tensor, " c"]
