"""The interface of a method: the loss of a batch, and its update after an epoch."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from absld.attack import TrainingAttack
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.errors import UsageError

# In the order of the paper's table.
Family = Literal[
    "adversarial training", "robust distillation", "fair training", "ABSLD", "others"
]  # fmt: skip


class Step(NamedTuple):
    """The loss of a batch, to be differentiated, and its parts by name (nats, no gradient)."""

    loss: Tensor
    parts: dict[str, Tensor]


class Method(nn.Module):
    """A training method. What it carries between batches are its buffers and submodules.

    Several processes that train together sum every `ClassMean` in it before an epoch ends.
    Raises UsageError for a setting that the method does not have.
    """

    family: Family = "others"  # under which it is listed in the paper's table
    needs_teacher = True
    caches_teacher = True  # the teacher evaluates clean images only, so its logits can be cached
    uses_validation = False  # it adapts to the validation images after each epoch
    needs_robust_start = False  # it fine-tunes a student that is robust already
    settings: tuple[str, ...] = ()  # those of the group Method that change what it computes

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__()
        if config.kl_scale != 1 and "kl_scale" not in self.settings:
            raise UsageError(
                f"kl_scale has no meaning for {config.method}: its loss has no KL to soft labels",
                "leave out --kl-scale",
            )
        self.config = config
        # Of tensors, among the processes that share a batch: for what is normalised by batch.
        self.all_reduce_mean_: Callable[[Iterable[Tensor]], None] = lambda tensors: None

    def begin(self, calibrated: Callable[[], float]) -> str:
        """Prepare for the first step of a training, and return a line for a person, or "".

        calibrated: computes the teacher's temperature of least cross-entropy on the validation
            images.
        """
        return ""

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        """Compute the loss of a batch. Leaves the student in train mode."""
        raise NotImplementedError

    def observe_validation(
        self, student: nn.Module, batches: Iterable[Batch], attack: TrainingAttack
    ) -> None:
        """Gather what `end_epoch` needs of held-out images, if `uses_validation`; before it.

        `student` is in train mode, and must not learn from them (`frozen_eval`). What is gathered
        in a `ClassMean` starts anew here: after an interruption, it is called again. batches:
        those of this process, which has to take them all; with the starts of an attack.
        """

    def accepts_epoch(self) -> bool:
        """Return whether the weights of this epoch enter their average, if there is one.

        After `observe_validation`, before `end_epoch`; all processes must agree.
        """
        return True

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        """Adapt to the epoch, at temperature rate `rate`; return values per class (C,) by name."""
        return {}


class CountsEpochs(Method):
    """The part of a method that does something from a certain epoch on.

    The count is torch's extra state and not a buffer: on an accelerator, a step that reads one
    would wait for it.
    """

    epochs = 0  # finished ones

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.epochs)

    def set_extra_state(self, state: Tensor) -> None:
        self.epochs = int(state)

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        self.epochs += 1
        return super().end_epoch(rate)


def teacher_logits(teacher: nn.Module | None, batch: Batch) -> Tensor:
    """Compute the teacher's logits (N,C) of a batch's clean images, without gradient.

    Raises UsageError without a teacher.
    """
    if teacher is None:
        raise UsageError("this method needs a teacher", "pass one, or use method='trades'")
    with torch.no_grad():
        # Only a teacher that caches its logits takes the numbers of the views.
        cached = () if batch.views is None else (batch.views,)
        logits: Tensor = teacher(batch.x_nat, *cached)
    return logits
