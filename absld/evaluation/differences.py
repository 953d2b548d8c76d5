"""Differences of networks that were evaluated on the same images, with paired intervals."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from absld.errors import UsageError
from absld.evaluation.evaluate import Evaluation
from absld.evaluation.intervals import Interval, bootstrap, resample
from absld.metrics import METRICS, present, rho
from absld.seeding import generator


class Differences(NamedTuple):
    """Differences of two networks in each metric, clean and robust, and rho, with intervals."""

    clean: dict[str, Interval]
    robust: dict[str, Interval]
    rho: Interval


def paired_differences(
    ours: Evaluation | Sequence[Evaluation], theirs: Evaluation | Sequence[Evaluation]
) -> Differences:
    """Compute ours minus theirs in each metric, with paired bootstrap intervals over images.

    With several evaluations, such as those of seeds, the differences are means over the pairs. A
    resampled image counts for all networks. Source of rho: arXiv 2401.12532.

    Raises:
        UsageError: the images are not the same.
    """
    ours = [ours] if isinstance(ours, Evaluation) else ours
    theirs = [theirs] if isinstance(theirs, Evaluation) else theirs
    first = ours[0]
    check_same_images(*ours, *theirs)

    def accuracies(correct_of: Callable[[Evaluation], Tensor]) -> tuple[Tensor, Tensor]:
        """Compute class accuracies (2,pairs,p), and (2,pairs,r,p) of resampled images."""
        correct = torch.stack([correct_of(evaluation) for evaluation in (*ours, *theirs)])
        accuracy = torch.stack([present(first.class_accuracy(row)) for row in correct])
        replicates = resample(correct, first.labels, generator("bootstrap", first.seed))
        replicates = replicates.transpose(0, 1)
        return (
            accuracy.view(2, len(ours), *accuracy.shape[1:]),
            replicates.view(2, len(ours), *replicates.shape[1:]),
        )

    def differences(accuracy: Tensor, replicates: Tensor) -> dict[str, Interval]:
        intervals = {}
        for name, metric in METRICS.items():
            difference = metric(accuracy[0]) - metric(accuracy[1])
            resampled = metric(replicates[0]) - metric(replicates[1])
            intervals[name] = bootstrap(difference.mean().item(), resampled.mean(0))
        return intervals

    accuracy, replicates = accuracies(lambda evaluation: evaluation.robust)
    return Differences(
        clean=differences(*accuracies(lambda evaluation: evaluation.correct[0])),
        robust=differences(accuracy, replicates),
        rho=bootstrap(rho(*accuracy).mean().item(), rho(*replicates).mean(0)),
    )


def check_same_images(first: Evaluation, *others: Evaluation) -> None:
    """Raise UsageError if evaluations are of different images."""
    for other in others:
        if not torch.equal(first.index, other.index) or not torch.equal(first.labels, other.labels):
            raise UsageError(
                "the networks were not evaluated on the same images",
                "give all the same --dataset, --data, --split and --examples",
            )
