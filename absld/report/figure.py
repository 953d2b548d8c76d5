"""The report card as a figure of one page, by matplotlib, which is an optional dependency.

Drawn with matplotlib's objects alone: pyplot, the backend and the settings of a program that draws
figures of its own stay as they are.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absld.errors import UsageError
from absld.evaluation.results import warnings
from absld.report.summary import (
    INTERVALS,
    MANY,
    METRICS,
    NO_CHECKS,
    NO_TRAJECTORIES,
    STANDING_OUT,
    TERMS,
    Trajectory,
    best_epoch,
    bracket,
    clip,
    columns,
    confusions,
    facts,
    headlines,
    limits,
    number,
    order,
    plain,
    reproduction,
    settings,
    title,
    trajectories,
    verdict,
    worst,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.27  # of the page, in inches, as are all lengths here; the height is as needed
LEFT, HALF = 0.35, 3.65  # margin, and the width of each of two columns
SECOND = WIDTH - LEFT - HALF  # where the second begins
DPI = 200
# The colours of the HTML in light.
TEXT, QUIET, GRID = "#1c2128", "#57606a", "#e3e7ec"
CLEAN, ROBUST, WARN = "#c77700", "#0b5cad", "#a33300"
FIRST, REST = (("#c43d00", "-"), ("#0b5cad", "--"), ("#007a5a", ":")), "#a3abb5"
SMALL, NORMAL, LARGE = 6.5, 8.0, 15.0  # points
PITCH = 0.13  # of small lines
WRAP = 76  # letters of a small line in a column


def picture(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]], kind: str) -> bytes:
    """The report card as a file of the `kind` png or pdf. Raises UsageError without matplotlib."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"png and pdf need matplotlib: {error}", "pip install 'absld[plots]'"
        ) from error
    file = io.BytesIO()
    # Not the settings of the user: they may ask for LaTeX, or for fonts that are not there.
    with style.context("default"):
        figure = page(Figure(dpi=DPI), with_drawable_names(document), records)
        # The same document makes the same file.
        undated = {"CreationDate": None} if kind == "pdf" else None
        figure.savefig(file, format=kind, metadata=undated)
    return file.getvalue()


def page(
    figure: "Figure", document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> "Figure":
    """All panels, from the top to the bottom."""
    shown = trajectories(records, len(document["data"]["classes"]))
    charts_at, lines_at = 3.0, 6.75
    texts_at = lines_at + (2.1 * -(-len(shown) // 2) or 0.9)
    texts = [
        {"Sanity checks": check_lines(document), "Settings": pair_lines(settings(document))},
        {"Against the baseline, robust": against_lines(document), "Origin": origin_lines(document)},
    ]
    height = texts_at + max(sum(room(found) for found in each.values()) for each in texts)
    figure.set_size_inches(WIDTH, height)

    def panel(left: float, top: float, width: float, tall: float) -> "Axes":
        return figure.add_axes(
            (left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height)
        )

    head(panel(0.0, 0.0, WIDTH, charts_at), document)
    class_bars(panel(LEFT + 0.75, charts_at, HALF - 1.3, 2.75), document)
    if len(document["data"]["classes"]) > MANY:
        write(panel(SECOND, charts_at, HALF, 2.75), "Most frequent confusions under attack",
              confusion_lines(document))  # fmt: skip
    else:
        confusion(panel(SECOND + 0.85, charts_at, HALF - 0.85, 2.75), document)
    for k, each in enumerate(shown):
        left = SECOND if k % 2 else LEFT
        lines(panel(left + 0.3, lines_at + 2.1 * (k // 2), HALF - 0.3, 1.5), each, shown, document,
              best_epoch(records))  # fmt: skip
    if not shown:
        heading = "Class temperatures and risks in training"
        write(panel(LEFT, lines_at, HALF, 0.4), heading, [(NO_TRAJECTORIES, TEXT)])
    for left, column in zip((LEFT, SECOND), texts, strict=True):
        top = texts_at
        for heading, found in column.items():
            if found:
                write(panel(left, top, HALF, PITCH * len(found)), heading, found)
            top += room(found)
    return figure


def head(axes: "Axes", document: Mapping[str, Any]) -> None:
    """Title, what was evaluated, warnings, and the headline figures."""
    axes.set_axis_off()
    axes.set_xlim(0, WIDTH)
    axes.set_ylim(axes.bbox.height / DPI, 0.0)  # inches

    def say(x: float, y: float, text: str, size: float, color: str, weight: str = "normal") -> None:
        axes.text(x, y, drawable(text), size=size, color=color, weight=weight, va="center")

    say(LEFT, 0.33, clip(f"{title(document)}: robustness of every class", 62), LARGE, TEXT, "bold")
    for k, (name, value) in enumerate(facts(document).items()):
        say(LEFT, 0.62 + 0.17 * k, name, NORMAL, QUIET)
        say(LEFT + 0.6, 0.62 + 0.17 * k, clip(value, 118), NORMAL, TEXT)
    if document["checks"] is None:
        say(LEFT, 1.33, NO_CHECKS, NORMAL, QUIET, "bold")
    elif failed := warnings(document):
        words = f"WARN: {len(failed)} of {len(document['checks'])} sanity checks did not pass"
        say(LEFT, 1.33, words, NORMAL, WARN, "bold")
    for k, each in enumerate(headlines(document)):
        x = LEFT + 1.28 * k
        say(x, 1.6, each.value, LARGE, TEXT, "bold")
        say(x, 1.78, each.interval, SMALL, QUIET)
        say(x, 1.91, each.label, SMALL, TEXT, "bold")
        say(x, 2.04, clip(each.note, 26), SMALL, QUIET)
    for k, words in enumerate((TERMS, INTERVALS)):
        say(LEFT, 2.21 + PITCH * k, words, SMALL, QUIET)


def class_bars(axes: "Axes", document: Mapping[str, Any]) -> None:
    """Clean and robust accuracy of the classes, the worst first; of many, the worst only."""
    names = document["data"]["classes"]
    ranked, marked = order(document)[:MANY], worst(document)
    parts = (document["attacks"][0]["classes"], -0.24, 0.22, CLEAN, "clean"), (
        document["robust"]["classes"], 0.13, 0.46, ROBUST, "robust, worst case over all attacks"
    )  # fmt: skip
    for classes, offset, height, colour, label in parts:
        there = [row for row, k in enumerate(ranked) if classes[k]["value"] is not None]
        found = [classes[ranked[row]] for row in there]
        values = [each["value"] for each in found]
        # An interval may miss its figure by a rounding, of 0 or 1.
        spread = [
            [max(each["value"] - each["low"], 0.0) for each in found],
            [max(each["high"] - each["value"], 0.0) for each in found],
        ]
        places = [row + offset for row in there]
        axes.barh(places, values, height, color=colour, label=label)
        axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=TEXT, elinewidth=0.7,
                      capsize=1.3, capthick=0.7)  # fmt: skip
    for row, k in enumerate(ranked):
        value = document["robust"]["classes"][k]["value"]
        words = f"{'worst ' if k in marked else ''}{number(value)}" if value is not None else ""
        axes.text(1.24, row, words or "no images", size=SMALL, color=TEXT, ha="right", va="center",
                  weight="bold" if k in marked else "normal")  # fmt: skip
    axes.set_yticks(range(len(ranked)), [line(names[k], 14) for k in ranked])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.xaxis.tick_top()
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.01, -0.005), ncols=2, frameon=False,
                fontsize=SMALL, handlelength=1, columnspacing=1)  # fmt: skip
    some = f"the worst {MANY} of {len(names)} classes" if len(names) > MANY else "the worst first"
    finish(axes, f"Classes, {some}")


def confusion(axes: "Axes", document: Mapping[str, Any]) -> None:
    """Who is taken for whom in the worst case."""
    names = document["data"]["classes"]
    counts = document["confusion"]
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    most = max((s for i, row in enumerate(shares) for j, s in enumerate(row) if i != j), default=0)
    size = SMALL if len(names) > 12 else NORMAL - 0.5
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            ink = (shares[i][j] if i == j else shares[i][j] / (most or 1)) / 2
            axes.fill([j - 0.48, j + 0.48, j + 0.48, j - 0.48],
                      [i - 0.48, i - 0.48, i + 0.48, i + 0.48],
                      color=ROBUST if i == j else CLEAN, alpha=ink, linewidth=0)  # fmt: skip
            axes.text(j, i, str(count), size=size, ha="center", va="center",
                      color=TEXT if count else QUIET)  # fmt: skip
    places = range(len(names))
    axes.set_yticks(places, [line(name, 14) for name in names])
    steep = max(map(columns, names)) > 3
    axes.set_xticks(places, [line(name, 10) for name in names], rotation=90 if steep else 0)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_ylabel("true class", size=SMALL, color=QUIET)
    axes.set_xlabel("taken for", size=SMALL, color=QUIET)
    finish(axes, "Confusion under attack, images")


def lines(
    axes: "Axes",
    each: Trajectory,
    shown: Sequence[Trajectory],
    document: Mapping[str, Any],
    marked: int | None,
) -> None:
    """A quantity of every class over the epochs; the worst classes stand out."""
    names, first = document["data"]["classes"], order(document)[:STANDING_OUT]
    for k, values in enumerate(each.lines):
        if k not in first:
            drawn = [float("nan") if value is None else value for value in values]
            axes.plot(each.epochs, drawn, color=REST, zorder=1,
                      linewidth=0.3 if len(names) > MANY else 0.7)  # fmt: skip
    for k, (colour, dash) in zip(first, FIRST, strict=False):
        drawn = [float("nan") if value is None else value for value in each.lines[k]]
        axes.plot(each.epochs, drawn, color=colour, linestyle=dash, linewidth=1.6, zorder=2,
                  label=line(names[k], 14))  # fmt: skip
    low, high = limits(shown, each.key)
    room = (high - low or 1.0) / 20
    axes.set_ylim(low - room, high + room)
    if marked is not None:
        axes.axvline(marked, color=QUIET, linewidth=0.7, linestyle=(0, (3, 3)))
        axes.text(marked, 1.01, "best", size=SMALL, color=QUIET, ha="center", va="bottom",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    axes.set_xlabel("epoch", size=SMALL, color=QUIET, labelpad=1)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.legend(fontsize=SMALL, frameon=True, framealpha=0.8, edgecolor="none", handlelength=2.6)
    finish(axes, each.title)


# --- Texts ---

Line = tuple[str, str]  # and its colour


def wrapped(text: str, colour: str) -> list[Line]:
    parts = textwrap.wrap(plain(text), WRAP, subsequent_indent="   ")
    return [(drawable(part), colour) for part in parts]


def confusion_lines(document: Mapping[str, Any]) -> list[Line]:
    names = [clip(name, 24) for name in document["data"]["classes"]]
    return [
        (drawable(f"{names[each.true]} → {names[each.said]}: {each.times} of {each.images}"), TEXT)
        for each in confusions(document, MANY)
    ]


def check_lines(document: Mapping[str, Any]) -> list[Line]:
    if document["checks"] is None:
        return wrapped(NO_CHECKS, TEXT)
    found = []
    for check in document["checks"]:
        word, colour = ("PASS", TEXT) if check["passed"] else ("WARN", WARN)
        found += wrapped(f"{word}  {check['name']}: {check['numbers']}", colour)
    return found


def against_lines(document: Mapping[str, Any]) -> list[Line]:
    """The differences to a baseline, if there is one."""
    other = document["against"]
    if not other:
        return []
    found = wrapped(f"minus {other['network']['target']}, in points; NSD and rho are ratios", TEXT)
    rows = [(name, label, other["robust"][name]) for name, label in METRICS.items()]
    for name, label, each in [*rows, ("rho", "rho", other["rho"])]:
        figure = f"{number(each['value'], name, '+')} {bracket(each, name, '+')}"
        found += wrapped(f"{label} {figure}, {verdict(each, name)}", TEXT)
    return found


def origin_lines(document: Mapping[str, Any]) -> list[Line]:
    return wrapped(document["environment"]["command"], TEXT) + pair_lines(reproduction(document))


def pair_lines(pairs: Mapping[str, str]) -> list[Line]:
    return [part for name, value in pairs.items() for part in wrapped(f"{name}: {value}", QUIET)]


def room(found: Sequence[Line]) -> float:
    """The height of lines with their heading."""
    return 0.45 + PITCH * len(found) if found else 0.0


def write(axes: "Axes", heading: str, rows: Sequence[Line]) -> None:
    """Small lines of text from the top of a panel."""
    axes.set_axis_off()
    axes.set_ylim(axes.bbox.height / DPI, 0.0)  # inches
    for k, (text, colour) in enumerate(rows):
        axes.text(0, PITCH * (k + 0.5), text, size=SMALL, color=colour, va="center")
    axes.set_title(heading, size=NORMAL + 1, weight="bold", color=TEXT, loc="left")


def finish(axes: "Axes", heading: str) -> None:
    """What all charts share."""
    axes.set_title(heading, size=NORMAL + 1, weight="bold", color=TEXT, loc="left", pad=10)
    axes.tick_params(labelsize=SMALL, colors=TEXT, length=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def line(text: str, width: int) -> str:
    return drawable(clip(text, width))


def drawable(text: str) -> str:
    """A text in letters that the font has, the others escaped, and without formulas."""
    drawn = "".join(letter if has(letter) else f"\\u{ord(letter):04x}" for letter in text)
    return drawn.replace("$", r"\$")


def with_drawable_names(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document in which a class that the font cannot name has its number, from 0."""
    names = [
        name if all(map(has, plain(name))) else f"class {k}"
        for k, name in enumerate(document["data"]["classes"])
    ]
    return {**document, "data": {**document["data"], "classes": names}}


def has(letter: str) -> bool:
    """Has the font, which comes with matplotlib, this letter?"""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return font.get_char_index(ord(letter)) != 0
