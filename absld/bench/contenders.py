"""The steps that the bench compares: that of absld_min.py, and the engine's with its techniques."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import absld_min
from absld.bench.timing import Timer
from absld.config.settings import TrainConfig
from absld.data.augmentation import Draw
from absld.data.dataset import ImageSet
from absld.engine.logit_cache import CachedTeacher, LogitCacheSettings
from absld.engine.precision import float32_precision, resolve_device, to_memory_format
from absld.engine.step_metrics import StepMetrics
from absld.errors import NonFiniteError
from absld.evaluation.validation import freeze
from absld.models.architectures import build_model
from absld.seeding import generator
from absld.stepper import Stepper

PARTS = ("teacher", "attack", "training")  # of a step


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a bench. rounds: counted steps of each contender, after one that warms up."""

    student: str = "resnet18"
    teacher_model: str = "wrn-34-10"
    batch_size: int = 128
    image_size: int = 32
    classes: int = 10
    images: int = 1000
    rounds: int = 5
    compile: bool = True
    device: str = "auto"

    @property
    def resolved_device(self) -> torch.device:
        return resolve_device(self.device)

    def network(self, role: str) -> nn.Module:
        """Build the untrained student or teacher; each call returns a new one, always the same."""
        name = self.teacher_model if role == "teacher" else self.student
        return build_model(name, self.classes, "bench", role).to(self.resolved_device)

    def image_set(self) -> ImageSet:
        """Draw images of noise, at least a batch; each call returns the same."""
        device, count = self.resolved_device, max(self.images, self.batch_size)
        shape = (count, 3, self.image_size, self.image_size)
        random = generator("bench", device=device)
        images = torch.randint(256, shape, generator=random, device=device, dtype=torch.uint8)
        labels = torch.arange(count, device=device) % self.classes
        return ImageSet(images, labels, tuple(map(str, range(self.classes))))


class Contender(Protocol):
    """One way to take a training step; its timer has four marks then, around the PARTS."""

    timer: Timer

    def prepare(self) -> None:
        """Prepare the next step; this is not timed."""

    def step(self) -> None: ...


def add_marks(timer: Timer, student: nn.Module, teacher: nn.Module) -> None:
    """Mark the ends of the first two PARTS of each step, by hooks on the networks.

    The first ends with the teacher's first forward, the second before the student's first forward
    in train mode after it.
    """

    def end_teacher(*_: object) -> None:
        if len(timer.marks) == 1:
            timer.mark()

    def end_attack(module: nn.Module, _: object) -> None:
        if module.training and len(timer.marks) == 2:
            timer.mark()

    teacher.register_forward_hook(end_teacher)
    student.register_forward_pre_hook(end_attack)


class PlainStep:
    """The step of absld_min.py, in the precision and the memory format that its main sets."""

    def __init__(self, bench: BenchConfig) -> None:
        device = bench.resolved_device
        self.config = absld_min.Config(device=str(device), batch_size=bench.batch_size)
        channels_last = device.type == "cuda"
        self.student = to_memory_format(bench.network("student"), channels_last)
        self.teacher = freeze(to_memory_format(bench.network("teacher"), channels_last))
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
        )
        self.temperature = torch.ones(2, bench.classes, device=device)
        self.batches = self.endless_batches(bench.image_set())
        self.timer = Timer(device)
        add_marks(self.timer, self.student, self.teacher)

    def endless_batches(self, data: ImageSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for epoch in range(10**9):
            yield from absld_min.batches(self.config, data.images, data.labels, epoch)

    def prepare(self) -> None: ...

    def step(self) -> None:
        with float32_precision(self.config.precision):
            self.timer.mark()
            batch = next(self.batches)
            loss, *_ = absld_min.absld_step(
                self.config, self.student, self.teacher, self.temperature, batch
            )
            if not loss.isfinite():  # as in its training loop: this waits for the device
                raise NonFiniteError(
                    "the loss of the absld_min.py step is NaN or infinite", "report this"
                )
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.timer.mark()


class EngineStep:
    """The step of `absld train` with some techniques on; `folder` has the logit cache, if any."""

    def __init__(self, bench: BenchConfig, settings: Mapping[str, Any], folder: str) -> None:
        self.config = train_config(settings, batch_size=bench.batch_size)
        self.stepper = Stepper(
            bench.network("student"),
            bench.network("teacher"),
            bench.image_set(),
            self.config,
            logit_cache=(
                LogitCacheSettings(Path(folder), 64.0) if settings.get("logit_cache") else None
            ),
        )
        self.metrics = StepMetrics(self.config.check_every)
        self.draws = self.endless_draws()
        self.timer = Timer(bench.resolved_device)
        assert self.stepper.teacher is not None
        add_marks(self.timer, self.stepper.engine, self.stepper.teacher)

    def endless_draws(self) -> Iterator[tuple[Draw, int, int]]:
        """Yield draws with the number of their epoch, and of their step in it."""
        for epoch in itertools.count(1):
            for step, draw in enumerate(self.stepper.draws(epoch)):
                yield draw, epoch, step

    def prepare(self) -> None:
        """Draw the next batch, and make sure that the logit cache has it."""
        self.draw, self.epoch, self.number = next(self.draws)
        if isinstance(self.stepper.teacher, CachedTeacher):
            batch = self.stepper.batch(self.draw)
            self.stepper.teacher(batch.x_nat, batch.views)

    def step(self) -> None:
        with float32_precision(self.config.precision):
            self.timer.mark()
            self.stepper.step(self.draw, self.epoch, self.number, self.check)
            self.timer.mark()

    def check(self, metrics: dict[str, Tensor]) -> None:
        self.metrics.add(metrics, self.number + 1)


def train_config(settings: Mapping[str, Any], **others: Any) -> TrainConfig:
    """Return the training's settings; a logit cache is not one of them."""
    given = {name: value for name, value in settings.items() if name != "logit_cache"}
    return TrainConfig(**given, **others)


def techniques(device: torch.device, *, compile: bool) -> dict[str, dict[str, Any]]:
    """Return the settings of each technique that works on this device, by name, in the order in
    which they are tried. `logit_cache` stands for a filled one."""
    settings: dict[str, dict[str, Any]] = {
        "fold-batch-norm": {"fold_batch_norm": True},
        "channels-last": {"channels_last": True},
        "teacher-precision bf16": {"teacher_precision": "bf16"},
        "attack-precision bf16": {"attack_precision": "bf16"},
        "precision bf16": {"precision": "bf16"},
    }
    if compile:
        settings["compile"] = {"compile": True}
    if device.type == "cuda":
        settings |= {"cuda-graph": {"cuda_graph": True}, "check-every 100": {"check_every": 100}}
    return settings | {"a filled logit cache": {"logit_cache": True}}


def combine(kept: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings kept so far with those of one more technique.

    A precision of all parts that is tried after that of one part does not change the latter.
    """
    combined = {**kept, **settings}
    if "precision" in settings:
        before = kept.get("precision", TrainConfig.precision)
        for part in ("teacher_precision", "attack_precision"):
            combined.setdefault(part, before)
    return combined
