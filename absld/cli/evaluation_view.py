"""The view of an evaluation: progress with the time left, checks, and the tables."""

import shlex
import time
from collections.abc import Mapping
from typing import Any

from absld.cli.output import Output
from absld.cli.view import View, time_left
from absld.evaluation.corruptions import CorruptionRun
from absld.evaluation.runner import EvaluationRun
from absld.norms import NORM_NAMES
from absld.progress import AttackProgress, Check
from absld.report.summary import METRICS, shown_interval, worst_classes
from absld.text import column, printable, wrap

NAMES = {name: label.replace("\N{NBSP}", " ") for name, label in METRICS.items()}


class EvaluationView(View):
    """An observer of absld.evaluation.runner."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.begin_evaluation()

    def begin_evaluation(self) -> None:
        # Time and cost at the first batch: what an earlier process did took no time of this one.
        self.first: tuple[float, float] | None = None

    def attack_batch(self, progress: AttackProgress) -> None:
        now, (done, total) = time.perf_counter(), progress.cost
        if self.first is None:
            self.first = (now, done)
        left = time_left(now - self.first[0], done - self.first[1], total - self.first[1])
        title = f"{progress.attack} {progress.done}/{progress.total}"
        self.progress(title, done, total, left, end=progress.done == progress.total)

    def check(self, check: Check) -> None:
        self.show("checking")
        self.line(f"{'PASS' if check.passed else 'WARN'}  {check.name}")
        for line in wrap(check.numbers, 80, "      ", "      "):
            self.line(line)


def evaluation_lines(run: EvaluationRun | CorruptionRun) -> list[str]:
    """Return the tables, the number of warnings, the file of the results, and the next command."""
    if isinstance(run, CorruptionRun):
        return [*corruption_lines(run.results), str(run.path)]
    lines = table_lines(run.results)
    if run.warnings:
        both = (run.results, run.results["against"] or {})
        checks = sum(len(results.get("checks") or ()) for results in both)
        verb = "warns" if len(run.warnings) == 1 else "warn"
        count = f"{len(run.warnings)} of {checks} checks {verb}"
        lines.append(f"{count}: robust accuracy may be overestimated")
    page = f"page: {shlex.join(['absld', 'report', str(run.path)])}"
    return [*lines, str(run.path), page]


def table_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the tables in lines of at most 80 columns; figures are in per cent."""
    clean, robust, data = results["attacks"][0], results["robust"], results["data"]
    names = ", ".join(attack["name"] for attack in results["attacks"])
    settings = results["settings"]
    lines = [
        f"{results['network']['architecture']}, {data['images']} of {data['of']} {data['split']} "
        f"images of {data['dataset']}, {NORM_NAMES[settings['norm']]} {settings['epsilon']:.4g}",
        f"robust: correct under each of {names}; brackets: 95 % intervals",
        "",
        f"{'class':22} images {'clean':>20} {'robust':>20}",
    ]
    worst = worst_classes(results)
    pairs = zip(clean["classes"], robust["classes"], strict=True)
    for k, (of_clean, of_robust) in enumerate(pairs):
        mark = "  worst" if k in worst else ""
        name = f"{column(of_clean['class'], 22)} {of_clean['images']:6}"
        lines.append(f"{name} {figure(of_clean)} {figure(of_robust)}{mark}")
    lines.append("")
    for name, label in NAMES.items():
        pair = f"{metric(clean, name)} {metric(robust, name)}"
        lines.append(f"{label:22} {'':6} {pair}")
    after = "alone" if settings["each"] else "after those above it"
    lines += ["", f"{'attack, ' + after:29} {'average':>20} {'worst class':>20} {'NSD':>7}"]
    for attack in results["attacks"]:
        lines.append(
            f"{attack['name']:29} {metric(attack, 'average')} {metric(attack, 'worst')} "
            f"{100 * attack['metrics']['normalized_std']['value']:7.1f}"
        )
    if results["against"]:
        lines += against_lines(results["against"])
    return [*lines, ""]


def corruption_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the table of all corruptions, and the means over them, in per cent."""
    severity = f"severity {results['severity']}" if results["severity"] else "all severities"
    attacks = ", ".join(results["settings"]["attacks"])
    lines = [
        f"{results['network']['architecture']}, {results['dataset']}, {severity}",
        f"correct under each of clean, {attacks}"
        if attacks
        else "correct; brackets: 95 % intervals",
        "",
        f"{'corruption':18} {'average':>20} {'worst class':>20}",
    ]
    for row in results["corruptions"]:
        least = [c for c in row["classes"] if c["value"] == row["metrics"]["worst"]["value"]]
        name = f"  {column(least[0]['class'], 17)}".rstrip() if least else ""
        pair = f"{metric(row, 'average')} {metric(row, 'worst')}"
        lines.append(f"{column(row['corruption'], 18)} {pair}{name}")
    lines += ["", f"{'mean over corruptions':22} {'':>8} correct"]
    average = results["mean"]["average"]
    of_class = [(printable(c["class"]), c["value"]) for c in results["mean"]["classes"]]
    worst = results["mean"]["worst"]
    for name, value in [*of_class, ("average", average), ("worst class", worst)]:
        lines.append(f"{column(name, 22)} {'-' if value is None else f'{100 * value:.1f}':>16}")
    return [*lines, ""]


def against_lines(against: Mapping[str, Any]) -> list[str]:
    """Return the table of differences to another network."""
    title = f"minus {against['network']['target']}, in points"
    lines = ["", title, f"{'':29} {'clean':>20} {'robust':>20}"]
    for name, label in NAMES.items():
        pair = f"{figure(against['clean'][name])} {figure(against['robust'][name])}"
        lines.append(f"{label:29} {pair}")
    rho = against["rho"]
    return [*lines, f"{'rho, relative gains':50} {figure(rho)}"]


def metric(part: Mapping[str, Any], name: str) -> str:
    """Return a metric of an evaluation and its interval, as `figure` does."""
    return figure(shown_interval(part, name))


def figure(interval: Mapping[str, Any]) -> str:
    """Return a figure and its interval, in per cent, in 20 columns."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if value is None:
        return f"{'-':>20}"
    if low is None or high is None:
        return f"{100 * value:5.1f} [    -,     -]"
    return f"{100 * value:5.1f} [{100 * low:5.1f}, {100 * high:5.1f}]"
