"""Draw comparison-digits.png from comparison-digits.csv: average against worst class, by teacher.

    python docs/results/comparison_digits.py

A large marker is the mean of ten seeds of a method, its bars are 95 % intervals by Student's t; a
small one is the mean of five seeds of a point of the sweeps.
"""

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from absld.evaluation.intervals import over_seeds
from absld.report.comparison_plot import COLOURS, MARKERS
from absld.report.figures import QUIET, TEXT, drawing_style
from absld.runs.grid import frontier

HERE = Path(__file__).parent
FAMILIES = ("adversarial training", "robust distillation", "fair training", "ABSLD")
# Where a name is that would cover another one to the right of and above its point.
PLACES = {
    "convnet": {
        "absld": "left", "absld-start-0.25-adv": "below", "absld-weights": "below", "frl": "left",
        "sat": "left below", "trades": "below", "wat": "left",
    },
    "convnet-wide": {
        "absld": "left", "absld-start-0.25-adv": "left", "absld-weights": "left", "adaad": "left",
        "ard": "left below", "fair-rslad": "left", "frl": "left below", "rslad": "left below",
        "sat": "left below", "trades": "below", "wat": "left",
    },
}  # fmt: skip


class Point(NamedTuple):
    """Per cent by seed: average and worst class."""

    name: str
    family: str
    swept: bool
    average: list[float]
    worst: list[float]

    @property
    def means(self) -> tuple[float, float]:
        return statistics.mean(self.average), statistics.mean(self.worst)


def read(path: Path) -> dict[str, list[Point]]:
    """Return the points of each teacher; those without a teacher are in each."""
    rows = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["teacher"], row["method"], row["family"], row["part"] == "sweep"
            rows[key].append((float(row["robust average"]), float(row["robust worst"])))
    points = defaultdict(list)
    for (teacher, name, family, swept), figures in rows.items():
        average, worst = (list(values) for values in zip(*figures, strict=True))
        for panel in ("convnet", "convnet-wide") if teacher == "none" else (teacher,):
            points[panel].append(Point(name, family, swept, average, worst))
    return points


def draw_point(axes: Axes, point: Point, place: str) -> None:
    """Draw a point; a method's, with its intervals, and its name at `place`."""
    k = FAMILIES.index(point.family)
    x, y = point.means
    look: dict[str, Any] = {"color": COLOURS[k], "marker": MARKERS[k], "linestyle": ""}
    if point.swept:
        axes.plot([x], [y], markersize=4, alpha=0.5, markeredgewidth=0, zorder=2, **look)
        return
    intervals = [over_seeds(torch.tensor(values)) for values in (point.average, point.worst)]
    bars = [interval.high - interval.value for interval in intervals]
    axes.errorbar(x, y, bars[1], bars[0], fmt="none", ecolor=COLOURS[k], alpha=0.25, zorder=1)
    axes.plot([x], [y], markersize=8, markeredgecolor="white", zorder=3, **look)
    left, below = "left" in place, "below" in place
    axes.annotate(
        point.name, (x, y), (-6 if left else 6, -12 if below else 4), textcoords="offset points",
        size="small", ha="right" if left else "left", color=TEXT, zorder=4,
    )  # fmt: skip


def draw_frontier(axes: Axes, means: list[tuple[float, float]]) -> None:
    """Draw the frontier of means as stairs."""
    ends = sorted(mean for mean, on_it in zip(means, frontier(means), strict=True) if on_it)
    x, y = zip(*ends, strict=True)
    limits = axes.get_xlim(), axes.get_ylim()
    stairs = [limits[0][0], *x, x[-1]], [y[0], *y, limits[1][0]]
    axes.step(*stairs, where="pre", color=QUIET, linewidth=1, zorder=1)
    axes.set(xlim=limits[0], ylim=limits[1])


def main() -> None:
    """Draw the picture."""
    points = read(HERE / "comparison-digits.csv")
    with drawing_style(10):
        figure = Figure(figsize=(11.5, 6), layout="constrained")
        panels = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
        for axes, (teacher, of_teacher) in zip(panels, points.items(), strict=True):
            for point in of_teacher:
                draw_point(axes, point, PLACES[teacher].get(point.name, ""))
            draw_frontier(axes, [point.means for point in of_teacher])
            axes.grid()
            axes.set_title(f"teacher: {teacher}")
            axes.set_xlabel("robust average, %")
        panels[0].set_ylabel("robust, worst class, %")
        marks = [
            panels[0].plot([], [], color=COLOURS[k], marker=MARKERS[k], linestyle="", label=name)[0]
            for k, name in enumerate(FAMILIES)
        ]
        line = panels[0].plot([], [], color=QUIET, linewidth=1, label="frontier of the means")[0]
        figure.legend(handles=[*marks, line], loc="outside lower center", ncols=5)
        figure.savefig(HERE / "comparison-digits.png", dpi=140, metadata={})


if __name__ == "__main__":
    main()
