"""The interface of a method: one training step, and its update after an epoch."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from absld.attack import TrainingAttack
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.errors import UsageError
from absld.metrics import ClassMean


class Step(NamedTuple):
    """The loss of a batch, to be differentiated, and its parts by name (nats, no gradient)."""

    loss: Tensor
    parts: dict[str, Tensor]


class Method:
    """What the trainer asks of a method. A class, so that it may carry state between batches."""

    needs_teacher = True
    asks_clean_views = True  # alone, of the teacher: then its answers can be remembered

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.config = config

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        """The loss of a batch. Leaves the student in train mode."""
        raise NotImplementedError

    def class_means(self) -> list[ClassMean]:
        """What is gathered over an epoch: where several processes train, summed over them before
        it ends."""
        return []

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        """Adapt, at temperature rate `rate`; what there is to report per class (C,), by name."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""


def taught(teacher: nn.Module | None, x: Tensor) -> Tensor:
    """The teacher's logits (N,C), without gradient. Raises UsageError without a teacher."""
    if teacher is None:
        raise UsageError("this method needs a teacher", "pass one, or use method='trades'")
    with torch.no_grad():
        logits: Tensor = teacher(x)
    return logits
