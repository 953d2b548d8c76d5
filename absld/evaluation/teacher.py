"""Teachers: frozen, and checked before they teach."""

from torch import nn

from absld.data.dataset import ImageSet
from absld.errors import CheckpointError, NonFiniteError
from absld.evaluation.validation import check_network, validate
from absld.metrics import fairness

MARGIN = 0.05


def freeze(teacher: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and its parameters to ask for no gradient, for good."""
    return teacher.eval().requires_grad_(False)


def check_teacher(teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool) -> float:
    """The teacher's clean average on validation images.

    Raises CheckpointError if it does not fit the images and classes, gives no finite logits, or is
    within five points of chance, unless that is allowed.
    """
    check_network(teacher, validation, name)
    try:
        accuracy = fairness(validate(teacher, validation, epsilon=0.0, steps=0).clean).average
    except NonFiniteError as error:
        raise CheckpointError(f"{name}: {error}", "needed: a sound teacher") from error
    if accuracy < 1 / validation.num_classes + MARGIN and not allow_weak:
        raise CheckpointError(
            f"{name}: near chance on validation images, {accuracy:.1%} clean",
            "needed: a better teacher, longer training of it, or --allow-weak-teacher",
        )
    return accuracy
