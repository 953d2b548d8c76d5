"""Drawing for the report card: elements of HTML and SVG that escape what they are given, and two
charts. Colours are classes of the page's style sheet; lengths are units of the viewBox."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from absld.report.summary import clip, columns, number, plain, sampled

WIDTH = 400.0
FIGURES = 80.0  # of it for the figures at the right of the bars
POINTS = 150  # of a line: finer than it can be seen
LABELS = 12  # more lines than these are not labelled each


class Markup(str):
    """Text that is markup already; `tag` escapes all other text."""


def tag(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element. `class_` is the attribute class, and `_` in other names is `-`; an attribute
    that is None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(shown(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Sequence[str]) -> Markup:
    """Markup as it is, other text escaped."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else html.escape(plain(child)) for child in children
        )
    )


def shown(value: str | float) -> str:
    """A length to a tenth, without what it can do without."""
    if isinstance(value, str):
        return plain(value)
    return f"{value:.1f}".removesuffix(".0")


def picture(height: float, label: str, description: str, *children: str) -> Markup:
    """An SVG of the whole width, with the texts that stand for it where it is not seen."""
    return tag(
        "svg",
        tag("title", label),
        tag("desc", description),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {shown(WIDTH)} {shown(height)}",
        role="img",
        aria_label=f"{label}. {description}",
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def words(
    x: float, y: float, text: str, anchor: str = "start", class_: str | None = None
) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers, the first at or below `low`, the last at or above `high`."""
    rough = (high - low or max(abs(high), 1.0) / 10) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, max(last, first + 1) + 1)]


# --- Bars ---


class Bar(NamedTuple):
    """A class: shares in [0,1] with value, low and high, which are None without images. mark: a
    word before the robust figure."""

    name: str
    mark: str
    clean: dict[str, Any]
    robust: dict[str, Any]


def bars(rows: Sequence[Bar], dense: bool, label: str, description: str) -> Markup:
    """For every class a bar of its clean and one of its robust accuracy, with whiskers."""
    pitch, thin, thick = (15.0, 4.0, 7.0) if dense else (31.0, 7.0, 13.0)
    bottom = 20 + pitch * len(rows)
    names = [clip(row.name, 15) for row in rows]
    left = 12 + 7.6 * max(map(columns, names))
    right = WIDTH - FIGURES

    def across(share: float) -> float:
        return left + share * (right - left)

    def bar(each: dict[str, Any], top: float, height: float, class_: str) -> list[Markup]:
        low, high = across(each["low"]), across(each["high"])
        middle, cap = top + height / 2, height / 4
        length = across(each["value"]) - left
        return [
            tag("rect", x=left, y=top, width=length, height=height, class_=class_),
            line(low, middle, high, middle, "whisker"),
            line(low, middle - cap, low, middle + cap, "whisker"),
            line(high, middle - cap, high, middle + cap, "whisker"),
        ]

    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(share)
        drawn += [
            line(x, 18.0, x, bottom, "grid"),
            words(x, 12.0, f"{share:.0%}", "middle", "tick"),
        ]
    for k, row in enumerate(rows):
        top = 20 + pitch * k + (pitch - thin - thick - 1) / 2
        baseline = 20 + pitch * (k + 0.5) + 4
        style = "strong" if row.mark else None
        drawn.append(
            tag("g", tag("title", row.name), words(left - 6, baseline, names[k], "end", style))
        )
        if row.robust["value"] is None:
            drawn.append(words(left + 4, baseline, "no images", class_="tick"))
            continue
        drawn += bar(row.clean, top, thin, "clean")
        drawn += bar(row.robust, top + thin + 1, thick, "robust")
        figure = f"{row.mark} {number(row.robust['value'])}".strip()
        drawn.append(words(WIDTH, baseline, figure, "end", style))
    return picture(bottom + 2, label, description, *drawn)


# --- Lines ---


def lines(
    epochs: Sequence[int],
    series: Sequence[Sequence[float | None]],
    names: Sequence[str],
    first: Sequence[int],
    limits: tuple[float, float],
    marked: int | None,
    label: str,
    description: str,
) -> Markup:
    """A line for each class over the epochs.

    first: the classes that stand out; all others are grey, and labelled only if there are few.
    limits: of the values. marked: an epoch with a rule of its own.
    """
    left, right, top, bottom = 36.0, 290.0, 12.0, 206.0
    few = len(series) <= LABELS
    levels, kept = ticks(*limits), sampled(epochs, POINTS)
    start, end = float(epochs[0]), float(epochs[-1])

    def x_of(epoch: float) -> float:
        return left + (epoch - start) / (end - start or 1.0) * (right - left)

    def y_of(value: float) -> float:
        return bottom - (value - levels[0]) / (levels[-1] - levels[0]) * (bottom - top)

    drawn = []
    for level in levels:
        y = y_of(level)
        drawn += [
            line(left, y, right, y, "grid"),
            words(left - 5, y + 4, f"{level:g}", "end", "tick"),
        ]
    for tick in ticks(start, end):
        if start <= tick <= end and tick == round(tick):
            drawn.append(words(x_of(tick), bottom + 16, f"{tick:g}", "middle", "tick"))
    drawn.append(words((left + right) / 2, bottom + 32, "epoch", "middle", "tick"))
    if marked is not None and start <= marked <= end:
        x = x_of(float(marked))
        drawn += [line(x, top, x, bottom, "rule"), words(x, top - 3, "best", "middle", "tick")]

    rest = "series rest" if few else "series rest thin"
    labels: list[tuple[float, int, str]] = []
    behind = [k for k in range(len(series)) if k not in first]
    for k in [*behind, *reversed(first)]:  # the worst is drawn last, above the others
        points = [
            None if (value := series[k][at]) is None else (x_of(float(epochs[at])), y_of(value))
            for at in kept
        ]
        style = f"series s{first.index(k)}" if k in first else rest
        drawn.append(tag("path", d=path(points), class_=style))
        last = next((point for point in reversed(points) if point), None)
        if last and (k in first or few):
            labels.append((last[1], k, f"s{first.index(k)}" if k in first else ""))
    drawn += end_labels(labels, names, right, (top, bottom))
    return picture(bottom + 38, label, description, *drawn)


def end_labels(
    labels: Sequence[tuple[float, int, str]],
    names: Sequence[str],
    right: float,
    limits: tuple[float, float],
) -> list[Markup]:
    """The names at the right of their lines, moved apart, each tied to its line's end."""
    found = sorted(labels)
    places = apart([y for y, _, _ in found], 14.0, *limits)
    drawn = []
    for (y, k, colour), place in zip(found, places, strict=True):
        drawn.append(line(right + 4, y, right + 14, place, f"tie {colour}".strip()))
        drawn.append(
            words(right + 17, place + 4, clip(names[k], 11), class_="strong" if colour else None)
        )
    return drawn


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending places, moved as little as makes them `gap` apart, and back into [low, high]."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    ceiling = max(high, low + gap * (len(moved) - 1))
    for k in range(len(moved) - 1, -1, -1):
        moved[k] = min(moved[k], ceiling)
        ceiling = moved[k] - gap
    return moved


def path(points: Sequence[tuple[float, float] | None]) -> str:
    """A line through the points, broken where one is None. In steps of tenths from point to point:
    a report of 100 classes has tens of thousands of them."""
    written, before = [], None
    for point in points:
        if point is None:
            before = None
            continue
        now = round(10 * point[0]), round(10 * point[1])
        if before is None:
            written.append(f"M{now[0] / 10:g} {now[1] / 10:g}l0 0")
        else:
            step = f"{(now[0] - before[0]) / 10:g} {(now[1] - before[1]) / 10:g}"
            written.append(f" {step}".replace(" -", "-"))
        before = now
    return "".join(written)
