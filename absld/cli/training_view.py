"""What a person sees of a run: plain lines, and on a terminal what moves below them."""

import math
import time
from typing import IO, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from absld.config.settings import TrainConfig
from absld.metrics import fairness, worst_tenth
from absld.progress import EpochReport, Role, StepReport
from absld.runs.training_run import Result, Stops

HEAD = "epoch     lr    loss  clean robust  worst    NSD temperatures seconds images/s"
SHOWN_CLASSES = 12
Own = TypeVar("Own", bound="Lines")


class Lines:
    """Plain lines; on a terminal, what `live` shows moves below them and leaves nothing behind."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        console = Console(file=stream)
        self.live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self: Own) -> Own:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self.live:
            self.live.update("")
            self.live.stop()

    def line(self, text: str) -> None:
        if self.live:
            self.live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)


class View:
    """A run as plain lines, one an epoch. An observer of absld.runs.training_run."""

    def __init__(self, stream: IO[str], stop: Stops) -> None:
        self.stream, self.stop = stream, stop
        self.title = ""

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def line(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self.line(text)

    def begin(self, role: Role, config: TrainConfig, classes: tuple[str, ...]) -> None:
        self.stop.training = True
        # Said with the first epoch: a training found finished has none.
        self.title = f"{role} by {config.method}, {config.epochs} epochs, seed {config.seed}"

    def step(self, report: StepReport) -> None:
        self.stop.check()

    def epoch(self, report: EpochReport) -> None:
        if self.title:
            self.line(f"{self.title}\n{HEAD}")
            self.title = ""
        self.line(epoch_line(report))

    def end(self) -> None:
        self.stop.check()
        self.stop.training = False

    def result(self, result: Result) -> None:
        """The classes of the student under test, and the digests."""
        self.line(str(result.run))
        self.line(f"{'class':22}   clean  PGD-20")
        for name, clean, robust in result_rows(result):
            self.line(f"{name:22} {clean:7.2%} {robust:7.2%}")
        if result.warning:
            self.line(result.warning)
        if result.teacher_sha256:
            self.line(f"teacher sha256: {result.teacher_sha256}")
        self.line(f"student sha256: {result.student_sha256}")


class LiveView(View):
    """The same lines on a terminal; below them a bar with the time left, and the temperatures."""

    def __init__(self, console: Console, stop: Stops) -> None:
        super().__init__(console.file, stop)
        self.console = console
        self.live = Live(console=console, refresh_per_second=8, transient=True)
        self.classes: tuple[str, ...] = ()

    def __enter__(self) -> "LiveView":
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.update("")
        self.live.stop()

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, role: Role, config: TrainConfig, classes: tuple[str, ...]) -> None:
        super().begin(role, config, classes)
        self.role, self.config, self.classes = role, config, classes
        self.temperatures: Table | str = ""
        self.started, self.first = time.perf_counter(), 0.0

    def step(self, report: StepReport) -> None:
        within = report.done / report.total if report.phase == "training" else 1.0
        done = report.epoch - 1 + within
        self.first = self.first or done
        self.live.update(Group(self.bar(report, done), self.temperatures))
        super().step(report)

    def bar(self, report: StepReport, done: float) -> Table:
        """The epoch so far, and the time left of the training."""
        spent = time.perf_counter() - self.started
        rate = (done - self.first) / spent
        left = time_text((self.config.epochs - done) / rate) if rate > 0 else "-"
        row = Table.grid(padding=(0, 1))
        row.add_row(
            f"{self.role} {report.epoch}/{self.config.epochs}",
            ProgressBar(total=report.total, completed=report.done, width=30),
            f"{report.phase} {report.done}/{report.total}",
            f"{left} left",
        )
        return row

    def epoch(self, report: EpochReport) -> None:
        super().epoch(report)
        if "temperature_adv" in report.per_class:
            self.temperatures = temperature_table(report, self.classes, self.config)
        self.live.refresh()

    def end(self) -> None:
        self.live.update("")
        super().end()


def view_of(stream: IO[str], stop: Stops) -> View:
    """The view that suits a stream: what moves is for terminals only."""
    console = Console(file=stream)
    return LiveView(console, stop) if console.is_terminal else View(stream, stop)


def epoch_line(report: EpochReport) -> str:
    clean, robust = report.clean, report.robust
    temperatures = [t for name, t in report.per_class.items() if name.startswith("temperature")]
    low = min((t.min().item() for t in temperatures), default=1.0)
    high = max((t.max().item() for t in temperatures), default=1.0)
    return (
        f"{report.epoch:5} {report.learning_rate:6.4f} {report.loss:7.4f} {clean.average:6.1%} "
        f"{robust.average:6.1%} {robust.worst:6.1%} {robust.normalized_std:6.3f}  "
        f"{low:4.2f} - {high:4.2f} {report.seconds:7.1f} {report.images_per_second:8.0f}"
    )


def result_rows(result: Result) -> list[tuple[str, float, float]]:
    """Name, clean and robust: of each class, and of the summaries."""
    clean, robust = result.accuracies
    rows = list(zip(result.classes, clean.tolist(), robust.tolist(), strict=True))
    rows.append(("worst 10 % of classes", worst_tenth(clean), worst_tenth(robust)))
    names = ("average", "worst class", "NSD")
    rows += zip(names, fairness(clean), fairness(robust), strict=True)
    return rows


def temperature_table(report: EpochReport, classes: tuple[str, ...], config: TrainConfig) -> Table:
    """Temperature and robust accuracy by class; of many classes the coldest and the warmest."""
    adv, nat = report.per_class["temperature_adv"], report.per_class["temperature_nat"]
    order = list(range(len(classes)))
    if len(order) > SHOWN_CLASSES:
        by_heat = adv.argsort().tolist()
        order = by_heat[: SHOWN_CLASSES // 2] + by_heat[-SHOWN_CLASSES // 2 :]
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("class", "T adv", "", "T nat", "robust"):
        table.add_column(name, justify="left" if name in ("class", "") else "right", no_wrap=True)
    for k in order:
        table.add_row(
            Text(classes[k][:20]),
            f"{adv[k].item():.2f}",
            heat(adv[k], config),
            f"{nat[k].item():.2f}",
            f"{report.accuracies.robust[k].item():.0%}",
        )
    return table


def heat(temperature: Tensor, config: TrainConfig) -> Text:
    """A bar from the least to the greatest temperature, in logarithms: blue is colder than 1."""
    low, high = config.temperature_lower, config.temperature_upper
    value = temperature.item()
    length = round(24 * math.log(value / low) / max(math.log(high / low), 1e-9))
    return Text("━" * max(length, 1), style="blue" if value < 1 else "red")


def time_text(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
