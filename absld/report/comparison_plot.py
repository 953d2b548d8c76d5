"""Robust average against robust worst class, every seed a point."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from absld.report.figures import drawing_style
from absld.storage.files import replacing
from absld.text import clip, printable

# Colours that the colour-blind tell apart, each with a marker of its own.
COLOURS = ("#0b5cad", "#c77700", "#1b7f4d", "#a3307f", "#56a0d3", "#7a5c00", "#a33300", "#444c56")
MARKERS = "osD^vP*Xp<>"


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
            marker, colour = MARKERS[k % len(MARKERS)], COLOURS[k % len(COLOURS)]
            look: dict[str, Any] = {"marker": marker, "color": colour, "linestyle": ""}
            axes.plot(average, worst, markersize=5, alpha=0.55, **look)
            name = clip(method["name"], 40)
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
