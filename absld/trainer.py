"""The training loop: any student, teacher and set of images; it yields a report an epoch.

It knows no terminal. Every random number comes from a key (seed, role, epoch, step), so a run
that is resumed from a checkpoint computes what it would have computed without the interruption.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from absld.config.settings import TrainConfig, counting_settings
from absld.data.dataset import ImageSet
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.logit_cache import LogitCacheSettings, cached_epoch
from absld.engine.precision import float32_precision, with_precision
from absld.engine.step_metrics import StepMetrics
from absld.engine.techniques import NEUTRAL
from absld.engine.weight_averaging import WeightAveraging
from absld.errors import CheckpointError, DataError, Interrupted, NonFiniteError
from absld.evaluation.calibration import calibration, compute_logits
from absld.evaluation.class_names import list_difference
from absld.evaluation.validation import check_network, validate
from absld.metrics import ClassAccuracies
from absld.progress import SILENT, EpochReport, Observer, Role, StepReport, TrainingStart
from absld.stepper import Stepper, check_modes, check_roles
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory
from absld.storage.training_checkpoint import TrainingCheckpoint
from absld.temperature import ClassTemperature
from absld.text import clip

MOST_TOLD = 160  # letters of torch's own message, which may list every tensor


def describe_temperatures(method: nn.Module) -> str:
    """Describe the range of the class temperatures of a method, for an error; "" if it has none."""
    found = [module for module in method.modules() if isinstance(module, ClassTemperature)]
    ends = [(name, *getattr(t, name).aminmax()) for t in found for name in ("adv", "nat")]
    return "".join(f", {name} temperatures {low:.3g} to {high:.3g}" for name, low, high in ends)


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """Compute the learning rate in an epoch: a tenth after each milestone. Source: D7."""
    return config.learning_rate * 0.1 ** sum(epoch > m for m in config.milestone_epochs())  # D7


def temperature_rate(config: TrainConfig, epoch: int) -> float:
    """Compute the rate of the update that ends an epoch: a tenth from each milestone on.

    Source: D7.
    """
    return config.temperature_rate * 0.1 ** sum(epoch >= m for m in config.milestone_epochs())


def fit(
    student: nn.Module,
    teacher: nn.Module | None,
    train: ImageSet,
    validation: ImageSet,
    config: TrainConfig,
    *,
    run: RunDirectory | None = None,
    role: Role = "student",
    about: Mapping[str, Any] | None = None,
    observer: Observer = SILENT,
    logit_cache: LogitCacheSettings | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Iterator[EpochReport]:
    """Train `student` in place, with a report an epoch; it ends with its best weights or averages.

    Best is the epoch of the highest average + worst-class accuracy under PGD-20 on `validation`.
    The teacher is frozen in eval mode; the student ends in train mode. Both take images
    (N,channels,H,W) in [0,1] and return logits (N,C). Everything is moved to the student's device.

    Args:
        run: a locked run directory (`with RunDirectory(...) as run`): each epoch is saved there
            before it is reported, and an interrupted training resumes, bit-equal on the CPU.
        role: part of the keys of all random numbers. about: plain values for the checkpoints.
        observer: receives all reports. If its `step` raises Interrupted, that step is saved first.
        logit_cache: where the teacher's logits of clean views are cached; by default nowhere.
        distributed: the processes that share every batch and yield the same reports.

    Raises:
        UsageError: if method, techniques, networks or modes do not fit, or `run` is not locked.
        DataError: if the images do not fill a batch, or the sets have other classes.
        CheckpointError: if a network does not fit the images, or `run` holds another training.
        NonFiniteError: if the loss, its gradient or the student becomes NaN or infinite.
    """
    check_roles(student, teacher)
    stepper = Stepper(
        student, teacher, train, config, role=role, logit_cache=logit_cache, distributed=distributed
    )
    training, checkpoint = Training(stepper, validation, observer), None
    if run is not None:
        identity = training_identity(student, teacher, train, validation, stepper.config, role)
        checkpoint = TrainingCheckpoint(run, about or {}, identity)
    training.begin(checkpoint, teacher)
    observer.begin_training(training.start(run, about or {}))
    while training.progress.epoch <= config.epochs:
        try:
            report = training.epoch()
        except Interrupted:
            if checkpoint:
                checkpoint.save(training.gather_state())
            raise
        if checkpoint:
            best = training.best if report.is_best else None
            checkpoint.save_epoch(report.record(), best, training.gather_state())
        observer.epoch(report)
        yield report
    if training.best:
        student.load_state_dict(training.best)
    observer.end_training()


def check_classes(train: ImageSet, validation: ImageSet) -> None:
    """Raise DataError unless both sets have the same classes in the same order."""
    if train.classes != validation.classes:
        ours, theirs = list_difference(train.classes, validation.classes)
        raise DataError(
            f"classes of the training images are {ours}, of the validation images {theirs}",
            "needed: the same classes in the same order",
        )


def training_identity(
    student: nn.Module,
    teacher: nn.Module | None,
    train: ImageSet,
    validation: ImageSet,
    config: TrainConfig,
    role: Role,
) -> dict[str, Any]:
    """Return all that decides what a training computes: the same identity, the same numbers."""
    return {
        **{k: value for k, value in counting_settings(config).items() if k not in NEUTRAL},
        "role": role,
        "training_images": train.digest(),
        "validation_images": validation.digest(),
        "initial_weights": digest(student.state_dict()),
        "teacher": digest(teacher.state_dict()) if teacher is not None else "none",
    }


@dataclass
class Position:
    """Where a training stands: `step` batches of `epoch` are done."""

    epoch: int = 1
    step: int = 0
    seconds: float = 0.0
    best_score: float = -1.0


class Training:
    """A training in progress: its position, metrics and best weights, and validation."""

    def __init__(self, stepper: Stepper, validation: ImageSet, observer: Observer) -> None:
        self.stepper, self.observer, self.config = stepper, observer, stepper.config
        self.validation = validation.to(stepper.device)
        check_classes(stepper.views.data, validation)
        check_network(stepper.student, self.validation, "student")
        self.techniques = stepper.techniques
        self.averaging = WeightAveraging(stepper.student, self.config)
        self.progress = Position()
        self.metrics = StepMetrics(self.techniques.check_every, stepper.distributed)
        self.best: dict[str, Tensor] = {}

    def start(self, run: RunDirectory | None, about: Mapping[str, Any]) -> TrainingStart:
        """Return what is trained, and from which epoch on."""
        student, classes = self.stepper.student, self.validation.classes
        count = sum(parameter.numel() for parameter in student.parameters())
        size = f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"
        network = f"{about.get('architecture') or type(student).__name__} ({size} parameters)"
        epoch = self.progress.epoch
        return TrainingStart(self.stepper.role, self.config, classes, run, epoch, network)

    def epoch(self) -> EpochReport:
        """Train the next epoch, or the rest of it, and validate."""
        config, progress, number = self.config, self.progress, self.progress.epoch
        method, count = self.stepper.method, self.stepper.count
        rate = self.stepper.optimizer.param_groups[0]["lr"] = learning_rate(config, number)
        check_modes(self.stepper.device)  # of the caller, who may have changed them
        try:
            with torch.enable_grad(), float32_precision(self.techniques.precision):
                with cached_epoch(self.stepper.teacher):
                    self.remaining_steps()
                self.stepper.observe_validation(
                    self.validation, number, self.report_validation_batch
                )
                self.averaging.end_epoch(number, self.stepper.accepts_epoch)
                accuracies = self.validate()
        except NonFiniteError as error:
            temperatures = describe_temperatures(method)
            raise NonFiniteError(f"epoch {number}, {error}{temperatures}", error.hint) from error
        self.stepper.sum_class_means()
        decayed = temperature_rate(config, number)
        means = self.metrics.means(count)
        del means["gradient"]
        report = EpochReport(
            epoch=number,
            learning_rate=rate,
            temperature_rate=decayed,
            loss=means.pop("loss"),
            parts=means,
            accuracies=accuracies,
            per_class=method.end_epoch(decayed),
            seconds=progress.seconds,
            images_per_second=count * config.batch_size / progress.seconds,
        )
        self.progress = Position(number + 1, best_score=progress.best_score)
        if report.score > progress.best_score:
            self.progress.best_score = report.score
            self.best = {k: v.clone() for k, v in self.averaging.network.state_dict().items()}
            report = replace(report, is_best=True)
        return report

    def remaining_steps(self) -> None:
        """Take the steps of the epoch from `progress.step` on."""
        progress, count = self.progress, self.stepper.count
        start = time.perf_counter() - progress.seconds

        def check(metrics: dict[str, Tensor]) -> None:
            self.metrics.add(metrics, progress.step + 1)

        for draw in self.stepper.draws(progress.epoch, progress.step):
            self.stepper.step(draw, progress.epoch, progress.step, check)
            progress.step += 1
            progress.seconds = time.perf_counter() - start
            self.report_step(StepReport(progress.epoch, "training", progress.step, count))
        self.metrics.check_finite(progress.step)  # which waits for the device
        progress.seconds = time.perf_counter() - start

    def report_step(self, report: StepReport) -> None:
        """Report a batch; if the observer of one process stops, all stop at this step."""
        signal_number = 0
        try:
            self.observer.step(report)
        except Interrupted as request:
            signal_number = request.signal_number
        if signal_number := self.stepper.distributed.all_reduce_max(signal_number):
            raise Interrupted(signal_number)

    def report_validation_batch(self, done: int, total: int) -> None:
        self.report_step(StepReport(self.progress.epoch, "validation", done, total))

    def validate(self) -> ClassAccuracies:
        """Compute the class accuracies on the validation images of the student or its average."""
        try:
            return validate(
                with_precision(self.averaging.network, self.techniques.precision),
                self.validation,
                epsilon=self.config.epsilon,
                norm=self.config.norm,
                batch_size=self.config.batch_size,
                on_batch=self.report_validation_batch,
                distributed=self.stepper.distributed,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"validation: {error}", error.hint) from error

    def calibrated_temperature(self, teacher: nn.Module | None) -> float:
        """Compute the teacher's temperature of least cross-entropy on the validation images.

        Raises CheckpointError if a logit is not finite.
        """
        assert teacher is not None  # a method without one does not ask
        precision, own = self.techniques.precision, self.techniques.teacher_precision
        model = with_precision(teacher, own, caller_precision=precision)
        with float32_precision(precision):
            logits = compute_logits(model, self.validation, self.config.batch_size)
        if not logits.isfinite().all():
            raise CheckpointError(
                "the teacher gives NaN or infinity", "needed: a teacher that gives finite logits"
            )
        best = calibration(logits, self.validation.labels.cpu()).temperature
        distributed = self.stepper.distributed
        # Processes on unlike devices may differ in the last digits.
        shared = torch.tensor(best if distributed.is_main else 0.0, dtype=torch.float64)
        return distributed.all_reduce_sum(shared).item()

    def begin(self, checkpoint: TrainingCheckpoint | None, teacher: nn.Module | None) -> None:
        """Continue from the state of the checkpoint, or begin anew. Raises CheckpointError."""
        student, method = self.stepper.student, self.stepper.method
        if checkpoint and (state := checkpoint.load()):
            self.load_state(state, checkpoint.run.last)
        elif note := method.begin(partial(self.calibrated_temperature, teacher)):
            self.observer.note(note)
        if checkpoint:
            self.best = checkpoint.load_best(self.progress.epoch - 1, student.state_dict())

    def gather_state(self) -> dict[str, Any]:
        """Gather all that the rest of the training depends on; every process must call this."""
        self.metrics.check_finite(self.progress.step)
        self.stepper.sum_class_means()
        self.stepper.keep_class_means_on_main()
        return {
            "progress": asdict(self.progress),
            "metric_sums": self.metrics.sums,
            "model": self.stepper.student.state_dict(),
            "optimizer": self.stepper.optimizer.state_dict(),
            "method": self.stepper.method.state_dict(),
            **self.averaging.gather_state(),
        }

    def load_state(self, state: Mapping[str, Any], path: Path) -> None:
        """Resume from what `gather_state` returned, saved in `path`. Raises CheckpointError."""
        try:
            self.stepper.student.load_state_dict(state["model"])
            self.stepper.optimizer.load_state_dict(state["optimizer"])
            self.stepper.method.load_state_dict(state["method"])
            self.averaging.load_state(state)
            self.metrics.sums = dict(state["metric_sums"])
            epoch, step, seconds, score = (state["progress"][f.name] for f in fields(Position))
            self.progress = Position(int(epoch), int(step), float(seconds), float(score))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: its state is not one of this training: {clip(str(error), MOST_TOLD)}",
                "another --out starts a new run",
            ) from error
        self.stepper.keep_class_means_on_main()
