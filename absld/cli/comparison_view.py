"""The view of a comparison: a line for each run, and on a terminal a bar below them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absld.cli.output import Output
from absld.cli.printing import Line, shows_styles
from absld.cli.view import View, epochs_done, progress_row, time_left
from absld.config.settings import Config
from absld.progress import AttackProgress, Check, Observer, StepReport, TrainingStart
from absld.report import paper_table
from absld.report.comparison_tables import terminal_lines
from absld.report.summary import number
from absld.runs.comparison_results import Comparison
from absld.tracking.start import tracked


@contextmanager
def observing(
    output: Output,
    settings: Mapping[str, Any],
    runs: Sequence[str] = (),
) -> Iterator[Observer]:
    """Yield a view of trainings, with their trackers.

    settings: of the trainings. runs: finished runs instead of trainings.
    """
    place = Path(runs[0]).parent if runs else settings.get("out", Config.out)
    with (
        ComparisonView(output) as view,
        tracked(settings.get("track", ""), place, view) as observer,
    ):
        yield observer


class ComparisonView(View):
    """An observer of absld.runs.comparison."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.title, self.role, self.epochs = "", "", 1
        self.number, self.total = 0, 1
        self.seconds: list[float] = []  # of the runs that had to be trained

    def note(self, text: str) -> None:
        """Print nothing: the notes of a run are in its own files."""

    def begin_run(self, label: str, seed: int, number: int, total: int) -> None:
        self.title, self.number, self.total = f"{label}, seed {seed}", number, total
        self.started = time.perf_counter()
        self.show_progress("starting", 0.0)

    def begin_training(self, start: TrainingStart) -> None:
        super().begin_training(start)
        self.role, self.epochs = start.role, start.config.epochs

    def step(self, report: StepReport) -> None:
        done = epochs_done(report) / self.epochs
        self.show_progress(f"{self.role} {report.epoch}/{self.epochs}", done)
        super().step(report)

    def attack_batch(self, progress: AttackProgress) -> None:
        done, total = progress.cost
        text = f"{progress.attack} {progress.done}/{progress.total}"
        self.show_progress(text, done / max(total, 1e-9))

    def check(self, check: Check) -> None:
        self.show_progress("checking", 1.0)

    def end_run(self, metrics: Mapping[str, float], seconds: float, reused: bool) -> None:
        if not reused:
            self.seconds.append(time.perf_counter() - self.started)
        names = {
            "clean_average": "clean",
            "robust_average": "robust",
            "robust_worst": "worst class",
        }
        figures = ", ".join(f"{words} {number(metrics[n], n)}" for n, words in names.items())
        duration = "trained before" if reused else f"{seconds:.0f} s"
        left = ""
        if self.seconds and self.number < self.total:
            # The runs to come may take as long as those before.
            rest = len(self.seconds) + self.total - self.number
            left = f"; about {time_left(sum(self.seconds), len(self.seconds), rest)}"
        self.line(f"{self.number}/{self.total} {self.title}: {figures}, {duration}{left}")

    def show_progress(self, text: str, done: float) -> None:
        """Show the current run, and the progress of its current part."""
        self.show(progress_row(f"{self.number}/{self.total} {self.title}", done, 1.0, text))


def comparison_lines(comparison: Comparison, table: str, output: Output) -> list[Line]:
    """Return a table of a comparison and the folder of its files."""
    results = comparison.results
    if table == "paper":
        styled = shows_styles(output.stream)
        return ["", *paper_table.terminal_lines(results, styled=styled), str(comparison.folder)]
    return ["", *terminal_lines(results), str(comparison.folder)]
