"""The figures of a report, each drawn once: as SVG into the page, and into PNG and PDF.

They are drawn with matplotlib's objects alone: pyplot, the backend and the settings of a program
that draws figures of its own stay as they are.
"""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from absld.report import summary
from absld.text import clip, columns

FOLDER = Path(__file__).parent
CSS = (FOLDER / "templates/report.css").read_text(encoding="utf-8")
# The colours of the light theme by name. On the page their names replace them, for both themes.
COLOURS = dict(re.findall(r"--([\w-]+): (#\w{6});", CSS.partition("@media")[0]))
TEXT, QUIET, REST = (COLOURS[name] for name in ("text", "quiet", "rest"))
CLEAN, ROBUST, RED, GREEN = (COLOURS[name] for name in ("clean", "robust", "red", "green"))
HIGHLIGHTS = ((RED, "-"), (ROBUST, "--"), (GREEN, ":"))  # one for each highlighted class
WIDTH = 360  # of a figure on the page, in points, as are all lengths of it
FONT_SIZE = 13
NAME = 14  # columns of a class name
LABELLED = 12  # with more lines than these, only the highlighted ones have labels
POINTS = 100  # of a line: finer than can be seen


@contextlib.contextmanager
def drawing_style(font_size: float, **settings: str) -> Iterator[None]:
    """Set the look of what is drawn, whatever the user's settings: they may ask for LaTeX."""
    with style.context(
        ["default", FOLDER / "report.mplstyle", {"font.size": font_size, **settings}]
    ):
        yield


# --- SVG ---


def to_svg(
    draw: Callable[[Axes], None],
    title: str,
    size: tuple[float, float],
    margins: tuple[float, float, float, float],
) -> Markup:
    """Return a figure as an SVG element for the page, which has its numbers in a table below.

    Args:
        draw: draws on the axes it is given.
        title: of the figure, unlike all others of the page.
        size: width and height in points.
        margins: around the axes in points: left, top, right, bottom.
    """
    (width, height), (left, top, right, bottom) = size, margins
    box = left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height
    file = io.StringIO()
    with drawing_style(FONT_SIZE, **{"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser's has more
        figure = Figure(figsize=(width / 72, height / 72))
        draw(figure.add_axes(box))
        undated = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
    # Its own head has a fixed size, and a style of all elements, which would be those of the page.
    content = file.getvalue().partition("</style>\n </defs>\n")[2]
    head = Markup(
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        ' viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">\n<title>{}</title>\n'
        "<desc>The table below has the numbers.</desc>\n"
    ).format(width, height, title, title)
    return head + Markup(re.sub("<[^>]+>", for_page, content))


def for_page(tag: re.Match[str]) -> str:
    """Return a tag of an SVG with the page's colours, short numbers and no needless id."""
    text = re.sub(r"(\.\d\d)\d+", r"\1", re.sub('^<g id="[^"]*"', "<g", tag[0]))
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return text


# --- Classes ---


def class_bars(axes: Axes, results: Mapping[str, Any], classes: Sequence[int]) -> None:
    """Draw clean and robust accuracy of the classes, from the top, with their intervals."""
    robust, worst = results["robust"]["classes"], summary.worst_classes(results)
    parts = (
        (results["attacks"][0]["classes"], -0.24, 0.22, CLEAN, "clean"),
        (robust, 0.13, 0.46, ROBUST, "robust, worst case over all attacks"),
    )
    for accuracies, offset, height, colour, label in parts:
        rows = [row for row, k in enumerate(classes) if accuracies[k]["value"] is not None]
        intervals = [accuracies[classes[row]] for row in rows]
        values = [interval["value"] for interval in intervals]
        # A rounding error may put a value of 0 or 1 outside its interval, and an end may be unknown.
        whiskers = [
            [0.0 if i[end] is None else max(sign * (i[end] - i["value"]), 0.0) for i in intervals]
            for end, sign in (("low", -1), ("high", 1))
        ]
        places = [row + offset for row in rows]
        axes.barh(places, values, height, color=colour, label=label)
        axes.errorbar(
            values, places, xerr=whiskers, fmt="none", ecolor=TEXT, elinewidth=0.8, capsize=1.5
        )
    for row, k in enumerate(classes):
        value = robust[k]["value"]
        text = "no images" if value is None else f"{'worst ' * (k in worst)}{summary.number(value)}"
        axes.annotate(
            text, (1, row), (6.2, 0), ("axes fraction", "data"), "offset fontsize",
            size="small", weight="bold" if k in worst else "normal", ha="right", va="center",
        )  # fmt: skip
    axes.set_yticks(range(len(classes)), [name_of(results, k) for k in classes])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(classes) - 0.4, -0.6)
    axes.xaxis.tick_top()
    axes.grid(axis="x")
    axes.legend(loc="upper right", bbox_to_anchor=(1.02, 0), ncols=2, handlelength=1)


def confusion_matrix(axes: Axes, results: Mapping[str, Any]) -> None:
    """Draw the images of each true class by predicted class, in the worst case."""
    confusion = results["confusion"]
    count = len(confusion)
    shares = [[images / max(sum(row), 1) for images in row] for row in confusion]
    darkest = max(share for i, row in enumerate(shares) for j, share in enumerate(row) if i != j)
    for i, row in enumerate(confusion):
        for j, images in enumerate(row):
            if images:
                # At most half of the ink: the text keeps its contrast, in both themes.
                ink = (shares[i][j] if i == j else shares[i][j] / darkest) / 2
                colour = ROBUST if i == j else CLEAN
                axes.add_patch(
                    Rectangle(
                        (j - 0.48, i - 0.48), 0.96, 0.96, color=colour, alpha=ink, linewidth=0
                    )
                )
            axes.text(
                j, i, str(images), size="small" if count <= 10 else "x-small",
                ha="center", va="center_baseline", color=TEXT if images else QUIET,
            )  # fmt: skip
    names = [name_of(results, k, 10) for k in range(count)]
    axes.set_yticks(range(count), [name_of(results, k) for k in range(count)])
    axes.set_xticks(range(count), names)
    if max(map(columns, names)) > 3:
        axes.tick_params(axis="x", rotation=90)
        for label in axes.get_xticklabels():
            label.set(ha="right", va="center", rotation_mode="anchor")
    axes.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5))
    axes.set(xlabel="predicted class", ylabel="true class")


def name_of(results: Mapping[str, Any], k: int, width: int = NAME) -> str:
    """Return a class name in at most `width` columns."""
    return clip(results["data"]["classes"][k], width)


# --- Training ---


def trajectory_lines(
    axes: Axes, results: Mapping[str, Any], trajectory: summary.Trajectory
) -> None:
    """Draw a quantity of every class over the epochs; the worst classes are highlighted."""
    highlighted = summary.worst_first(results)[: summary.HIGHLIGHTED]
    few = len(trajectory.lines) <= LABELLED
    drawn = trajectory.thinned(POINTS)
    marker = "o" if len(drawn.epochs) == 1 else ""
    ends = []
    for k, line in enumerate(drawn.lines):
        values = [float("nan") if value is None else value for value in line]
        look: dict[str, Any] = {"color": REST, "linewidth": 0.9 if few else 0.5}
        if k in highlighted:
            place = highlighted.index(k)  # the worst is above all others
            colour, dash = HIGHLIGHTS[place]
            look = {"color": colour, "linestyle": dash, "linewidth": 1.8, "zorder": 5 - place}
        axes.plot(drawn.epochs, values, marker=marker, markersize=3, **look)
        end = next((value for value in reversed(line) if value is not None), None)
        if end is not None and (few or k in highlighted):
            ends.append((end, k, look["color"]))
    low, high = trajectory.limits
    margin = max((high - low) / 20, 0.02 * high) or 0.05  # ticks of values that hardly differ fit
    axes.set_ylim(low - margin, high + margin)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")
    axes.grid(axis="y")
    if trajectory.best is not None:
        axes.axvline(trajectory.best, color=QUIET, linewidth=0.8, linestyle=(0, (3, 3)))
        axes.annotate(
            "best", (trajectory.best, 1), (0, 0.2), ("data", "axes fraction"), "offset fontsize",
            size="small", color=QUIET, ha="center",
        )  # fmt: skip
    label_ends(axes, sorted(ends), [name_of(results, k, 11) for k in range(len(trajectory.lines))])


def label_ends(axes: Axes, ends: Sequence[tuple[float, int, str]], names: Sequence[str]) -> None:
    """Write the names right of the lines that end at `ends`, each tied to its line.

    ends: value, class and colour, ascending.
    """
    (low, high), size = axes.get_ylim(), 0.833 * matplotlib.rcParams["font.size"]
    height = axes.bbox.height * 72 / axes.figure.dpi
    places = apart([(value - low) / (high - low) for value, _, _ in ends], 1.25 * size / height)
    for (value, k, colour), place in zip(ends, places, strict=True):
        axes.annotate(
            names[k], (1, value), (1.06, place), ("axes fraction", "data"), "axes fraction",
            size="small", weight="normal" if colour == REST else "bold", va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "linewidth": 0.8,
                        "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def apart(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places moved to be at least `gap` apart, within [0,1] if there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else 0.0))
    ceiling = max(1.0, gap * (len(moved) - 1))
    for k in range(len(moved) - 1, -1, -1):
        moved[k] = min(moved[k], ceiling)
        ceiling = moved[k] - gap
    return moved
