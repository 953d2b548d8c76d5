"""The views of `--status` and `--estimate`: a line for each training, or each kind of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.launcher_settings import LauncherSettings
from absld.config.settings import Config
from absld.progress import Observer
from absld.runs.estimate import estimate
from absld.runs.launching import training_states
from absld.text import column, columns, time_text

SCHEMA = "absld-status-1"


Report = tuple[Mapping[str, Any], list[str]]
"""A document for --json, and lines for a person."""


def ahead(
    labels: Sequence[str],
    configs: Sequence[Config],
    evaluation: EvaluationConfig,
    observer: Observer,
    launcher: LauncherSettings,
    *,
    status: bool,
) -> Report:
    """Report the state of each training if `status`, else the time that all take; train nothing."""
    given = labels, configs, evaluation, observer, launcher
    if not status:
        results = estimate(*given)
        return results, estimate_lines(results)
    states = training_states(*given)
    return {"schema": SCHEMA, "trainings": states}, status_lines(states)


def status_lines(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for each training: its state, its epochs, its number in Slurm; and a count."""
    width = max(columns(state["training"]) for state in states)
    finished = sum(state["state"] == "finished" for state in states)
    rows = []
    for state in states:
        done, total = state["epochs"]
        job = f"  job {state['job']}" if state["job"] else ""
        name = column(state["training"], min(width, 60))
        rows.append(f"{name}  {f'{done}/{total}':>9} epochs  {state['state']}{job}")
    return [*rows, f"{finished} of {len(states)} finished"]


def estimate_lines(results: Mapping[str, Any]) -> list[str]:
    """Return a row for each kind of training: times of its parts, and of all; and a sum."""
    rows = results["trainings"]
    if not rows:
        return ["all trainings are finished"]
    width = min(60, max(8, *(columns(row["name"]) for row in rows)))
    lines = [f"{'':{width}}      step     epoch   training  evaluation  number        all"]
    for row in rows:
        epoch, training, evaluation, seconds = (
            time_text(row[name]) for name in ("epoch", "training", "evaluation", "seconds")
        )
        lines.append(
            f"{column(row['name'], width)} {row['step']:7.3g} s {epoch:>9} {training:>10} "
            f"{evaluation:>11} {row['left']:7} {seconds:>10}"
        )
    seconds, at_a_time = results["seconds"], results["at_a_time"]
    text = f"in all about {time_text(seconds)} of computing, by a few steps on {results['device']}"
    if at_a_time is None:
        text += " of this machine"
    elif at_a_time > 1:
        text += (
            f"; {time_text(seconds / at_a_time)} if {at_a_time} at a time do not slow each other"
        )
    return [*lines, text]
