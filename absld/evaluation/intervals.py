"""Confidence intervals of 95 %: Wilson for shares, bootstrap for metrics, Student for seeds."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
