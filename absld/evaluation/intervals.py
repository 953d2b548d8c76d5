"""95 % confidence intervals: Wilson for shares, bootstrap for metrics, Student's t for seeds."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Interval(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def wilson(correct: int, images: int) -> Interval:
    """Compute the share `correct / images` with Wilson's score interval (Wilson 1927).

    All three are NaN for no images.
    """
    from scipy.stats import binomtest

    if images == 0:
        return Interval(*[float("nan")] * 3)
    low, high = binomtest(correct, images).proportion_ci(method="wilson")
    return Interval(correct / images, float(low), float(high))


def resample(
    correct: Bool[Tensor, "m n"],
    labels: Int[Tensor, " n"],
    random: torch.Generator,
    replicates: int = 2000,
) -> Float[Tensor, "r m p"]:
    """Compute class accuracies of r resampled sets, drawn with replacement within each class.

    correct: of m networks or attacks on the same images; a drawn image counts for all of them, so
    their differences are paired. Returns accuracies of the p classes that have images.
    """
    classes = []
    for k in labels.bincount().nonzero():
        of_class = correct[:, labels == k].cpu().float()  # (m,n_k)
        images = of_class.shape[1]
        drawn = torch.randint(images, (replicates, images), generator=random)
        multiplicity = torch.zeros_like(drawn, dtype=torch.float32)
        multiplicity.scatter_add_(1, drawn, torch.ones_like(multiplicity))
        classes.append((multiplicity @ of_class.T).double() / images)
    return torch.stack(classes, dim=2)


def bootstrap(
    value: float,
    replicates: Float[Tensor, " r"],
    lowest: float = -torch.inf,
    highest: float = torch.inf,
) -> Interval:
    """Compute the basic bootstrap interval of a figure, cut to [lowest, highest].

    Its ends are percentiles reflected about the figure. Resampling adds noise to noise, which moves
    every replicate of a worst class down and of an NSD up; plain percentiles would count that bias
    twice, the reflection removes it. Its coverage is measured in docs/results/intervals.md.
    Source: decided here.
    """
    shares = torch.tensor([0.975, 0.025], dtype=replicates.dtype)
    ends = torch.quantile(replicates, shares, interpolation="nearest")  # some may be infinite
    low, high = (2 * value - ends).tolist()
    # Where all replicates lie on one side, the figure itself is the end.
    return Interval(value, min(max(low, lowest), value), max(min(high, highest), value))


def over_seeds(values: Float[Tensor, " s"]) -> Interval:
    """Compute the mean over seeds with Student's t interval; its ends are NaN for one seed."""
    from scipy.stats import t

    mean, count = values.mean().item(), len(values)
    if count < 2:
        return Interval(mean, float("nan"), float("nan"))
    half = float(t.ppf(0.975, count - 1)) * values.std().item() / count**0.5
    return Interval(mean, mean - half, mean + half)
