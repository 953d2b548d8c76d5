"""The training loop: any student, teacher and set of images; it yields a report an epoch.

It knows no terminal. Every random number comes from a key (seed, role, epoch, step), so a run
that goes on from a checkpoint computes what it would have computed without the interruption.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from absld.attack import TrainingAttack
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch, Draw, Views, draws, steps_per_epoch
from absld.data.dataset import ImageSet
from absld.engine.distributed import ALONE, Ranks
from absld.engine.engine import Engine, check_speed, training_attack
from absld.engine.logit_cache import Bank, RememberingTeacher
from absld.engine.precision import arithmetic, in_precision, laid_out, memory_format
from absld.errors import CheckpointError, DataError, Interrupted, NonFiniteError, UsageError
from absld.evaluation.validation import check_network, freeze, validate
from absld.methods.base import Method
from absld.methods.registry import build_method
from absld.metrics import ClassAccuracies
from absld.progress import EpochReport, OnStep, Role, StepReport, plain
from absld.seeding import global_generator
from absld.storage.checkpoint import load
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory


@dataclass
class Progress:
    """Where a training stands: `step` batches of `epoch` are done."""

    epoch: int = 1
    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    best_score: float = -1.0


def learning_rate(config: TrainConfig, epoch: int) -> float:
    """The learning rate in an epoch: a tenth after each milestone. Source: D7."""
    return config.learning_rate * 0.1 ** sum(epoch > m for m in config.milestone_epochs())  # D7


def temperature_rate(config: TrainConfig, epoch: int) -> float:
    """The rate of the update that ends an epoch: a tenth from each milestone on. Source: D7."""
    return config.temperature_rate * 0.1 ** sum(epoch >= m for m in config.milestone_epochs())


def train_step(
    method: Method,
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    attack: TrainingAttack,
    optimizer: torch.optim.Optimizer,
    look: Callable[[dict[str, Tensor]], None] = lambda figures: None,
) -> dict[str, Tensor]:
    """One step of the optimiser on a batch: D1 to D5. Returns its figures: the loss and its parts
    in nats, and the norm of the gradient.

    look: sees them before the optimiser takes its step, and may raise: what is not finite would
    spread to all weights.
    """
    step = method.step(student, teacher, batch, attack)
    optimizer.zero_grad()
    step.loss.backward()  # type: ignore[no-untyped-call]  # torch has no types there
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    figures = {"loss": step.loss.detach(), **step.parts, "gradient": norm}
    look(figures)
    optimizer.step()
    return figures


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
    on_step: OnStep = lambda step: None,
    bank: Bank | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[EpochReport]:
    """Train `student` in place, with a report an epoch; in the end it has its best weights.

    Best is the epoch of the highest average + worst-class accuracy under PGD-20 on `validation`.
    The teacher is set to eval mode and frozen; the student ends in train mode. All is moved to the
    student's device.

    run: with a run directory (locked by `with RunDirectory(...) as run`), each epoch is recorded and saved there before it is reported, and
    a training that was interrupted continues, with bit-equal results on the CPU. `about` (plain
    values) goes into its checkpoints. on_step hears of every batch and may raise Interrupted: the
    training so far is then saved, to the step. role: part of the keys of all random numbers.
    bank: where the teacher's logits of clean views are remembered; by default nowhere.
    ranks: the processes that train this student together; each gets a part of every batch, and the
    same reports.

    Raises UsageError if the method needs a teacher and there is none, or a technique cannot be used
    here, DataError if the images do not fill a batch, CheckpointError if a network does not fit
    the images or `run` holds another training, NonFiniteError if the loss, its gradient, or the
    student becomes NaN or infinite.
    """
    saved = None
    training = Training(student, teacher, train, validation, config, role, on_step, bank, ranks)
    if run is not None:
        same = identity(student, teacher, train, validation, config, role)
        saved = Saved(training, run, dict(about or {}), same)
        saved.resume()
    while training.progress.epoch <= config.epochs:
        try:
            report = training.epoch()
        except Interrupted:
            if saved:
                saved.save_last()
            raise
        if saved:
            saved.record(report)
        yield report
    if training.best:
        student.load_state_dict(training.best)


class Training:
    """All that a training needs and changes; `progress` and the state dicts are its state."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        train: ImageSet,
        validation: ImageSet,
        config: TrainConfig,
        role: Role,
        on_step: OnStep,
        bank: Bank | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if config.sync_batch_norm:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        self.student, self.config, self.role = student, config, role
        self.on_step, self.ranks = on_step, ranks
        device = next(student.parameters()).device
        check_speed(config, device)
        self.train, self.validation = train.to(device), validation.to(device)
        self.steps = steps_per_epoch(len(train), config.batch_size, config.max_steps)
        if self.steps == 0:
            raise DataError(
                f"{len(train)} training images do not fill a batch of {config.batch_size}",
                "needed: a smaller --batch-size, or more images",
            )
        if config.batch_size % ranks.count:
            raise UsageError(
                f"{ranks.count} processes cannot share a batch of {config.batch_size} evenly",
                "another --batch-size",
            )
        check_network(student, self.train, "student")
        laid_out(student, config.channels_last)
        self.engine = Engine(student, config, ranks)
        self.attack = training_attack(config)
        self.tested = in_precision(student, config.precision)
        self.method = build_method(config, train.num_classes)
        self.views = Views(self.train, config.padding)
        self.teacher = None
        if teacher is not None:
            check_network(teacher.to(device), self.train, "teacher")
            precision = config.teacher_precision or config.precision
            network = freeze(laid_out(teacher, config.channels_last))
            called = in_precision(network, precision, around=config.precision)
            self.teacher = called
            if bank and self.method.asks_clean_views:
                with arithmetic(config.precision):
                    self.teacher = bank.remembering(
                        called, self.views, flip=config.flip, precision=precision
                    )
        elif self.method.needs_teacher:
            raise UsageError(f"{config.method} needs a teacher", "pass one, or method='trades'")
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.progress = Progress()
        self.unseen: list[dict[str, Tensor]] = []  # figures of the last steps, not looked at yet
        self.best: dict[str, Tensor] = {}

    def epoch(self) -> EpochReport:
        """The epoch that is next, or the rest of it: its steps, then validation."""
        config, progress, number = self.config, self.progress, self.progress.epoch
        rate = self.optimizer.param_groups[0]["lr"] = learning_rate(config, number)
        try:
            with arithmetic(config.precision):
                self.remaining_steps()
                accuracies = self.validated()
        except NonFiniteError as error:
            raise NonFiniteError(f"epoch {number}, {error}", error.way_out) from error
        self.sum_class_means()
        decayed = temperature_rate(config, number)
        losses = {name: total / self.steps for name, total in progress.losses.items()}
        report = EpochReport(
            epoch=number,
            learning_rate=rate,
            temperature_rate=decayed,
            loss=losses.pop("loss"),
            parts=losses,
            accuracies=accuracies,
            per_class=self.method.end_epoch(decayed),
            seconds=progress.seconds,
            images_per_second=self.steps * config.batch_size / progress.seconds,
        )
        self.progress = Progress(number + 1, best_score=progress.best_score)
        if report.score > progress.best_score:
            self.progress.best_score = report.score
            self.best = {k: v.clone() for k, v in self.student.state_dict().items()}
            report = replace(report, is_best=True)
        return report

    def remaining_steps(self) -> None:
        """The steps of the epoch from `progress.step` on."""
        progress = self.progress
        start = time.perf_counter() - progress.seconds
        for draw in self.draws():
            self.step(draw)
            progress.seconds = time.perf_counter() - start
            self.tell(StepReport(progress.epoch, "training", progress.step, self.steps))
        self.look()  # which waits for an accelerator that is still at work
        progress.seconds = time.perf_counter() - start

    def key(self) -> tuple[int | str, ...]:
        """Of all random numbers of the epoch."""
        return self.config.seed, self.role, self.progress.epoch

    def draws(self) -> Iterator[Draw]:
        """What the batches of the epoch are made of, from `progress.step` on."""
        config = self.config
        return draws(
            self.views,
            *self.key(),
            batch_size=config.batch_size,
            flip=config.flip,
            start=config.start,
            radius=config.start_noise if config.start == "normal" else config.epsilon,
            steps=self.steps,
            first_step=self.progress.step,
        )

    def step(self, draw: Draw) -> None:
        """The next step, with this process' part of a batch."""
        ranks, progress, device = self.ranks, self.progress, self.train.labels.device
        mine = Draw(*(each.chunk(ranks.count)[ranks.rank] for each in draw))
        x_nat, labels, noise = self.views.batch(mine)
        layout = memory_format(self.config.channels_last)
        x_nat = x_nat.contiguous(memory_format=layout)
        batch = Batch(x_nat, labels, noise.contiguous(memory_format=layout))
        if isinstance(self.teacher, RememberingTeacher):
            self.teacher.about_to_see(x_nat, self.views.numbers(mine))
        # Nothing here draws from torch's global state, but a student with dropout does.
        key = *self.key(), progress.step, "student", *ranks.key()
        with global_generator(*key, device=device):
            train_step(
                self.method,
                self.engine,
                self.teacher,
                batch,
                self.attack,
                self.optimizer,
                self.see,
            )
        ranks.mean_(self.student.buffers())
        progress.step += 1

    def see(self, figures: dict[str, Tensor]) -> None:
        """The figures of a step: looked at now or, to spare an accelerator the wait, later."""
        self.unseen.append(figures)
        if len(self.unseen) >= self.config.check_every:
            self.look(before_the_step=True)

    def look(self, *, before_the_step: bool = False) -> None:
        """Take the figures that were not looked at into those of the epoch. Raises NonFiniteError,
        which names the first step that is not finite."""
        if not self.unseen:
            return
        together = torch.stack([torch.stack(list(each.values())) for each in self.unseen])
        rows = (self.ranks.total(together) / self.ranks.count).tolist()
        names, first = list(self.unseen[0]), self.progress.step + before_the_step - len(rows) + 1
        self.unseen = []
        for number, row in enumerate(rows, first):
            figures = dict(zip(names, row, strict=True))
            if not all(map(math.isfinite, row)):
                state = {name: plain(tensor) for name, tensor in self.method.state_dict().items()}
                raise NonFiniteError(
                    f"step {number}: {figures}, {state}",
                    "a lower learning_rate may help; what was saved before stays",
                )
            del figures["gradient"]
            for name, value in figures.items():
                self.progress.losses[name] = self.progress.losses.get(name, 0.0) + value

    def tell(self, report: StepReport) -> None:
        """Tell the observer of a batch; if it wants to stop, all processes stop at this step."""
        stop = 0
        try:
            self.on_step(report)
        except Interrupted as request:
            stop = request.signal_number
        if stop := self.ranks.greatest(stop, self.train.labels.device):
            raise Interrupted(stop)

    def sum_class_means(self) -> None:
        """Of all processes, in each."""
        device = self.train.labels.device
        for mean in self.method.class_means():
            mean.sums = self.ranks.total(mean.sums.to(device))
            mean.counts = self.ranks.total(mean.counts.to(device))

    def keep_class_means_once(self) -> None:
        """In the first process only, where they are sums over all."""
        if not self.ranks.first:
            for mean in self.method.class_means():
                mean.reset()

    def validated(self) -> ClassAccuracies:
        """The accuracies of the student on the validation images."""
        number = self.progress.epoch
        try:
            return validate(
                self.tested,
                self.validation,
                epsilon=self.config.epsilon,
                batch_size=self.config.batch_size,
                on_batch=lambda *done: self.tell(StepReport(number, "validation", *done)),
                ranks=self.ranks,
            )
        except NonFiniteError as error:
            raise NonFiniteError(f"validation: {error}", error.way_out) from error

    def state(self) -> dict[str, Any]:
        """All that the rest of the training depends on, as tensors and plain values."""
        self.look()
        self.sum_class_means()
        self.keep_class_means_once()
        return {
            "progress": asdict(self.progress),
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.student.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(state["method"])
        self.keep_class_means_once()
        self.progress = Progress(**state["progress"])


@dataclass
class Saved:
    """A training and its run directory."""

    training: Training
    run: RunDirectory
    about: dict[str, Any]
    identity: dict[str, Any]

    def record(self, report: EpochReport) -> None:
        """Put an epoch on the disk. The checkpoint comes last: what it does not know of is
        dropped on resuming, and computed again."""
        if report.is_best:
            best = {"model": self.training.best, "record": report.record()}
            self.run.put(self.about | best, self.run.best)
        self.run.append(report.record())
        self.save_last()

    def save_last(self) -> None:
        rest = {"identity": self.identity, **self.training.state()}
        self.run.put(self.about | rest, self.run.last)

    def resume(self) -> None:
        """Take up what is on the disk, if anything is. Raises CheckpointError if that is another
        training."""
        training = self.training
        self.run.path.mkdir(parents=True, exist_ok=True)
        if self.run.last.exists():
            state = load(self.run.last)
            differences = compare(state["identity"], self.identity)
            if differences:
                raise CheckpointError(
                    f"{self.run.path} holds another training: {'; '.join(differences)}",
                    "give the same settings, or another --out",
                )
            training.load_state(state)
        finished = training.progress.epoch - 1
        self.run.keep_records(finished)
        if finished:
            training.best = load(self.run.best)["model"]


def identity(
    student: nn.Module,
    teacher: nn.Module | None,
    train: ImageSet,
    validation: ImageSet,
    config: TrainConfig,
    role: Role,
) -> dict[str, Any]:
    """All that decides what a training computes: the same identity, the same numbers."""
    return {
        **asdict(config),
        "role": role,
        "training_images": train.digest(),
        "validation_images": validation.digest(),
        "initial_weights": digest(student.state_dict()),
        "teacher": digest(teacher.state_dict()) if teacher is not None else "none",
    }


def compare(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, as `name: there, here`."""
    return [
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name)
    ]
