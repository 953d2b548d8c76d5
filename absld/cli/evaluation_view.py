"""What a person sees of an evaluation: progress with the time left, checks, and the tables."""

import sys
import time
from collections.abc import Mapping
from typing import IO, Any

from rich.progress_bar import ProgressBar
from rich.table import Table

from absld.cli.training_view import Lines, time_text
from absld.errors import Stopped
from absld.evaluation.evaluate import Progress
from absld.evaluation.runner import Assessment
from absld.evaluation.sanity_checks import Check
from absld.report.summary import METRICS, worst

EVERY = 30.0  # seconds between lines of progress where nothing can move
NAMES = {name: label.replace("\N{NBSP}", " ") for name, label in METRICS.items()}


class EvaluationView(Lines):
    """An observer of absld.evaluation.runner: plain lines, and on a terminal a bar below them."""

    def __init__(self, stream: IO[str], *, goes_on: bool = True) -> None:
        super().__init__(stream)
        self.goes_on = goes_on
        # The clock starts with the first batch: what was done before an interruption took no time.
        self.first: tuple[float, float] | None = None
        self.told = 0.0

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        super().__exit__(kind, *error)
        if kind in (KeyboardInterrupt, Stopped):
            after = "; the same command goes on from here" if self.goes_on else ""
            print(f"stopped{after}", file=sys.stderr)

    def note(self, text: str) -> None:
        self.line(text)

    def batch(self, progress: Progress) -> None:
        now, (done, whole) = time.perf_counter(), progress.cost
        if self.first is None or done < self.first[1]:  # the first batch, or a second network
            self.first, self.told = (now, done), now
        spent, gained = now - self.first[0], done - self.first[1]
        left = time_text(spent * (whole - done) / gained) if gained > 0 else "-"
        counted = f"{progress.attack} {progress.done}/{progress.total}"
        if self.live:
            row = Table.grid(padding=(0, 1))
            bar = ProgressBar(total=whole, completed=done, width=30)
            row.add_row(counted, bar, f"{left} left")
            self.live.update(row)
        elif progress.done == progress.total or now - self.told > EVERY:
            self.line(f"{counted} images, {left} left")
            self.told = now

    def check(self, check: Check) -> None:
        if self.live:
            self.live.update("checking")
        self.line(check_line(vars(check)))

    def result(self, assessment: Assessment) -> None:
        """The tables: classes, metrics, attacks, and the differences to a baseline."""
        for text in result_lines(assessment.document):
            self.line(text)
        if assessment.warnings:
            self.line(f"the figures may be worth less: WARN {len(assessment.warnings)} times above")
        self.line(str(assessment.path))


def check_line(check: Mapping[str, Any]) -> str:
    return f"{'PASS' if check['passed'] else 'WARN'}  {check['name']}: {check['numbers']}"


def result_lines(document: Mapping[str, Any]) -> list[str]:
    """The result of an evaluation in lines of 80 columns or less; figures in per cent."""
    clean, robust, data = document["attacks"][0], document["robust"], document["data"]
    names = ", ".join(attack["name"] for attack in document["attacks"])
    lines = [
        f"{document['network']['architecture']}, {data['images']} of {data['of']} "
        f"{data['split']} images of {data['dataset']}, epsilon {document['settings']['epsilon']:.4g}",
        f"robust: right under each of {names}; brackets: 95 % intervals",
        "",
        f"{'class':22} images {'clean':>20} {'robust':>20}",
    ]
    marked = worst(document)
    for k, (of_clean, of_robust) in enumerate(
        zip(clean["classes"], robust["classes"], strict=True)
    ):
        mark = "  worst" if k in marked else ""
        lines.append(
            f"{short(of_clean['class'])} {of_clean['images']:6} {figure(of_clean)} "
            f"{figure(of_robust)}{mark}"
        )
    lines.append("")
    for name, label in NAMES.items():
        pair = f"{figure(clean['metrics'][name])} {figure(robust['metrics'][name])}"
        lines.append(f"{label:22} {'':6} {pair}")
    after = "alone" if document["settings"]["each"] else "after those above it"
    lines += ["", f"{'attack, ' + after:29} {'average':>20} {'worst class':>20} {'NSD':>7}"]
    for attack in document["attacks"]:
        metrics = attack["metrics"]
        lines.append(
            f"{attack['name']:29} {figure(metrics['average'])} {figure(metrics['worst'])} "
            f"{100 * metrics['normalized_std']['value']:7.1f}"
        )
    if document["against"]:
        lines += against_lines(document["against"])
    return [*lines, ""]


def against_lines(against: Mapping[str, Any]) -> list[str]:
    title = f"minus {against['network']['target']}, in points"
    lines = ["", title, f"{'':29} {'clean':>20} {'robust':>20}"]
    for name, label in NAMES.items():
        pair = f"{figure(against['clean'][name])} {figure(against['robust'][name])}"
        lines.append(f"{label:29} {pair}")
    rho = against["rho"]
    return [*lines, f"{'rho, relative gains':50} {figure(rho)}"]


def short(name: str) -> str:
    """A class name in 22 columns."""
    return f"{name if len(name) <= 22 else name[:21] + '…':22}"


def figure(interval: Mapping[str, Any]) -> str:
    """A figure and its interval, in per cent, in 20 columns."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None:
        return f"{'-':>20}"
    if low is None or high is None:
        return f"{100 * value:5.1f} [    -,     -]"
    return f"{100 * value:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]"
