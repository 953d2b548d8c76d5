"""A report on one page, as PNG or PDF."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from absld.report import figures, summary
from absld.report.figures import QUIET, RED, TEXT
from absld.text import clip, printable, wrap

WIDTH = 8.27  # of the page, in inches, as are all lengths here; the height is as needed
MARGIN, COLUMN = 0.35, 3.65
SECOND = WIDTH - MARGIN - COLUMN  # where the second column begins
DPI = 200
LINE = 0.13  # height of a line of small text
WRAP = 76  # letters of small text in a column


def picture(
    results: Mapping[str, Any], records: Sequence[Mapping[str, Any]], file_format: str
) -> bytes:
    """Return the report in the format png or pdf; the same results make the same bytes."""
    file = io.BytesIO()
    with figures.drawing_style(8):
        figure = draw_page(Figure(dpi=DPI), with_drawable_names(results), records)
        undated = {"CreationDate": None} if file_format == "pdf" else None
        figure.savefig(file, format=file_format, metadata=undated)
    return file.getvalue()


def draw_page(
    figure: Figure, results: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Figure:
    """Draw all panels, from the top to the bottom."""
    names = results["data"]["classes"]
    shown = summary.trajectories(records, len(names))
    columns = text_columns(results)
    many = len(names) > summary.MANY
    charts_at, lines_at = 2.75, 6.7
    texts_at = lines_at + (2.2 * -(-len(shown) // 2) or 0.9)
    height = texts_at + max(sum(map(text_height, column.values())) for column in columns)
    figure.set_size_inches(WIDTH, height)

    def panel(left: float, top: float, width: float, tall: float, heading: str = "") -> Axes:
        box = left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height
        axes = figure.add_axes(box)
        axes.set_title(heading, pad=14)
        return axes

    write_head(panel(0, 0, WIDTH, charts_at), results)
    heading = f"Classes, {f'the worst {summary.MANY} of {len(names)}' if many else 'worst first'}"
    axes = panel(MARGIN + 0.75, charts_at + 0.3, COLUMN - 1.4, 2.6, heading)
    figures.class_bars(axes, results, summary.worst_first(results)[: summary.MANY])
    if many:
        heading = "Most frequent confusions under attack"
        write(
            panel(SECOND, charts_at + 0.2, COLUMN, 2.75), heading, wrapped(confusion_texts(results))
        )
    else:
        heading = "Confusion under attack, images"
        axes = panel(SECOND + 0.85, charts_at + 0.3, COLUMN - 0.85, 2.5, heading)
        figures.confusion_matrix(axes, results)
    for k, trajectory in enumerate(shown):
        left, top = (SECOND if k % 2 else MARGIN) + 0.3, lines_at + 2.2 * (k // 2)
        axes = panel(left, top, COLUMN - 1.2, 1.5, trajectory.title)
        figures.trajectory_lines(axes, results, trajectory)
    if not shown:
        heading = "Class temperatures and risks in training"
        write(panel(MARGIN, lines_at, COLUMN, 0.4), heading, [summary.NO_TRAJECTORIES])
    for left, column in zip((MARGIN, SECOND), columns, strict=True):
        top = texts_at
        for heading, lines in column.items():
            write(panel(left, top, COLUMN, LINE * len(lines)), heading, lines)
            top += text_height(lines)
    return figure


def write_head(axes: Axes, results: Mapping[str, Any]) -> None:
    """Write the title, the facts, warnings and the headline figures."""
    set_inches(axes)

    def say(x: float, y: float, text: str, size: float, color: str, weight: str = "normal") -> None:
        axes.text(x, y, drawable(text), size=size, color=color, weight=weight, va="center")

    say(MARGIN, 0.33, clip(summary.title(results), 62), 15, TEXT, "bold")
    for k, (name, text) in enumerate(summary.facts(results).items()):
        say(MARGIN, 0.62 + 0.17 * k, name, 8, QUIET)
        say(MARGIN + 0.6, 0.62 + 0.17 * k, clip(text, 118), 8, TEXT)
    if warning := summary.check_warning(results):
        say(MARGIN, 1.33, f"WARN: {warning}", 8, RED, "bold")
    elif results["checks"] is None:
        say(MARGIN, 1.33, summary.NO_CHECKS, 8, QUIET, "bold")
    for k, (label, value, interval, note) in enumerate(summary.headlines(results)):
        x = MARGIN + 1.28 * k
        say(x, 1.6, value, 15, TEXT, "bold")
        say(x, 1.78, interval, 6.5, QUIET)
        say(x, 1.91, label, 6.5, TEXT, "bold")
        say(x, 2.04, clip(note, 26), 6.5, QUIET)
    say(MARGIN, 2.21, summary.TERMS, 6.5, QUIET)
    say(MARGIN, 2.21 + LINE, summary.INTERVALS, 6.5, QUIET)


def write(axes: Axes, heading: str, lines: Sequence[str]) -> None:
    """Write small lines of text from the top of a panel."""
    set_inches(axes)
    axes.set_title(heading)
    for k, line in enumerate(lines):
        colour = RED if line.startswith("WARN") else TEXT
        axes.text(0, LINE * (k + 0.5), line, size=6.5, color=colour, va="center")


def set_inches(axes: Axes) -> None:
    """Hide the axes, and count in inches from the top left."""
    axes.set_axis_off()
    axes.set_xlim(0, axes.bbox.width / DPI)
    axes.set_ylim(axes.bbox.height / DPI, 0)


# --- Texts ---


def text_columns(results: Mapping[str, Any]) -> list[dict[str, list[str]]]:
    """Return the lines of each panel of text by its heading, for both columns."""
    checks = [
        f"{'PASS' if check['passed'] else 'WARN'}  {check['name']}: {check['numbers']}"
        for check in results["checks"] or ()
    ]
    settings, origin = (
        [f"{name}: {text}" for name, text in texts.items()]
        for texts in (summary.settings(results), summary.reproduction(results))
    )
    left = {"Sanity checks": checks or [summary.NO_CHECKS], "Settings": settings}
    right = {"How to reproduce": [results["environment"]["command"], *origin]}
    if results["against"]:
        right = {"Against the baseline, robust": difference_texts(results["against"])} | right
    return [{heading: wrapped(column[heading]) for heading in column} for column in (left, right)]


def difference_texts(against: Mapping[str, Any]) -> list[str]:
    """Return the differences to a baseline."""
    texts = [f"minus {against['network']['target']}, in points; rho is a ratio"]
    for name, label in {**summary.METRICS, "rho": "rho"}.items():
        interval = against["rho"] if name == "rho" else against["robust"][name]
        value, ends = summary.estimate(interval, name, "+")
        verdict = summary.verdict(name, (interval["low"], interval["high"]))
        texts.append(f"{label} {value} {ends}, {verdict}")
    return texts


def confusion_texts(results: Mapping[str, Any]) -> list[str]:
    """Return the most frequent confusions."""
    names = [clip(name, 24) for name in results["data"]["classes"]]
    return [
        f"{names[true]} → {names[predicted]}: {images} of {of}"
        for true, predicted, images, of in summary.frequent_confusions(results, summary.MANY)
    ]


def wrapped(texts: Sequence[str]) -> list[str]:
    """Return texts as lines of the width of a column."""
    return [drawable(line) for text in texts for line in wrap(text, WRAP, later="   ")]


def text_height(lines: Sequence[str]) -> float:
    """Return the height of lines with their heading."""
    return 0.45 + LINE * len(lines)


# --- Letters ---


def drawable(text: str) -> str:
    """Return a text in which letters that the font lacks are escaped."""
    return "".join(letter if has(letter) else f"\\u{ord(letter):04x}" for letter in text)


def with_drawable_names(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results in which a class that the font cannot name has its number, from 0."""
    names = [
        name if all(map(has, printable(name))) else f"class {k}"
        for k, name in enumerate(results["data"]["classes"])
    ]
    return {**results, "data": {**results["data"], "classes": names}}


def has(letter: str) -> bool:
    """Return whether the font, which comes with matplotlib, has a letter."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans")))
    return font.get_char_index(ord(letter)) != 0
