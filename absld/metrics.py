"""Figures per class: sums and means over classes, and fairness metrics of class accuracies.

Accuracies are in [0,1]; a class without images has NaN.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from absld.shapes import check_shape


class ClassAccuracies(NamedTuple):
    """Accuracy of each class (C,) in [0,1]; NaN for a class without images."""

    clean: Float[Tensor, " c"]
    robust: Float[Tensor, " c"]


class Fairness(NamedTuple):
    """Average and worst class accuracy, and NSD: their standard deviation over their mean."""

    average: float
    worst: float
    normalized_std: float


def class_hits(
    predictions: Int[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> Int[Tensor, " c"]:
    """Count the correct predictions of each class; counts of batches add up."""
    check_shape("predictions", predictions, len(labels))
    return class_sums((predictions == labels).long(), labels, num_classes)[0]


def fairness(class_accuracy: Float[Tensor, " c"], ddof: int = 0) -> Fairness:
    """Compute average, worst and normalized_std of class accuracies.

    Args:
        class_accuracy: (C,) in [0,1]; NaN for a class without images, which does not count.
        ddof: 0 for the standard deviation of the population (the paper's NSD), 1 of a sample.

    Returns:
        The three figures; normalized_std is 0 if all accuracies are 0. Source: arXiv 2312.05508.

    Raises:
        ValueError: for another shape, or if no class has images.
    """
    accuracy = present(class_accuracy)
    nsd = normalized_std(accuracy, ddof)
    return Fairness(accuracy.mean().item(), accuracy.min().item(), nsd.item())


def worst_tenth(class_accuracy: Float[Tensor, " c"]) -> float:
    """Compute the mean accuracy of the worst 10 % of the classes, at least one class."""
    return METRICS["worst_tenth"](present(class_accuracy)).item()


def present(class_accuracy: Float[Tensor, " c"]) -> Float[Tensor, " p"]:
    """Return the accuracies of the classes that have images, in float64 on the CPU."""
    check_shape("class_accuracy", class_accuracy, "C")
    accuracy = class_accuracy[~class_accuracy.isnan()].cpu().double()
    if not len(accuracy):
        raise ValueError("no class has images")
    return accuracy


def normalized_std(accuracy: Tensor, ddof: int = 0) -> Tensor:
    """Compute standard deviation over mean of accuracies (...,C); 0 where all are 0."""
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
"""Metrics of class accuracies by name: mean; least; mean of the worst 10 % of the classes; best
minus worst; population standard deviation over mean (NSD)."""


def rho(ours: Tensor, base: Tensor) -> Tensor:
    """Compute the sum of the relative gains in worst class and average over a baseline.

    ours, base: class accuracies (...,C); returns (...). A gain over 0 is infinite, no gain is 0.
    Source: arXiv 2401.12532.
    """

    def gain(metric: Callable[[Tensor], Tensor]) -> Tensor:
        value, baseline = metric(ours), metric(base)
        return torch.where(value == baseline, 0.0, (value - baseline) / baseline)

    return gain(METRICS["worst"]) + gain(METRICS["average"])


# --- Sums and means over an epoch ---


def class_sums(
    values: Num[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> tuple[Num[Tensor, " c"], Int[Tensor, " c"]]:
    """Sum the values of each class, and count its images; both add up over batches.

    An image whose label is outside 0..C-1 is of no class, and counts nowhere.
    """
    check_shape("labels", labels, "N")
    check_shape("values", values, len(labels))
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)
    return torch.where(member, values.unsqueeze(1), 0).sum(0), member.sum(0)


class ClassMean(nn.Module):
    """Means by class over an epoch, gathered batch by batch.

    A figure has one number, or K of them. Buffers: sums (C,) or (K,C) in float; counts (C,) of images.
    """

    sums: Tensor
    counts: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """Make it for figures of this shape, C or K, C."""
        super().__init__()
        self.register_buffer("sums", torch.zeros(shape, dtype=dtype))
        self.register_buffer("counts", torch.zeros(shape[-1], dtype=torch.long))

    def add(self, sums: Float[Tensor, "*k c"], counts: Int[Tensor, " c"]) -> None:
        """Add the sums of a batch, and move to its device."""
        self.to(sums.device)
        self.sums = self.sums + sums.to(self.sums.dtype)
        self.counts = self.counts + counts

    def mean(self) -> Float[Tensor, "*k c"]:
        """Return the mean of each class; NaN for a class that was not seen."""
        mean = self.sums / self.counts
        # A NaN that was observed must not look like an absent class.
        return mean.masked_fill((self.counts > 0) & mean.isnan(), torch.inf)

    def mean_of_all(self) -> Float[Tensor, "*k"]:
        """Return the mean over the images of all classes; NaN if there are none."""
        return self.sums.sum(-1) / self.counts.sum()

    def reset(self) -> None:
        """Start the next epoch."""
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
