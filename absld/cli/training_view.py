"""The view of a run: an epoch a line, and on a terminal the step and the temperatures."""

import math
import shlex
import time

from rich.table import Table
from rich.text import Text
from torch import Tensor

from absld.cli.view import View, epochs_done, progress_row, time_left
from absld.config.imports import names_code
from absld.config.settings import TrainConfig
from absld.metrics import fairness, worst_tenth
from absld.progress import EpochReport, StepReport, TrainingStart
from absld.runs.training_run import TrainingResult
from absld.text import clip, column

HEAD = "epoch     lr    loss  clean robust  worst    NSD temperatures seconds images/s"
MAX_CLASSES = 12  # in the live table of temperatures


class TrainingView(View):
    """An observer of absld.runs.training_run."""

    def begin_training(self, start: TrainingStart) -> None:
        super().begin_training(start)
        self.role, self.config, self.classes = start.role, start.config, start.classes
        if start.epoch <= self.config.epochs:  # a training that was finished before shows none
            self.line(heading(start))
            self.line(HEAD)
        self.temperatures: Table | str = ""
        self.started, self.first = time.perf_counter(), 0.0

    def step(self, report: StepReport) -> None:
        done = epochs_done(report)
        self.first = self.first or done
        left = time_left(
            time.perf_counter() - self.started, done - self.first, self.config.epochs - self.first
        )
        title = f"{self.role} {report.epoch}/{self.config.epochs}"
        text = f"{report.phase} {report.done}/{report.total}"
        row = progress_row(title, report.done, report.total, f"{text}  {left}")
        self.show(row, self.temperatures)
        self.line_of_progress(f"{title}, {text}, {left}")
        super().step(report)

    def epoch(self, report: EpochReport) -> None:
        self.line(epoch_line(report))
        self.last_line = time.perf_counter()
        if "temperature_adv" in report.per_class:
            self.temperatures = temperature_table(report, self.classes, self.config)

    def end_training(self) -> None:
        self.show()
        super().end_training()


def heading(start: TrainingStart) -> str:
    """Return what is trained, and how."""
    of, config = start.network, start.config
    return f"{start.role} by {config.method}: {of}, {config.epochs} epochs, seed {config.seed}"


def epoch_line(report: EpochReport) -> str:
    """Return the row of an epoch under HEAD."""
    clean, robust = report.clean, report.robust
    temperatures = [t for name, t in report.per_class.items() if name.startswith("temperature")]
    low = min((t.min().item() for t in temperatures), default=1.0)
    high = max((t.max().item() for t in temperatures), default=1.0)
    return (
        f"{report.epoch:5} {report.learning_rate:6.4f} {report.loss:7.4f} {clean.average:6.1%} "
        f"{robust.average:6.1%} {robust.worst:6.1%} {robust.normalized_std:6.1%}  "
        f"{low:4.2f} - {high:4.2f} {report.seconds:7.1f} {report.images_per_second:8.0f}"
    )


def training_lines(result: TrainingResult, student: str) -> list[str]:
    """Return the result of a run: accuracies by class and in summary, digests, the next command.

    student: as the setting names it.
    """
    clean, robust = result.accuracies
    # A run names the code of its network, but is never trusted with it.
    model = ["--model", student] if names_code(student) else []
    command = ["absld", "evaluate", str(result.run), *model]
    rows = list(zip(result.classes, clean.tolist(), robust.tolist(), strict=True))
    rows.append(("worst 10 % of classes", worst_tenth(clean), worst_tenth(robust)))
    names = ("average", "worst class", "NSD")
    rows += zip(names, fairness(clean), fairness(robust), strict=True)
    return [
        str(result.run),
        f"{'class':22}   clean  PGD-20",
        *(f"{column(name, 22)} {clean:7.2%} {robust:7.2%}" for name, clean, robust in rows),
        *([result.warning] if result.warning else []),
        *([f"teacher sha256: {result.teacher_sha256}"] if result.teacher_sha256 else []),
        f"student sha256: {result.student_sha256}",
        f"evaluate it: {shlex.join(command)}",
    ]


def temperature_table(report: EpochReport, classes: tuple[str, ...], config: TrainConfig) -> Table:
    """Return temperatures and robust accuracy by class; of many classes only the extremes."""
    adv, nat = report.per_class["temperature_adv"], report.per_class["temperature_nat"]
    order = list(range(len(classes)))
    if len(order) > MAX_CLASSES:
        by_temperature = adv.argsort().tolist()
        order = by_temperature[: MAX_CLASSES // 2] + by_temperature[-MAX_CLASSES // 2 :]
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("class", "T adv", "", "T nat", "robust"):
        table.add_column(name, justify="left" if name in ("class", "") else "right", no_wrap=True)
    for k in order:
        table.add_row(
            Text(clip(classes[k], 20)),
            f"{adv[k].item():.2f}",
            temperature_bar(adv[k], config),
            f"{nat[k].item():.2f}",
            f"{report.accuracies.robust[k].item():.0%}",
        )
    return table


def temperature_bar(temperature: Tensor, config: TrainConfig) -> Text:
    """Return a bar on a logarithmic scale between both bounds; blue is below 1."""
    low, high = config.temperature_lower, config.temperature_upper
    value = temperature.item()
    length = round(24 * math.log(value / low) / max(math.log(high / low), 1e-9))
    return Text("━" * max(length, 1), style="blue" if value < 1 else "red")
