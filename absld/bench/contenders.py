"""The steps that the bench compares: that of absld_min.py, and those of the engine."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

import absld_min
from absld.bench.timing import Timer
from absld.config.settings import TrainConfig
from absld.data.augmentation import Draw
from absld.data.dataset import InMemoryImages
from absld.engine.logit_cache import CachedTeacher, LogitCacheSettings, cached_epoch
from absld.engine.precision import float32_precision, resolve_device, to_memory_format
from absld.engine.step_metrics import StepMetrics
from absld.engine.techniques import Techniques, choose_techniques
from absld.errors import NonFiniteError
from absld.evaluation.validation import freeze
from absld.models.architectures import build_model
from absld.seeding import generator
from absld.stepper import Stepper

PARTS = ("teacher", "attack", "training")  # of a step


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of a bench. rounds: the most measured steps of each contender in a row."""

    student: str = "resnet18"
    teacher_model: str = "wrn-34-10"
    batch_size: int = 128
    image_size: int = 32
    classes: int = 10
    images: int = 1000
    rounds: int = 5
    minutes: float = 10.0
    device: str = "auto"

    @property
    def resolved_device(self) -> torch.device:
        return resolve_device(self.device)

    def network(self, role: str) -> nn.Module:
        """Build the untrained student or teacher; each call returns a new one, always the same."""
        name = self.teacher_model if role == "teacher" else self.student
        shape = (3, self.image_size, self.image_size)
        model = build_model(name, self.classes, "bench", role, image_shape=shape)
        return model.to(self.resolved_device)

    def image_set(self) -> InMemoryImages:
        """Draw images of noise, at least a batch; each call returns the same."""
        device, count = self.resolved_device, max(self.images, self.batch_size)
        shape = (count, 3, self.image_size, self.image_size)
        random = generator("bench", device=device)
        images = torch.randint(256, shape, generator=random, device=device, dtype=torch.uint8)
        labels = torch.arange(count, device=device) % self.classes
        return InMemoryImages(images, labels, tuple(map(str, range(self.classes))))


class Contender(Protocol):
    """One way to take a training step; its timer has four marks then, around the PARTS.

    cached: the teacher's logits come from a cache.
    """

    timer: Timer
    techniques: Techniques
    cached: bool

    def step(self) -> None: ...


def take_step(contender: Contender) -> list[float]:
    """Return the seconds of the PARTS of one step."""
    contender.step()
    return contender.timer.spans()


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


class FileStep:
    """The step of absld_min.py, in the precision and the memory format that its main sets."""

    cached = False

    def __init__(self, bench: BenchConfig) -> None:
        device = bench.resolved_device
        self.config = absld_min.Config(device=str(device), batch_size=bench.batch_size)
        auto = choose_techniques(TrainConfig(), device).precision  # the same arithmetic
        self.techniques = Techniques(
            precision=auto,
            attack_precision=auto,
            teacher_precision=auto,
            channels_last=device.type == "cuda",
        )
        self.student, self.teacher = (
            to_memory_format(bench.network(role), self.techniques.channels_last)
            for role in ("student", "teacher")
        )
        freeze(self.teacher)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
        )
        self.temperature = torch.ones(2, bench.classes, device=device)
        self.batches = self.endless_batches(bench.image_set())
        self.timer = Timer(device)
        add_marks(self.timer, self.student, self.teacher)

    def endless_batches(self, data: InMemoryImages) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for epoch in itertools.count(1):
            yield from absld_min.batches(self.config, data.images, data.labels, epoch)

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
    """The step of `absld train` with some techniques.

    cache_folder: takes a full logit cache, which the steps then use. Its logits are noise.
    """

    def __init__(
        self, bench: BenchConfig, techniques: Techniques, cache_folder: Path | None = None
    ) -> None:
        self.techniques = techniques
        self.stepper = Stepper(
            bench.network("student"),
            bench.network("teacher"),
            bench.image_set(),
            TrainConfig(**asdict(techniques), batch_size=bench.batch_size),
            logit_cache=LogitCacheSettings(cache_folder, 64.0) if cache_folder else None,
        )
        self.cached = isinstance(self.stepper.teacher, CachedTeacher)
        if isinstance(self.stepper.teacher, CachedTeacher):
            rows, words = self.stepper.teacher.cache.rows.shape
            noise = torch.randn(rows, words - 1, generator=generator("bench", "logits"))
            self.stepper.teacher.cache.write(torch.arange(rows), noise)
        self.metrics = StepMetrics(techniques.check_every)
        self.draws = self.endless_draws()
        self.timer = Timer(bench.resolved_device)
        assert self.stepper.teacher is not None
        add_marks(self.timer, self.stepper.engine, self.stepper.teacher)

    def endless_draws(self) -> Iterator[tuple[Draw, int, int]]:
        """Yield draws with the number of their epoch, and of their step in it."""
        for epoch in itertools.count(1):
            with cached_epoch(self.stepper.teacher):
                for step, draw in enumerate(self.stepper.draws(epoch)):
                    yield draw, epoch, step

    def step(self) -> None:
        with float32_precision(self.techniques.precision):
            self.timer.mark()
            draw, epoch, number = next(self.draws)

            def check(metrics: dict[str, Tensor]) -> None:
                self.metrics.add(metrics, number + 1)

            self.stepper.step(draw, epoch, number, check)
            self.timer.mark()
