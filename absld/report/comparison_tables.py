"""A comparison as tables for the terminal, Markdown and LaTeX in per cent, CSV in fractions.

`results` are those of docs/comparing.md.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absld.report.summary import ABSENT, MANY, bracket, budget, number, verdict
from absld.text import columns, printable, wrap

HEADINGS = {
    "clean_average": "clean average",
    "clean_worst": "clean worst",
    "robust_average": "robust average",
    "robust_worst": "robust worst",
    "robust_worst_tenth": "robust worst 10 %",
    "robust_normalized_std": "robust NSD",
    "rho": "rho",  # only as a difference
    "seconds": "seconds",
}
COMPARED = ("clean_average", "robust_average", "robust_worst", "robust_normalized_std", "rho")
DIFFERENCES = ["method", "figure", "difference", "over seeds", "over images", "verdict"]
MEANING = (
    "Differences to {baseline}, seed by seed, in points (rho: as it is). 95 % intervals: over "
    "seeds by Student's t, for other seeds on these images; over images by the paired bootstrap, "
    "for other images and these seeds. A difference counts only if both 95 % intervals exclude "
    "zero."
)


def headings(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns; the worst tenth only if it is more than one class."""
    few = len(results["data"]["classes"]) < MANY
    return {k: v for k, v in HEADINGS.items() if not (few and k == "robust_worst_tenth")}


def title(results: Mapping[str, Any]) -> str:
    """Return what was evaluated."""
    attacks = ", ".join(results["settings"]["attacks"])
    return f"{images_and_budget(results)}; robust: correct when clean and under {attacks}"


def images_and_budget(results: Mapping[str, Any]) -> str:
    """Return on what images and within what distance was evaluated."""
    data = results["data"]
    images = f"{data['images']:,} of {data['of']:,} {data['split']} images"
    return f"{data['dataset']}, {images}, epsilon {budget(results['settings'])}"


def explanation(results: Mapping[str, Any]) -> str:
    """Return how to read the figures."""
    return f"{unit_and_spread(results)}. rho: relative gains in worst class and average, summed."


def unit_and_spread(results: Mapping[str, Any]) -> str:
    """Return what a cell consists of."""
    seeds = max(len(method["seeds"]) for method in results["methods"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Per cent; {spread}"


def mean_and_std(method: Mapping[str, Any], name: str, pm: str) -> str:
    """Return the figure `name` of a method, with `pm` for plus or minus."""
    if name == "rho" and method["differences"] is None:
        return ABSENT
    figure = method["differences"]["rho"] if name == "rho" else method["figures"][name]
    std = "" if figure["std"] is None else f"{pm}{number(figure['std'], name)}"
    return number(figure["mean"], name) + std


def rows(results: Mapping[str, Any], pm: str = " ± ") -> list[list[str]]:
    """Return a row for each method: its name, and a cell for each heading."""
    return [
        [method["name"], *(mean_and_std(method, name, pm) for name in headings(results))]
        for method in results["methods"]
    ]


def difference_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a row with the cells of DIFFERENCES for each method and compared figure."""
    table = []
    for method in results["methods"]:
        for name in COMPARED if method["differences"] else ():
            difference = method["differences"][name]
            intervals = difference["over_seeds"], difference["over_images"]
            cells = [method["name"], HEADINGS[name], number(difference["mean"], name, "+")]
            cells += [bracket(interval, name, "+") or ABSENT for interval in intervals]
            table.append([*cells, verdict(name, *intervals)])
    return table


# --- Formats ---


def terminal_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the tables as lines; the headings are short, so that a method has one line."""
    short = {"clean average": "clean", "clean worst": "worst", "robust average": "robust"}
    heads = [short.get(text, text.removeprefix("robust ")) for text in headings(results).values()]
    lines = [*wrapped(title(results)), *wrapped(explanation(results)), ""]
    lines += aligned([["", *heads], *rows(results, "±")])
    if differences := difference_rows(results):
        lines += ["", *wrapped(MEANING.format(baseline=results["baseline"])), ""]
        lines += aligned([DIFFERENCES, *differences], left=(0, 1, 5))
    return [printable(line) for line in [*lines, "", *closing_lines(results)]]


def closing_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the notes, and the sanity checks that warn."""
    texts = [f"note: {note}" for note in results["notes"]]
    for method in results["methods"]:
        if method["warnings"]:
            texts.append(f"WARN {method['name']}: {'; '.join(method['warnings'])}")
    return [line for text in texts for line in wrapped(text)]


def wrapped(text: str) -> list[str]:
    """Return a text as lines for a terminal of 80 columns."""
    return wrap(text, 80)


def aligned(table: list[list[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Return rows as lines, with the columns `left` aligned to the left, the others to the right."""
    widths = [max(columns(row[k]) for row in table) for k in range(len(table[0]))]

    def pad(text: str, k: int) -> str:
        space = " " * (widths[k] - columns(text))
        return text + space if k in left else space + text

    return ["  ".join(pad(text, k) for k, text in enumerate(row)).rstrip() for row in table]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables, and one of every run, in Markdown."""
    lines = [in_markdown(f"{title(results)}. {explanation(results)}"), ""]
    lines += markdown_table(["method", *headings(results).values()], rows(results))
    if differences := difference_rows(results):
        meaning = in_markdown(MEANING.format(baseline=results["baseline"]))
        lines += [meaning, "", *markdown_table(DIFFERENCES, differences)]
    lines += [*table_of_runs(results), *(f"* {in_markdown(note)}" for note in results["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(head: list[str], body: list[list[str]]) -> list[str]:
    """Return a table as lines of Markdown, the last one empty."""
    return markdown_lines([[markdown_cell(text.strip()) for text in row] for row in (head, *body)])


def markdown_lines(rows: list[list[str]]) -> list[str]:
    """Return rows of Markdown, the first one the head, as lines of a table, the last one empty."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:], ""]


def table_of_runs(results: Mapping[str, Any]) -> list[str]:
    """Return the figures of every run as lines of Markdown."""
    names = [name for name in headings(results) if name != "rho"]
    runs = [
        [
            method["name"],
            str(seed),
            *(number(method["figures"][name]["values"][k], name) for name in names),
        ]
        for method in results["methods"]
        for k, seed in enumerate(method["seeds"])
    ]
    heads = ["method", "seed", *(HEADINGS[name] for name in names)]
    return ["Every run:", "", *markdown_table(heads, runs)]


def markdown_cell(text: str) -> str:
    """Return a text that a cell of a table shows as it is."""
    return in_markdown(text).replace("|", "\\|")


def in_markdown(text: str) -> str:
    """Return a text that Markdown shows as it is: no HTML, links, emphasis or code."""
    return re.sub(r"([\\`*<>]|\](?=[(\[:]))", r"\\\1", printable(text))


def in_latex(text: str) -> str:
    """Return a text that LaTeX shows as it is, also in a first cell."""
    special: dict[str, str | int | None] = {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"[": "{[}", "*": "{*}"}  # of a first cell: they would belong to the \\ before it
    special |= {"±": r"$\pm$", "\N{MINUS SIGN}": "$-$", ABSENT: "--"}
    return printable(text).translate(str.maketrans(special))


def latex_line(cells: Sequence[str]) -> str:
    """Return cells of LaTeX as a line of a table."""
    return " & ".join(cells) + r" \\"


def latex(results: Mapping[str, Any]) -> str:
    """Return a tabular for the package booktabs."""

    def line(cells: list[str]) -> str:
        return latex_line([*map(in_latex, cells)])

    heads = ["method", *headings(results).values()]
    lines = [
        f"% {printable(title(results))}",
        f"% {explanation(results)}",
        r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}",
        r"\toprule",
        line(heads),
        r"\midrule",
        *(line(row) for row in rows(results)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def csv_text(results: Mapping[str, Any]) -> str:
    """Return a row for each run, and for each method one of means and one of deviations."""
    names = list(results["methods"][0]["figures"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *names])
    for method in results["methods"]:
        figures = [method["figures"][name] for name in names]
        label = csv_cell(method["name"])
        for k, seed in enumerate(method["seeds"]):
            writer.writerow([label, seed, *(figure["values"][k] for figure in figures)])
        for kind in ("mean", "std"):
            writer.writerow([label, kind, *(figure[kind] for figure in figures)])
    return text.getvalue()


def csv_cell(value: Any) -> str:
    """Return a name or a setting as a cell: no spreadsheet computes it."""
    text = printable(str(value))
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
