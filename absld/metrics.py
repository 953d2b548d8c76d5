"""What is said of the accuracies of the classes, and how sure it is. Accuracies are in [0,1]."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
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


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


Z = 1.959964  # 97.5 % of a normal distribution lie below


def wilson(right: int, images: int) -> Interval:
    """The share `right` of `images`, with Wilson's score interval; NaN for no images.

    Source: spec, Evaluation.
    """
    if images == 0:
        return Interval(*[float("nan")] * 3)
    share, spread = right / images, Z * Z / images
    centre = (share + spread / 2) / (1 + spread)
    half = (share * (1 - share) * spread + spread * spread / 4) ** 0.5 / (1 + spread)
    # It holds the share and stays in [0,1], but for rounding.
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return Interval(share, min(low, share), max(high, share))


def resampled(
    right: Bool[Tensor, "m n"],
    labels: Int[Tensor, " n"],
    random: torch.Generator,
    replicates: int = 2000,
) -> Float[Tensor, "r m p"]:
    """Accuracies of the p classes that have images, as `replicates` other sets of images might
    have given them: within each class, images are drawn with replacement.

    right: of m networks or attacks on the same images; a drawn image counts for all of them, so
    their differences are paired.
    """
    classes = []
    for k in labels.bincount().nonzero():
        of_class = right[:, labels == k].cpu().float()  # (m,n_k)
        images = of_class.shape[1]
        drawn = torch.randint(images, (replicates, images), generator=random)
        times = torch.zeros_like(drawn, dtype=torch.float32)  # that each image was drawn
        times.scatter_add_(1, drawn, torch.ones_like(times))
        classes.append((times @ of_class.T).double() / images)
    return torch.stack(classes, dim=2)


def bootstrap(
    value: float,
    replicates: Float[Tensor, " r"],
    lowest: float = -torch.inf,
    highest: float = torch.inf,
) -> Interval:
    """A figure with its basic bootstrap interval: the percentiles, reflected about the figure, and
    cut to the values that it can have at all.

    Resampling adds noise to noise, which moves every replicate of a worst class down and of an NSD
    up; the reflection takes that out again, where plain percentiles would count it twice. What
    this covers is measured in docs/results/intervals.md. Source: decided here.
    """
    shares = torch.tensor([0.975, 0.025], dtype=replicates.dtype)
    ends = torch.quantile(replicates, shares, interpolation="nearest")  # some may be infinite
    low, high = (2 * value - ends).tolist()
    # Where all replicates lie on one side, the figure itself is the end.
    return Interval(value, min(max(low, lowest), value), max(min(high, highest), value))


def over_seeds(values: Float[Tensor, " s"]) -> Interval:
    """The mean of figures of several seeds, with Student's interval for others of their kind; NaN
    ends for one seed, which says nothing of others. Source: decided here."""
    from scipy.special import stdtrit

    mean, count = values.mean().item(), len(values)
    if count < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(stdtrit(count - 1, 0.975)) * values.std().item() / count**0.5
    return Interval(mean, mean - half, mean + half)
