"""Teachers: frozen, and checked before they teach."""

import torch
from torch import nn

from absld.attack import frozen_eval
from absld.data import ImageSet, pixels
from absld.errors import CheckpointError
from absld.evaluation import evaluate
from absld.metrics import fairness

MARGIN = 0.05


def freeze(teacher: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and its parameters to ask for no gradient, for good."""
    return teacher.eval().requires_grad_(False)


def check_teacher(teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool) -> float:
    """The teacher's clean average on validation images.

    Raises CheckpointError if it gives other classes than the data have, or is within five points
    of chance, unless that is allowed.
    """
    with frozen_eval(teacher), torch.no_grad():
        logits = teacher(pixels(validation.images[:1]))
    if logits.shape != (1, validation.num_classes):
        raise CheckpointError(
            f"{name}: gives {tuple(logits.shape)[1:]} classes, the data have "
            f"{validation.num_classes}",
            "needed: a teacher of these classes",
        )
    accuracy = fairness(evaluate(teacher, validation, epsilon=0.0).clean).average
    if accuracy < 1 / validation.num_classes + MARGIN and not allow_weak:
        raise CheckpointError(
            f"{name}: near chance on validation images, {accuracy:.1%} clean",
            "needed: a better teacher, longer training of it, or --allow-weak-teacher",
        )
    return accuracy
