"""The metrics of training steps, read from the device every few steps."""

import math

import torch
from torch import Tensor

from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.errors import NonFiniteError


class StepMetrics:
    """Sums of the metrics of an epoch's steps, each checked for NaN and infinity.

    Reading a metric makes the host wait for the device: `check_every` steps are read at once.
    """

    def __init__(self, check_every: int = 1, distributed: Distributed = SINGLE_PROCESS) -> None:
        self.check_every, self.distributed = check_every, distributed
        self.sums: dict[str, float] = {}
        self.pending: list[dict[str, Tensor]] = []

    def add(self, metrics: dict[str, Tensor], step: int) -> None:
        """Add the metrics of step `step`, before the optimiser takes it."""
        self.pending.append(metrics)
        if len(self.pending) >= self.check_every:
            self.check_finite(step)

    def check_finite(self, last_step: int) -> None:
        """Read the pending metrics, the last of which are those of `last_step`.

        Raises NonFiniteError, which names the first step that is not finite.
        """
        if not self.pending:
            return
        stacked = torch.stack([torch.stack(list(metrics.values())) for metrics in self.pending])
        rows = (self.distributed.all_reduce_sum(stacked) / self.distributed.world_size).tolist()
        names, self.pending = list(self.pending[0]), []
        for step, row in enumerate(rows, last_step - len(rows) + 1):
            metrics = dict(zip(names, row, strict=True))
            if not all(map(math.isfinite, row)):
                described = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                raise NonFiniteError(
                    f"step {step}: {described}",
                    "a lower learning_rate may help; what was saved before stays",
                )
            for name, value in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self, steps: int) -> dict[str, float]:
        """Return the means over an epoch of `steps` steps, and start the next epoch."""
        sums, self.sums = self.sums, {}
        return {name: value / steps for name, value in sums.items()}
