"""What is said of the accuracies of the classes. Accuracies are fractions in [0,1]."""

from typing import NamedTuple

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
    accuracy = class_accuracy[~class_accuracy.isnan()].cpu().double()
    mean = accuracy.mean()
    nsd = accuracy.std(correction=ddof) / mean.clamp_min(1e-12)
    return Fairness(mean.item(), accuracy.min().item(), nsd.item())


def worst_tenth(class_accuracy: Float[Tensor, " c"]) -> float:
    """Mean accuracy of the worst 10 % of the classes, at least one. Source: spec, Evaluation."""
    accuracy = class_accuracy[~class_accuracy.isnan()].cpu().double()
    return accuracy.sort().values[: max(1, len(accuracy) // 10)].mean().item()
