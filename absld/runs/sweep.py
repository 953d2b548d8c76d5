"""Sweeps: every point of a grid of settings with every seed, and the frontier of their figures.

A sweep is a comparison whose methods are the points: finished runs are used again, and the same
command continues an interrupted sweep.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.launcher_settings import LauncherSettings
from absld.config.settings import Config
from absld.evaluation.results import to_json
from absld.progress import Observer
from absld.report.comparison_tables import csv_text
from absld.report.frontier_plot import plot_frontier
from absld.report.sweep_tables import AXES, markdown, points_csv
from absld.runs.comparison import HERE, train_and_evaluate
from absld.runs.comparison_results import Comparison, Member, compare_members, write_files
from absld.runs.grid import Over, Point, build_points, frontier

SCHEMA = "absld-sweep-1"
ABOUT_SPLIT = {
    "validation": "evaluated on the validation images, which have selected each run's epoch, too: "
    "report the point that you choose by `absld compare` of its runs, on the test images",
    "test": "warning: a point that is chosen by this table is chosen on the test images: its "
    "figures are optimistic",
    "train": "warning: these are the training images: figures on others are lower",
}


def sweep(
    over: Over,
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    evaluation: EvaluationConfig,
    observer: Observer,
    launcher: LauncherSettings = HERE,
) -> Comparison:
    """Train the missing runs of a grid, evaluate all, and find the frontier.

    settings: the base point, and what all points share. Raises AbsldError.
    """
    points, baseline = build_points(settings, over)
    labels, configs = with_seeds(points, seeds)
    members, notes = train_and_evaluate(labels, configs, evaluation, observer, launcher)
    notes = [ABOUT_SPLIT[evaluation.split], *notes]
    results = sweep_results(members, evaluation, baseline, notes, over, points)
    texts = {
        "sweep.json": to_json(results),
        "table.md": markdown(results),
        "points.csv": points_csv(results),
        "runs.csv": csv_text(results),
    }
    folder = write_files("sweep", members, results, Path(configs[0].out), texts)
    plot_frontier(results, folder / "frontier.png")
    return Comparison(folder, results)


def with_seeds(points: Sequence[Point], seeds: Sequence[int]) -> tuple[list[str], list[Config]]:
    """Return label and configuration of each run, all points of the first seed first."""
    labels = [point.label for _ in seeds for point in points]
    return labels, [replace(point.config, seed=seed) for seed in seeds for point in points]


def sweep_results(
    members: Sequence[Member],
    evaluation: EvaluationConfig,
    baseline: str,
    notes: Sequence[str],
    over: Over,
    points: Sequence[Point],
) -> dict[str, Any]:
    """Compute the results: those of a comparison, with the settings of each point."""
    results = compare_members(members, evaluation, baseline, notes, swept=over)
    methods = results["methods"]
    means = [tuple(method["figures"][name]["mean"] for name in AXES) for method in methods]
    marks = frontier([(x, y) for x, y in means])
    settings = {point.label: point.settings for point in points}
    return results | {
        "schema": SCHEMA,
        "sweep": {"over": {name: list(values.values()) for name, values in over.items()}},
        "methods": [
            {**method, "settings": settings[method["name"]], "frontier": marked}
            for method, marked in zip(methods, marks, strict=True)
        ],
    }
