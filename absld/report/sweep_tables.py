"""The points of a sweep as tables for the terminal and Markdown in per cent, CSV in fractions.

`results` are those of docs/sweeps.md: a comparison whose methods are the points.
"""

import csv
import io
from collections.abc import Mapping
from typing import Any

from absld.report.comparison_tables import (
    aligned,
    closing_lines,
    csv_cell,
    in_markdown,
    markdown_table,
    mean_and_std,
    table_of_runs,
    title,
    unit_and_spread,
    wrapped,
)
from absld.report.summary import ABSENT, number, verdict
from absld.text import printable

AXES = {"robust_average": "robust average", "robust_worst": "robust worst"}
MORE = {"clean_average": "clean average", "robust_normalized_std": "robust NSD"}
MEANING = (
    "*: on the frontier, no other point is as good in both means. Changes against the base point, "
    "{base}, seed by seed, in points; better or worse where the 95 % intervals over seeds and over "
    "images both exclude zero. Among many points some are so by chance."
)


def explanation(results: Mapping[str, Any]) -> str:
    """Return how to read the figures."""
    base = next(method for method in results["methods"] if method["name"] == results["baseline"])
    words = (f"{name} {value_text(value)}" for name, value in base["settings"].items())
    return f"{unit_and_spread(results)}. {MEANING.format(base=', '.join(words))}"


def value_text(value: Any) -> str:
    """Return the value of a setting; a dash where a point does not have the setting."""
    if value is None:
        return ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def change(method: Mapping[str, Any], name: str) -> str:
    """Return the difference to the base point, with a word if it is beyond its intervals."""
    if method["differences"] is None:
        return "base"
    difference = method["differences"][name]
    word = verdict(name, difference["over_seeds"], difference["over_images"])
    text = number(difference["mean"], name, "+")
    return f"{text} {word}" if word in ("better", "worse") else text


def point_table(
    results: Mapping[str, Any], more: Mapping[str, str], pm: str
) -> tuple[list[str], list[list[str]]]:
    """Return the headings, and a row for each point: number, settings, figures, changes.

    more: figures beside those of the frontier, with their headings. pm: plus or minus.
    """
    names = list(results["sweep"]["over"])
    heads = [
        "point",
        *names,
        *more.values(),
        *AXES.values(),
        "change in average",
        "change in worst",
    ]
    rows = [
        [
            f"{'*' if method['frontier'] else ' '}{place}",
            *(value_text(method["settings"].get(name)) for name in names),
            *(mean_and_std(method, name, pm) for name in (*more, *AXES)),
            *(change(method, name) for name in AXES),
        ]
        for place, method in enumerate(results["methods"], 1)
    ]
    return heads, rows


def terminal_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the table and the notes as lines; long headings have several lines."""
    heads, rows = point_table(results, {}, "±")
    words = [head.replace("_", " ").rsplit(" ", 1) for head in heads]
    words = [[*[""] * (2 - len(column)), *column] for column in words]
    lines = [*wrapped(title(results)), *wrapped(explanation(results)), ""]
    lines += aligned([*map(list, zip(*words, strict=True)), *rows])
    return [printable(line) for line in [*lines, "", *closing_lines(results)]]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table of the points, and one of every run, in Markdown."""
    lines = [in_markdown(f"{title(results)}. {explanation(results)}"), ""]
    lines += [*markdown_table(*point_table(results, MORE, " ± ")), *table_of_runs(results)]
    lines += [f"* {in_markdown(note)}" for note in results["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def points_csv(results: Mapping[str, Any]) -> str:
    """Return a row for each point: settings, frontier, means, deviations, changes, verdicts."""
    names, figures = list(results["sweep"]["over"]), list(results["methods"][0]["figures"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [f"{figure}_{kind}" for figure in figures for kind in ("mean", "std")]
    heads += [f"{figure}_{kind}" for figure in AXES for kind in ("change", "verdict")]
    writer.writerow(["point", *names, "base", "frontier", "seeds", *heads])
    for place, method in enumerate(results["methods"], 1):
        settings = [method["settings"].get(name) for name in names]
        cells: list[Any] = ["" if v is None else csv_cell(v) for v in settings]
        cells += [method["name"] == results["baseline"], method["frontier"], len(method["seeds"])]
        cells += [method["figures"][f][kind] for f in figures for kind in ("mean", "std")]
        for name in AXES:
            change = (method["differences"] or {}).get(name)
            both = (change["over_seeds"], change["over_images"]) if change else ()
            cells += [change["mean"], verdict(name, *both)] if change else ["", ""]
        writer.writerow([place, *cells])
    return text.getvalue()
