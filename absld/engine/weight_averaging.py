"""The moving average of a student's weights over epochs, which is validated in its place."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from absld.config.settings import TrainConfig
from absld.errors import UsageError


def first_averaged_epoch(config: TrainConfig) -> int:
    """Return the first epoch whose weights enter the average: the nearest whole one, from 1 on."""
    return max(1, round(config.averaging_start * config.epochs))


class WeightAveraging:
    """An exponential moving average of weights and buffers, updated after an epoch.

    average <- decay * average + (1 - decay) * student, from the weights of the first epoch that
    enters. The student itself trains on as it would without. Source: CFA (arXiv 2303.14460), whose
    average also has the statistics of batch norm.

    Raises UsageError if the student cannot be copied.
    """

    def __init__(self, student: nn.Module, config: TrainConfig) -> None:
        self.student, self.first_epoch = student, first_averaged_epoch(config)
        self.average: AveragedModel | None = None
        self.last_epoch = 0  # the last one that has entered, or has been refused
        if config.weight_averaging:
            # torch has no types there
            rule = get_ema_multi_avg_fn(config.weight_averaging)  # type: ignore[no-untyped-call]
            try:
                self.average = AveragedModel(student, multi_avg_fn=rule, use_buffers=True)
            except Exception as error:  # whatever somebody's network raises
                raise UsageError(
                    f"weights cannot be averaged: copy.deepcopy of the student fails: {error}",
                    "--weight-averaging 0",
                ) from error

    @property
    def network(self) -> nn.Module:
        """The network to validate and to keep: the average, once an epoch has entered it."""
        if self.average is None or not self.average.n_averaged:
            return self.student
        network: nn.Module = self.average.module
        return network

    def end_epoch(self, epoch: int, accepts: Callable[[], bool]) -> None:
        """Let the student's weights enter the average, if the epoch counts and is accepted.

        An epoch whose validation was interrupted ends twice; its weights enter once.
        """
        if self.average is not None and epoch >= self.first_epoch and epoch > self.last_epoch:
            self.last_epoch = epoch
            if accepts():
                self.average.update_parameters(self.student)

    def gather_state(self) -> dict[str, Any]:
        """Return what a checkpoint needs of it; nothing where weights are not averaged."""
        if self.average is None:
            return {}
        return {"average": self.average.state_dict(), "last_averaged_epoch": self.last_epoch}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Load what `gather_state` returned. Raises KeyError, RuntimeError or TypeError."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.last_epoch = int(state["last_averaged_epoch"])
