"""How fast is a training step here, and what is each technique worth?

In one run, on one machine: the plain step of absld_min.py, then the package's engine with each
technique added in turn. Steps take turns, so that each is compared with its neighbours in time; a
technique that does not pay is left out of what follows. Networks are untrained and images noise:
neither changes the arithmetic.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import absld_min
from absld.attack import frozen_eval, kl
from absld.bench.peak_throughput import Ceilings
from absld.bench.timing import Stopwatch, memory_taken
from absld.config.settings import TrainConfig
from absld.data.augmentation import Draw
from absld.data.dataset import ImageSet, pixels
from absld.engine.engine import Engine, training_attack
from absld.engine.logit_cache import Bank, RememberingTeacher, bank_bytes, rows_of
from absld.engine.precision import arithmetic, laid_out, resolve_device
from absld.errors import NonFiniteError
from absld.evaluation.validation import freeze
from absld.models.architectures import build_model
from absld.seeding import generator
from absld.storage.environment import environment
from absld.trainer import Training

SCHEMA = "absld-bench-1"
PARTS = ("teacher", "attack", "training")
PAYS = 1.02  # a technique stays if it makes the median step faster by this factor
SIZES = ((1_000, 10), (50_000, 10), (1_000, 200))  # images and classes, for growth
STARTS = 4  # of the attack, whose spread is the yardstick of its fidelity


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured. rounds: counted steps of each kind, after one that warms up."""

    student: str = "resnet18"
    teacher_model: str = "wrn-34-10"
    batch_size: int = 128
    image_size: int = 32
    classes: int = 10
    images: int = 1000
    rounds: int = 5
    compile: bool = True
    device: str = "auto"


# --- What takes a step ---


class Setting(NamedTuple):
    """Networks and images, made anew from keys for each contender."""

    config: BenchConfig
    device: torch.device

    def network(self, role: str) -> nn.Module:
        name = self.config.teacher_model if role == "teacher" else self.config.student
        return build_model(name, self.config.classes, "bench", role).to(self.device)

    def images(self) -> ImageSet:
        config = self.config
        count = max(config.images, config.batch_size)  # an epoch has a batch
        shape = (count, 3, config.image_size, config.image_size)
        random = generator("bench", device=self.device)
        images = torch.randint(256, shape, generator=random, device=self.device, dtype=torch.uint8)
        labels = torch.arange(count, device=self.device) % config.classes
        return ImageSet(images, labels, tuple(map(str, range(config.classes))))


class Contender(Protocol):
    """One way to take a step; `watch` has four marks after it."""

    watch: Stopwatch

    def prepare(self) -> None:
        """What is not timed: that the bank has the views that come next."""

    def step(self) -> None: ...


def marked(watch: Stopwatch, student: nn.Module, teacher: nn.Module) -> None:
    """Mark when the teacher has answered, and when the student is trained on the attack's images:
    the ends of the first two PARTS of a step."""

    def answered(*_: object) -> None:
        if len(watch.marks) == 1:
            watch.mark()

    def trains(module: nn.Module, _: object) -> None:
        if module.training and len(watch.marks) == 2:
            watch.mark()

    teacher.register_forward_hook(answered)
    student.register_forward_pre_hook(trains)


class PlainStep:
    """The step of absld_min.py, in the arithmetic and the memory format that its main sets."""

    def __init__(self, setting: Setting) -> None:
        given, device = setting.config, setting.device
        self.config = absld_min.Config(device=str(device), batch_size=given.batch_size)
        self.student, teacher = (
            laid_out(setting.network(role), device.type == "cuda")
            for role in ("student", "teacher")
        )
        self.teacher = freeze(teacher)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4
        )
        self.temperature = torch.ones(2, given.classes, device=device)
        self.data = setting.images()
        self.batches = self.endless()
        self.watch = Stopwatch(device)
        marked(self.watch, self.student, self.teacher)

    def endless(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for epoch in range(10**9):
            yield from absld_min.batches(self.config, self.data.images, self.data.labels, epoch)

    def prepare(self) -> None:
        pass

    def step(self) -> None:
        with arithmetic(self.config.precision):
            self.watch.mark()
            batch = next(self.batches)
            loss, *_ = absld_min.absld_step(
                self.config, self.student, self.teacher, self.temperature, batch
            )
            if not loss.isfinite():  # as it does, which waits for the device
                raise NonFiniteError("the loss of the plain step", "report this")
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.watch.mark()


class EngineStep:
    """That of `absld train`, with some techniques on."""

    def __init__(self, setting: Setting, techniques: Mapping[str, Any], folder: str) -> None:
        given = dict(techniques)
        bank = Bank(Path(folder), 64.0) if given.pop("bank", False) else None
        config = TrainConfig(batch_size=setting.config.batch_size, seed=0, epochs=10**6, **given)
        data = setting.images()
        self.training = Training(
            setting.network("student"),
            setting.network("teacher"),
            data,
            data.subset(torch.arange(2)),
            config,
            "student",
            lambda report: None,
            bank,
        )
        self.upcoming = self.endless()
        self.draw = next(self.upcoming)
        self.watch = Stopwatch(setting.device)
        assert self.training.teacher is not None
        marked(self.watch, self.training.engine, self.training.teacher)

    def endless(self) -> Iterator[Draw]:
        training = self.training
        while True:
            yield from training.draws()
            training.progress.epoch, training.progress.step = training.progress.epoch + 1, 0

    def prepare(self) -> None:
        self.draw = next(self.upcoming)
        teacher = self.training.teacher
        if isinstance(teacher, RememberingTeacher):
            x_nat = self.training.views.batch(self.draw).x_nat
            teacher.about_to_see(x_nat, self.training.views.numbers(self.draw))
            teacher(x_nat)
            self.watch.marks = []

    def step(self) -> None:
        self.watch.mark()
        self.training.step(self.draw)
        self.watch.mark()


# --- Techniques ---


class Technique(NamedTuple):
    """Settings of training that are tried together; `bank` is a filled one."""

    name: str
    settings: dict[str, Any]


def techniques(device: torch.device, *, compile: bool) -> list[Technique]:
    """Those that this device has, in the order in which they are tried."""
    cuda = device.type == "cuda"
    listed = [
        (True, Technique("fold-batch-norm", {"fold_batch_norm": True})),
        (True, Technique("channels-last", {"channels_last": True})),
        (True, Technique("teacher-precision bf16", {"teacher_precision": "bf16"})),
        (True, Technique("attack-precision bf16", {"attack_precision": "bf16"})),
        (True, Technique("precision bf16", {"precision": "bf16"})),
        (compile, Technique("compile", {"compile": True})),
        (cuda, Technique("cuda-graph", {"cuda_graph": True})),
        (cuda, Technique("check-every 100", {"check_every": 100})),
        (True, Technique("a filled bank", {"bank": True})),
    ]
    return [technique for there, technique in listed if there]


def added(kept: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings kept so far and one technique more. A precision of all parts that comes after
    one of a part does not change that one."""
    result = {**kept, **settings}
    if "precision" in settings:
        standing = kept.get("precision", TrainConfig.precision)
        for part in ("teacher_precision", "attack_precision"):
            if part not in kept:
                result[part] = standing
    return result


# --- Figures ---


@dataclass
class Times:
    """Seconds of the parts of each step of a contender."""

    spans: list[list[float]] = field(default_factory=list)

    def totals(self) -> list[float]:
        return [sum(spans) for spans in self.spans]


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def take_turns(
    contenders: list[Contender], rounds: int, between: Callable[[], None]
) -> list[Times]:
    """Steps of all contenders in turn, the first round not counted, each round begun by another."""
    times = [Times() for _ in contenders]
    for number in range(rounds + 1):
        for k in range(len(contenders)):
            k = (k + number) % len(contenders)
            contenders[k].prepare()
            contenders[k].step()
            spans = contenders[k].watch.spans()
            if number:
                times[k].spans.append(spans)
        between()
    return times


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """Counts floating point operations by torch's formulas: a multiplication and an addition are
    two. (Its own counter follows modules, which an attack's gradients do not go along with.)"""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def operations(plain: PlainStep) -> dict[str, int]:
    """The operations of the parts of a plain step."""
    counts: list[int] = []
    with Operations() as counter:

        def answered(*_: object) -> None:
            counts.append(counter.total)

        def trains(module: nn.Module, _: object) -> None:
            if module.training and len(counts) == 1:
                counts.append(counter.total)

        hooks = [
            plain.teacher.register_forward_hook(answered),
            plain.student.register_forward_pre_hook(trains),
        ]
        plain.step()
        counts.append(counter.total)
    for hook in hooks:
        hook.remove()
    plain.watch.spans()
    return {
        part: end - start for part, start, end in zip(PARTS, [0, *counts], counts, strict=False)
    }


class Fidelity:
    """What an attack reaches: the mean of its objective, by the student of the plain step in full
    precision, from the same starts. The yardstick is the spread of the plain attack over starts.
    """

    def __init__(self, setting: Setting, plain: PlainStep) -> None:
        self.setting = setting
        self.weights = {k: v.clone() for k, v in plain.student.state_dict().items()}
        config, device = setting.config, setting.device
        random = generator("bench", "labels", device=device)
        size = (config.batch_size, config.classes)
        labels = torch.randn(size, generator=random, device=device)
        self.objective = kl(F.softmax(3 * labels, dim=1))
        self.x_nat = pixels(setting.images().images[: config.batch_size])
        self.plain = self.reached(TrainConfig(), STARTS)

    def reached(self, config: TrainConfig, starts: int) -> list[float]:
        """From each of the first starts, by the engine with these settings."""
        judge, student = (self.setting.network("student") for _ in range(2))
        for network in (judge, student):
            network.load_state_dict(self.weights)
        engine = Engine(laid_out(student, config.channels_last), config)
        attack, found = training_attack(config), []
        for number in range(starts):
            random = generator("bench", "noise", number, device=self.setting.device)
            noise = 0.001 * torch.randn(
                self.x_nat.shape, generator=random, device=self.setting.device
            )
            x_adv = attack(engine, self.objective, self.x_nat, noise)
            with arithmetic("fp32"), frozen_eval(judge), torch.no_grad():
                found.append(float(self.objective(judge(x_adv))) / len(x_adv))
        return found

    def of(self, config: TrainConfig) -> dict[str, float]:
        """The objective from the first start, as a share of the plain attack's; and the least and
        the greatest share that the plain attack has from other starts."""
        (mine,) = self.reached(config, 1)
        first = self.plain[0]
        others = [value / first for value in self.plain]
        return {"share": mine / first, "least": min(others), "greatest": max(others)}


# --- The bench ---


class Bench:
    """Measures row by row; `document` holds all of them."""

    def __init__(self, config: BenchConfig) -> None:
        self.config = config
        self.device = resolve_device(config.device)
        self.setting = Setting(config, self.device)
        self.kept: dict[str, Any] = {}
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": asdict(config),
            "environment": environment(self.device),
            "rows": [],
            "growth": [],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """The plain step, the engine, and the engine with each technique."""
        with tempfile.TemporaryDirectory() as folder:
            plain = PlainStep(self.setting)
            self.operations = operations(plain)
            self.fidelity = Fidelity(self.setting, plain)
            engine = EngineStep(self.setting, {}, folder)
            first, times = self.trial([plain, engine], plain.config.precision)
            yield self.row("absld_min.py", {}, plain, first, first, None)
            yield self.row("absld, nothing on", {}, engine, times, first, None)
            for technique in techniques(self.device, compile=self.config.compile):
                settings = added(self.kept, technique.settings)
                candidate = EngineStep(self.setting, settings, folder)
                of_all = settings.get("precision", TrainConfig.precision)
                precision = settings.get("attack_precision", of_all)
                base, before, times = self.trial([plain, engine, candidate], precision)
                row = self.row(f"+ {technique.name}", settings, candidate, times, base, before)
                if row["kept"]:
                    self.kept, engine = settings, candidate
                yield row

    def trial(self, contenders: list[Contender], precision: str) -> list[Times]:
        self.ceilings = Ceilings(self.device, precision, self.config.batch_size)
        return take_turns(contenders, self.config.rounds, self.ceilings.measure)

    def row(
        self,
        name: str,
        settings: Mapping[str, Any],
        contender: Contender,
        times: Times,
        plain: Times,
        before: Times | None,
    ) -> dict[str, Any]:
        totals = times.totals()
        gain = ratios(before.totals(), totals) if before else None
        done = sum(self.operations.values())
        if settings.get("bank"):
            done -= self.operations["teacher"]
        rate = done / statistics.median(totals)
        config = TrainConfig(**{k: v for k, v in settings.items() if k != "bank"})
        figures = {
            "name": name,
            "settings": dict(settings),
            "kept": gain is None or gain["median"] >= PAYS,
            "images_per_second": spread([self.config.batch_size / each for each in totals]),
            "ratio_to_plain": ratios(plain.totals(), totals),
            "gain": gain,
            "seconds": {
                part: statistics.median(column)
                for part, column in zip(PARTS, zip(*times.spans, strict=True), strict=True)
            },
            "operations_per_second": rate,
            "ceilings": {"precision": self.ceilings.precision, **self.ceilings.best},
            "shares": {kind: rate / best for kind, best in self.ceilings.best.items()},
            "memory_bytes": self.memory(contender),
            "objective": self.fidelity.of(config),
        }
        self.document["rows"].append(figures)
        return figures

    def memory(self, contender: Contender) -> int | None:
        contender.prepare()
        taken = memory_taken(self.device, contender.step)
        contender.watch.spans()
        return taken

    def growth(self) -> Iterator[dict[str, Any]]:
        """What the engine, with the techniques that pay, costs for more images and more classes."""
        settings = [
            Setting(replace(self.config, images=images, classes=classes), self.device)
            for images, classes in SIZES
        ]
        with tempfile.TemporaryDirectory() as folder:
            contenders: list[Contender] = [
                EngineStep(setting, self.kept, folder) for setting in settings
            ]
            first, *_ = times = take_turns(contenders, self.config.rounds, lambda: None)
            on_disk = {path.stat().st_size for path in Path(folder).glob("*.bank")}
        for (images, classes), each, contender in zip(SIZES, times, contenders, strict=True):
            assert isinstance(contender, EngineStep)
            training = contender.training
            rows = rows_of(len(training.train), training.config.padding, training.config.flip)
            size = bank_bytes(rows, classes)
            rates = [self.config.batch_size / total for total in each.totals()]
            figures = {
                "name": f"{images:,} images, {classes} classes",
                "images": images,
                "classes": classes,
                "images_per_second": spread(rates),
                "ratio_to_first": ratios(first.totals(), each.totals()),
                "bank_bytes": size,
                "bank_on_disk": size in on_disk if on_disk else None,
            }
            self.document["growth"].append(figures)
            yield figures


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast, pair by pair."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
