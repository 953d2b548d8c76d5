"""What a training, an evaluation and a comparison report while they run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from absld.metrics import ClassAccuracies, Fairness, fairness

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class StepReport:
    """Progress inside an epoch: `done` of `total` batches of a phase."""

    epoch: int
    phase: Literal["training", "validation"]
    done: int
    total: int


OnStep = Callable[[StepReport], None]


@dataclass(frozen=True, eq=False)
class EpochReport:
    """An epoch: losses in nats, accuracies (C,) on the validation images in [0,1].

    per_class: what the method has to say of each class (C,), by name, such as the temperatures
    after the epoch and the class risks that moved them. seconds: of training, without validation.
    """

    epoch: int
    learning_rate: float
    temperature_rate: float
    loss: float
    parts: dict[str, float]
    accuracies: ClassAccuracies
    per_class: dict[str, Tensor]
    seconds: float
    images_per_second: float
    is_best: bool = False

    @property
    def clean(self) -> Fairness:
        return fairness(self.accuracies.clean)

    @property
    def robust(self) -> Fairness:
        return fairness(self.accuracies.robust)

    @property
    def score(self) -> float:
        """What the best epoch has the most of: average + worst robust accuracy."""
        return self.robust.average + self.robust.worst

    def record(self) -> dict[str, Any]:
        """The report as plain values, for JSON; NaN, a class without images, is null."""
        values = {"clean": self.accuracies.clean, "robust": self.accuracies.robust}
        return {
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "temperature_rate": self.temperature_rate,
            "loss": self.loss,
            **self.parts,
            **{name: plain(tensor) for name, tensor in (values | self.per_class).items()},
            "score": self.score,
            "is_best": self.is_best,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }


def plain(tensor: Tensor) -> list[float | int | None]:
    return [None if value != value else value for value in tensor.tolist()]
