"""Average against worst class robustness, every seed a point, by matplotlib, which is optional."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absld.errors import UsageError
from absld.report.summary import clip
from absld.storage.files import replacing

# Colours that the colour-blind tell apart, each with a marker of its own.
COLOURS = ("#0b5cad", "#c77700", "#1b7f4d", "#a3307f", "#56a0d3", "#7a5c00", "#a33300", "#444c56")
MARKERS = "osD^vP*Xp<>"
TEXT, GRID = "#1c2128", "#e3e7ec"


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Write the picture, in the format of the path's suffix. Raises UsageError without
    matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"{path}: {error}", "pip install 'absld[plots]'") from error
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for k, method in enumerate(document["methods"]):
        average, worst = (
            [100 * value for value in method["figures"][name]["values"]]
            for name in ("robust_average", "robust_worst")
        )
        colour, marker = COLOURS[k % len(COLOURS)], MARKERS[k % len(MARKERS)]
        axes.plot(average, worst, marker, color=colour, markersize=5, alpha=0.55)
        centre = [sum(average) / len(average)], [sum(worst) / len(worst)]
        axes.plot(
            *centre,
            marker,
            color=colour,
            markersize=10,
            markeredgecolor="white",
            label=clip(method["name"], 40).replace("$", r"\$"),
        )
    low, high = axes.get_ylim()
    if high - low < 4:  # per cent; or noise would fill the picture
        axes.set_ylim((low + high) / 2 - 2, (low + high) / 2 + 2)
    axes.set_xlabel("robust average, %", color=TEXT)
    axes.set_ylabel("robust, worst class, %", color=TEXT)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    data = document["data"]
    axes.set_title(
        f"{data['dataset']}: each seed a point, means large", loc="left", color=TEXT, size=10
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=160, metadata={})
