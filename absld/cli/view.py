"""The base of what a person sees of a command: lines, and on a terminal a live region."""

import contextlib
import time
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from absld.cli.output import Output
from absld.cli.printing import say
from absld.progress import Observer, StepReport, TrainingStart
from absld.text import printable, time_text

Own = TypeVar("Own", bound="View")  # Self, which beartype cannot check in a method
LINE_EVERY = 30.0  # seconds between lines of progress where there is no live region


class View(Observer):
    """An observer that prints lines; on a terminal, a live region moves below them.

    The region leaves nothing behind. Elsewhere there are only the lines, without escape codes.
    """

    def __init__(self, output: Output) -> None:
        self.stream, self.stop = output.stream, output.stop
        self.last_line = time.perf_counter()  # of progress
        self.loading, self.load_began = "", 0.0
        console = Console(file=self.stream)
        self.live = (
            Live(console=console, refresh_per_second=8, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self: Own) -> Own:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.show()
        if self.live:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.live.stop()

    def line(self, text: str) -> None:
        """Print a line, whatever its width; where nobody can read it, the work goes on."""
        with contextlib.suppress(OSError):
            if self.live:
                self.live.console.print(Text(printable(text)), soft_wrap=True)
            else:
                say(text, self.stream)

    def show(self, *rows: RenderableType) -> None:
        """Replace the live region, if there is one."""
        if self.live:
            self.live.update(Group(*rows))

    def progress(self, title: str, done: float, total: float, left: str, *, end: bool) -> None:
        """Show progress: a bar in the live region, else a line now and then and at the end."""
        self.show(progress_row(title, done, total, left))
        self.line_of_progress(f"{title}, {left}", end=end)

    def line_of_progress(self, text: str, *, end: bool = False) -> None:
        """Print a line of progress where there is no live region, now and then and at the end."""
        now = time.perf_counter()
        if not self.live and (end or now - self.last_line > LINE_EVERY):
            self.line(text)
            self.last_line = now

    def note(self, text: str) -> None:
        self.line(text)

    def warn(self, text: str) -> None:
        self.line(text)

    def wait(self, text: str) -> None:
        self.line(text)

    def load(self, name: str, done: int, total: int, unit: str = "bytes") -> None:
        if name != self.loading:
            self.loading, self.load_began = name, time.perf_counter()
        left = time_left(time.perf_counter() - self.load_began, done, total) if total else ""
        counts = [f"{n / 2**20:,.1f}" if unit == "bytes" else f"{n:,}" for n in (done, total)]
        unit = "MiB" if unit == "bytes" else unit
        title = f"{name}: {' of '.join(counts[: 2 if total else 1])} {unit}"
        self.progress(title, done, total, left, end=False)
        if done == total:
            self.loading = ""
            self.show()

    def begin_training(self, start: TrainingStart) -> None:
        self.stop.training = True
        self.stop.role, self.stop.epoch = start.role, 1

    def step(self, report: StepReport) -> None:
        self.stop.epoch = report.epoch
        self.stop.check()

    def end_training(self) -> None:
        self.stop.check()
        self.stop.training = False


def progress_row(title: str, done: float, total: float, text: str) -> Table:
    """Return a row with a title, a bar and a text."""
    row = Table.grid(padding=(0, 1))
    bar = ProgressBar(total=total, completed=done, width=24)
    row.add_row(Text(printable(title)), bar, Text(printable(text)))
    return row


def time_left(spent: float, done: float, total: float) -> str:
    """Estimate the time left from the time spent on a part of the work."""
    return f"{time_text(spent * (total - done) / done) if done > 0 else '-'} left"


def epochs_done(report: StepReport) -> float:
    """Return the epochs of a training that are done, with the fraction of the current one."""
    within = report.done / report.total if report.phase == "training" else 1.0
    return report.epoch - 1 + within
