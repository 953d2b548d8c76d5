"""What a person sees of a comparison: a line for each run, and on a terminal a bar below them."""

import time
from typing import IO

from rich.progress_bar import ProgressBar
from rich.table import Table

from absld.cli.training_view import Lines, time_text
from absld.config.settings import TrainConfig
from absld.evaluation.evaluate import Progress
from absld.evaluation.sanity_checks import Check
from absld.progress import EpochReport, Role, StepReport
from absld.report.comparison_tables import shown, terminal
from absld.runs.comparison import Comparison, Member
from absld.runs.training_run import Stops


class ComparisonView(Lines):
    """An observer of absld.runs.comparison."""

    def __init__(self, stream: IO[str], stop: Stops) -> None:
        super().__init__(stream)
        self.stop = stop
        self.title, self.what = "", ""
        self.number, self.total = 0, 1
        self.took: list[float] = []  # seconds of the runs that had to be trained
        self.epochs = 1

    def note(self, text: str) -> None:
        """What the parts of a run note is in their own files."""

    def run(self, label: str, seed: int, number: int, total: int) -> None:
        self.title, self.number, self.total = f"{label}, seed {seed}", number, total
        self.started = time.perf_counter()
        self.show("looking for it", 0.0)

    def begin(self, role: Role, config: TrainConfig, classes: tuple[str, ...]) -> None:
        self.stop.training = True
        self.what, self.epochs = role, config.epochs

    def step(self, report: StepReport) -> None:
        within = report.done / report.total if report.phase == "training" else 1.0
        done = (report.epoch - 1 + within) / self.epochs
        self.show(f"{self.what} {report.epoch}/{self.epochs}", done)
        self.stop.check()

    def epoch(self, report: EpochReport) -> None:
        pass

    def end(self) -> None:
        self.stop.check()
        self.stop.training = False

    def batch(self, progress: Progress) -> None:
        done, whole = progress.cost
        self.show(f"{progress.attack} {progress.done}/{progress.total}", done / max(whole, 1e-9))

    def check(self, check: Check) -> None:
        self.show("checking", 1.0)

    def done(self, member: Member, reused: bool) -> None:
        if not reused:
            self.took.append(time.perf_counter() - self.started)
        figures = member.figures()
        told = ", ".join(
            f"{words} {shown(figures[name], name)}"
            for name, words in (
                ("clean_average", "clean"),
                ("robust_average", "robust"),
                ("robust_worst", "worst class"),
            )
        )
        how = "was there" if reused else f"{member.seconds:.0f} s"
        self.line(f"{self.number}/{self.total} {self.title}: {told}, {how}{self.left()}")

    def left(self) -> str:
        """The time left, if runs that are still to come take as long as those before."""
        rest = self.total - self.number
        if not rest or not self.took:
            return ""
        return f"; about {time_text(rest * sum(self.took) / len(self.took))} left"

    def show(self, what: str, done: float) -> None:
        """The run at hand, and how far its present part is."""
        if self.live:
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=1.0, completed=done, width=20)
            row.add_row(f"{self.number}/{self.total} {self.title}", bar, what)
            self.live.update(row)

    def result(self, comparison: Comparison) -> None:
        self.line("")
        for text in terminal(comparison.document):
            self.line(text)
        self.line(str(comparison.folder))
