"""The pictures of a comparison: average against worst class, and every class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from absld.report.figures import QUIET, drawing_style
from absld.report.picture import drawable, with_drawable_names
from absld.report.summary import MANY
from absld.storage.files import replacing
from absld.text import clip, printable

# Colours that the colour-blind tell apart, each with a marker of its own.
COLOURS = ("#0b5cad", "#c77700", "#1b7f4d", "#a3307f", "#56a0d3", "#7a5c00", "#a33300", "#444c56")
MARKERS = "osD^vP*Xp<>"
APART = 0.7  # of the distance of two classes: the room of all methods


def plot(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a comparison, in the format of the path's suffix."""
    with drawing_style(10):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        axes = figure.subplots()
        for k, method in enumerate(results["methods"]):
            average, worst = (
                [100 * value for value in method["figures"][name]["values"]]
                for name in ("robust_average", "robust_worst")
            )
            mean = [sum(average) / len(average)], [sum(worst) / len(worst)]
            look = look_of(k)
            axes.plot(average, worst, markersize=5, alpha=0.55, **look)
            name = drawable(clip(method["name"], 40))
            axes.plot(*mean, markersize=10, markeredgecolor="white", label=name, **look)
        low, high = axes.get_ylim()
        if high - low < 4:  # per cent; or noise would fill the picture
            axes.set_ylim((low + high) / 2 - 2, (low + high) / 2 + 2)
        axes.set_xlabel("robust average, %")
        axes.set_ylabel("robust, worst class, %")
        axes.grid()
        axes.set_title(
            f"{printable(results['data']['dataset'])}: one small marker per seed, means large"
        )
        figure.legend(loc="outside right upper")
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=160, metadata={})


def look_of(k: int) -> dict[str, Any]:
    """Return marker and colour of method k."""
    marker, colour = MARKERS[k % len(MARKERS)], COLOURS[k % len(COLOURS)]
    return {"marker": marker, "color": colour, "linestyle": ""}


def plot_classes(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture of the classes: robust accuracies, and the temperatures of the methods.

    The classes are in the order of the baseline's accuracy; of many, the worst are shown.
    """
    results = with_drawable_names(results)
    names, methods = results["data"]["classes"], results["methods"]
    base = next(method for method in methods if method["name"] == results["baseline"])
    values = [interval["value"] for interval in base["classes"]]
    order = sorted(range(len(names)), key=lambda k: (values[k] is None, values[k]))[:MANY]
    adapted = [(k, method) for k, method in enumerate(methods) if method["temperatures"]]
    heights = [3.0, 1.8] if adapted else [3.0]
    with drawing_style(10):
        figure = Figure(figsize=(8, 1.4 + sum(heights)), layout="constrained")
        axes = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[
            :, 0
        ]
        draw_accuracies(axes[0], results, order)
        if adapted:
            draw_temperatures(axes[1], adapted, len(methods), order)
        labels = [clip(names[k], 14) for k in order]
        upright = max(map(len, labels)) * len(labels) > 80
        axes[-1].set_xticks(range(len(order)), labels, rotation=90 if upright else 0)
        few = f", the {len(order)} worst of {len(names)}" if len(order) < len(names) else ""
        axes[-1].set_xlabel(f"class, by the accuracy of {drawable(clip(base['name'], 40))}{few}")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:], dpi=160, metadata={})


def draw_accuracies(axes: Axes, results: Mapping[str, Any], order: Sequence[int]) -> None:
    """Draw the robust accuracy of the classes by each method, with intervals."""
    methods = results["methods"]
    for k, method in enumerate(methods):
        places, shares = [], []
        for place, share in zip(shifted(k, len(methods), order), order, strict=True):
            if method["classes"][share]["value"] is not None:
                places.append(place)
                shares.append(method["classes"][share])
        values = [100 * share["value"] for share in shares]
        lows, highs = (
            [v if s[end] is None else 100 * s[end] for s, v in zip(shares, values, strict=True)]
            for end in ("low", "high")
        )
        whiskers = [  # Student's intervals may leave 0 to 100
            [max(v - max(low, 0), 0) for v, low in zip(values, lows, strict=True)],
            [max(min(high, 100) - v, 0) for v, high in zip(values, highs, strict=True)],
        ]
        axes.errorbar(
            places, values, yerr=whiskers, label=drawable(clip(method["name"], 40)), markersize=6,
            elinewidth=1, capsize=2, **look_of(k),
        )  # fmt: skip
    seeds = max(len(method["seeds"]) for method in methods)
    spread = (
        f"mean of {seeds} seeds, 95 % intervals over seeds"
        if seeds > 1
        else "95 % intervals over images"
    )
    axes.set_title(
        f"{printable(results['data']['dataset'])}: robust accuracy of each class; {spread}"
    )
    axes.set_ylabel("robust, %")
    axes.set_ylim(0, 102)
    axes.grid(axis="y")


def draw_temperatures(
    axes: Axes, adapted: Sequence[tuple[int, Mapping[str, Any]]], count: int, order: Sequence[int]
) -> None:
    """Draw the class temperatures of methods, each with its number among `count`, and their bounds."""
    for k, method in adapted:
        of_method = method["temperatures"]
        places = shifted(k, count, order)
        look = look_of(k)
        for kind, fill in (("adv", look["color"]), ("nat", "white")):
            axes.plot(places, [of_method[kind][c] for c in order], markerfacecolor=fill, **look)
        for bound in ("lower", "upper"):
            axes.axhline(of_method[bound], color=QUIET, linestyle=":", linewidth=1)
    axes.axhline(1, color=QUIET, linewidth=0.8)
    axes.set_yscale("log")
    ticks = sorted({1, *(m["temperatures"][end] for _, m in adapted for end in ("lower", "upper"))})
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(
        "Class temperatures in the selected epoch: filled for adversarial, hollow for clean images"
    )
    axes.set_ylabel("temperature")


def shifted(k: int, count: int, order: Sequence[int]) -> list[float]:
    """Return the places of the classes for method k of `count`, side by side."""
    return [place + APART * ((k + 0.5) / count - 0.5) for place in range(len(order))]
