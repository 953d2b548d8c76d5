"""Robust average against robust worst class, every point of a sweep, with the frontier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from absld.report.comparison_plot import COLOURS, MARKERS
from absld.report.figures import QUIET, TEXT, drawing_style
from absld.report.sweep_tables import value_text
from absld.storage.files import replacing
from absld.text import clip


def plot_frontier(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a sweep, in the format of the path's suffix.

    The first swept setting has the colours, the second the markers. Numbers are those of the table.
    """
    names = list(results["sweep"]["over"])[:2]
    looks = [kinds_of(results["methods"], name) for name in names]
    with drawing_style(10):
        figure = Figure(figsize=(6.8, 4.6), layout="constrained")
        axes = figure.subplots()
        for number, method in enumerate(results["methods"], 1):
            kinds = [look[value(method, name)] for look, name in zip(looks, names, strict=True)]
            draw_point(axes, method, number, kinds, is_base=method["name"] == results["baseline"])
        axes.set_xlim(widened(*axes.get_xlim()))
        axes.set_ylim(widened(*axes.get_ylim()))
        draw_frontier(axes, results["methods"])
        data = results["data"]
        axes.set_xlabel(f"robust average on the {data['split']} images, %")
        axes.set_ylabel("robust, worst class, %")
        axes.grid()
        seeds = max(len(method["seeds"]) for method in results["methods"])
        spread = f"mean ± deviation of {seeds} seeds" if seeds > 1 else "one seed"
        axes.set_title(f"{clip(data['dataset'], 20)}: {spread}, numbered as in the table")
        figure.legend(handles=legend(names, looks), loc="outside right upper")
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=160, metadata={})


def value(method: Mapping[str, Any], name: str) -> str:
    """Return the value of a swept setting as text."""
    return value_text(method["settings"].get(name))


def kinds_of(methods: Sequence[Mapping[str, Any]], name: str) -> dict[str, int]:
    """Number the values of a swept setting in the order of the points."""
    return {text: k for k, text in enumerate(dict.fromkeys(value(m, name) for m in methods))}


def draw_point(
    axes: Axes, method: Mapping[str, Any], number: int, kinds: Sequence[int], *, is_base: bool
) -> None:
    """Draw the means of a point with their standard deviations, and its number."""
    (x, dx), (y, dy) = (means(method, name) for name in ("robust_average", "robust_worst"))
    colour, marker = COLOURS[kinds[0] % len(COLOURS)], MARKERS[kinds[-1] % len(MARKERS)]
    if dx is not None:
        axes.errorbar(x, y, dy, dx, fmt="none", ecolor=colour, alpha=0.35, linewidth=1)
    on_it = method["frontier"]
    axes.plot(
        [x], [y], marker=marker, color=colour, markersize=9 if on_it else 7, linestyle="",
        markeredgecolor=TEXT if on_it else "white", zorder=4,
    )  # fmt: skip
    if is_base:
        axes.plot([x], [y], marker="o", markersize=17, color=TEXT, fillstyle="none", zorder=3)
    axes.annotate(
        str(number), (x, y), (7, 5), textcoords="offset points", size="small",
        color=TEXT if on_it else QUIET, weight="bold" if on_it else "normal", zorder=5,
    )  # fmt: skip


def means(method: Mapping[str, Any], name: str) -> tuple[float, float | None]:
    """Return mean and standard deviation of a figure, in per cent."""
    figure = method["figures"][name]
    return 100 * figure["mean"], None if figure["std"] is None else 100 * figure["std"]


def draw_frontier(axes: Axes, methods: Sequence[Mapping[str, Any]]) -> None:
    """Draw the frontier as stairs: what lies below and left of them is dominated."""
    ends = sorted(
        (means(m, "robust_average")[0], means(m, "robust_worst")[0])
        for m in methods
        if m["frontier"]
    )
    x, y = zip(*ends, strict=True)
    (left, _), (bottom, _) = limits = axes.get_xlim(), axes.get_ylim()
    axes.step(
        [left, *x, x[-1]], [y[0], *y, bottom], where="pre", color=QUIET, linewidth=1, zorder=1
    )
    axes.set(xlim=limits[0], ylim=limits[1])


def widened(low: float, high: float) -> tuple[float, float]:
    """Return limits at least 4 per cent apart, or noise would fill the picture."""
    margin = max(0.0, 4 - (high - low)) / 2
    return low - margin, high + margin


def legend(names: Sequence[str], looks: Sequence[Mapping[str, int]]) -> list[Line2D]:
    """Return the entries: the values of the settings, the frontier, the base point."""
    entries = []
    for place, (name, kinds) in enumerate(zip(names, looks, strict=True)):
        entries.append(Line2D([], [], linestyle="", label=clip(name, 30)))
        for text, k in kinds.items():
            entries.append(
                Line2D(
                    [], [], linestyle="", label=clip(text, 30), markersize=7,
                    color=QUIET if place else COLOURS[k % len(COLOURS)],
                    marker=MARKERS[k % len(MARKERS)] if place or len(names) == 1 else "s",
                )
            )  # fmt: skip
    entries.append(Line2D([], [], linestyle="-", color=QUIET, linewidth=1, label="frontier"))
    base = Line2D(
        [], [], color=TEXT, marker="o", markersize=12, fillstyle="none", linestyle="",
        label="base point",
    )  # fmt: skip
    return [*entries, base]
