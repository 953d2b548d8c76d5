"""Reports of trainings, evaluations and comparisons while they run, and their observer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from absld.config.settings import TrainConfig
from absld.metrics import ClassAccuracies, Fairness, fairness
from absld.storage.run_directory import RunDirectory

Role = Literal["student", "teacher"]


@dataclass(frozen=True)
class StepReport:
    """Progress inside an epoch: `done` of `total` batches of a phase."""

    epoch: int
    phase: Literal["training", "validation"]
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class EpochReport:
    """An epoch of a training.

    Attributes:
        epoch: from 1.
        learning_rate: in this epoch.
        temperature_rate: of the update that ended it.
        loss: mean over its steps, in nats.
        parts: of the loss, by name.
        accuracies: of each class (C,) on the validation images, in [0,1].
        per_class: values per class (C,) that the method records, by name, such as the temperatures
            after the epoch and the class risks that moved them.
        seconds: of training, without validation.
        images_per_second: in training.
        is_best: whether its score is the best so far.
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
        """Fairness of the clean accuracies."""
        return fairness(self.accuracies.clean)

    @property
    def robust(self) -> Fairness:
        """Fairness of the accuracies under PGD-20."""
        return fairness(self.accuracies.robust)

    @property
    def score(self) -> float:
        """Average + worst-class robust accuracy, which selects the best epoch."""
        return self.robust.average + self.robust.worst

    def record(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON; NaN, a class without images, is null."""
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
    """Return the values of a tensor (C,) for JSON, null for NaN."""
    return [None if value != value else value for value in tensor.tolist()]


class AttackProgress(NamedTuple):
    """`done` of `total` images under one attack; `cost`: of the evaluation so far, and of all of
    it, in forward-backward passes, if no more images break."""

    attack: str
    done: int
    total: int
    cost: tuple[float, float]


@dataclass(frozen=True)
class Check:
    """A sanity check: its name, whether it passed, and the numbers in words."""

    name: str
    passed: bool
    numbers: str


@dataclass(frozen=True)
class TrainingStart:
    """A training that begins or goes on.

    Attributes:
        run: if it has a directory, it holds the epochs so far.
        epoch: the first one to train, from 1; after the last if all were trained before.
        network: its architecture and number of parameters, in words.
    """

    role: Role
    config: TrainConfig
    classes: tuple[str, ...]
    run: RunDirectory | None = None
    epoch: int = 1
    network: str = ""


class Observer:
    """Receives what trainings, evaluations and comparisons report; override what you show.

    `step` and `attack_batch` may raise Interrupted: the work so far is then saved.
    """

    def note(self, text: str) -> None:
        """Handle a line worth knowing."""

    def warn(self, text: str) -> None:
        """Handle a line that must not be missed."""

    def wait(self, text: str) -> None:
        """Handle the beginning of a wait, in a line."""

    def load(self, name: str, done: int, total: int, unit: str = "bytes") -> None:
        """Handle the progress of a download or of reading: `done` of `total` bytes, files or images.

        total: 0 if it is not known.
        """

    def begin_training(self, start: TrainingStart) -> None:
        """Handle the beginning of a training, or its resuming."""

    def step(self, report: StepReport) -> None:
        """Handle the end of a batch of training or validation."""

    def epoch(self, report: EpochReport) -> None:
        """Handle the end of an epoch."""

    def end_training(self) -> None:
        """Handle the end of the training that began last."""

    def test(self, accuracies: ClassAccuracies) -> None:
        """Handle the accuracies on the test images of the network that was trained last."""

    def begin_evaluation(self) -> None:
        """Handle the beginning of the evaluation of a network, or its resuming."""

    def attack_batch(self, progress: AttackProgress) -> None:
        """Handle the end of a batch of an evaluation."""

    def check(self, check: Check) -> None:
        """Handle a sanity check."""

    def end_evaluation(self, path: Path, results: Mapping[str, Any]) -> None:
        """Handle the results of an evaluation, which are in the file `path`."""

    def begin_run(self, label: str, seed: int, number: int, total: int) -> None:
        """Handle the beginning of run `number` of `total` of a comparison."""

    def end_run(self, metrics: Mapping[str, float], seconds: float, reused: bool) -> None:
        """Handle the end of a run of a comparison.

        seconds: of its training. reused: its training was finished before.
        """


SILENT = Observer()


class Observers(Observer):
    """Several observers as one: each receives every report, in their order."""

    def __init__(self, *observers: Observer) -> None:
        for name in vars(Observer):
            if not name.startswith("_"):
                setattr(self, name, partial(call_each, [getattr(o, name) for o in observers]))


def call_each(methods: Sequence[Callable[..., None]], *args: Any, **kwargs: Any) -> None:
    """Call each method with the same arguments."""
    for method in methods:
        method(*args, **kwargs)
