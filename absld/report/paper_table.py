"""A comparison in the paper's layout: methods by family, and for each attack alone its figures.

`results` are those of docs/comparing.md, of runs that were evaluated under each attack alone.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, get_args

from absld.evaluation.attacks import parse_attack
from absld.methods.base import Family
from absld.report.comparison_tables import (
    closing_lines,
    images_and_budget,
    in_latex,
    in_markdown,
    latex_line,
    markdown_cell,
    markdown_lines,
    unit_and_spread,
    wrapped,
)
from absld.report.summary import ABSENT, LOWER_IS_BETTER, MANY, METRICS, number
from absld.text import columns, wrap

FIGURES = {
    "average": "avg.",
    "worst": "worst",
    "worst_tenth": "worst 10 %",
    "normalized_std": "NSD",
}
NAMES = {"clean": "clean", "fgsm": "FGSM", "autoattack": "AutoAttack"}
MARKS = {1: "bold", 2: "underline"}
SIGNS = {1: "*", 2: "_"}  # in place of marks that a stream does not show
WIDTH, LEAST, MOST = 80, 20, 40  # columns of a terminal, and at least and at most of its names

Segment = tuple[str, str]  # a text, and "bold", "underline" or ""


class Cell(NamedTuple):
    """A mean and its deviation as texts; place: 1 for the best of a column, 2 for the second."""

    mean: str
    std: str
    place: int


# --- Content ---


def by_family(methods: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return the methods of each family that has any, in the order of the paper's table."""
    groups = {family: [m for m in methods if m["family"] == family] for family in get_args(Family)}
    return {family: members for family, members in groups.items() if members}


def places(values: Sequence[float | None], *, lower_is_better: bool = False) -> list[int]:
    """Return 1 for the best values, 2 for the second best ones, and 0 for the others.

    Equal values share their place: where two are the best, none is the second. The last value has
    no place, nor have equal ones with it; so a single one has none. None takes no part.
    """
    known = sorted((v for v in values if v is not None), reverse=not lower_is_better)
    ranks = [0 if v is None or v == known[-1] else 1 + known.index(v) for v in values]
    return [rank if rank in MARKS else 0 for rank in ranks]


def figures(results: Mapping[str, Any]) -> list[str]:
    """Return the figures of an attack; the worst tenth only if it is more than one class."""
    few = len(results["data"]["classes"]) < MANY
    return [name for name in FIGURES if not (few and name == "worst_tenth")]


def attacks(results: Mapping[str, Any]) -> list[str]:
    """Return the attacks, "clean" first."""
    return list(results["methods"][0]["attacks"])


def cells(methods: Sequence[Mapping[str, Any]], attack: str, name: str) -> list[Cell]:
    """Return the column of a figure under an attack; its places are those of the means as shown."""
    found = [method["attacks"][attack][name] for method in methods]
    means, deviations = ([figure[kind] for figure in found] for kind in ("mean", "std"))
    shown = [None if mean is None else round(100 * mean, 1) for mean in means]
    texts = ("" if std is None else number(std) for std in deviations)
    ranked = places(shown, lower_is_better=name in LOWER_IS_BETTER)
    return [Cell(*each) for each in zip(map(number, means), texts, ranked, strict=True)]


def attack_name(attack: str) -> str:
    """Return the name of an attack as the field writes it, such as PGD-20 for pgd20."""
    return NAMES.get(attack) or re.sub(
        "([a-z]+)([0-9]+)", lambda found: f"{found[1].upper()}-{found[2]}", attack
    )


def attack_meaning(attack: str, settings: Mapping[str, Any]) -> str:
    """Return what an attack does, under the settings of an evaluation."""
    if attack == "autoattack":
        return "its standard version"
    meant = parse_attack(attack, settings["restarts"], settings["norm"])
    start = "a uniform start" if meant.uniform_start else "the image"
    steps = f"{meant.steps} step{'s' * (meant.steps > 1)} of {meant.step_size:.3g} epsilon"
    return f"{steps} on the {meant.objective} from {start}"


def caption(results: Mapping[str, Any], best: str, second: str) -> str:
    """Return how to read the table. best, second: words for their marks."""
    names = attacks(results)
    meanings = [f"{attack_name(a)}: {attack_meaning(a, results['settings'])}" for a in names[1:]]
    nsd = "NSD: standard deviation of the class accuracies over their mean, lower is better"
    of_all = [m["attacks"][a]["normalized_std"]["mean"] for m in results["methods"] for a in names]
    always_wrong = f"; {ABSENT}: of a network that is always wrong" if None in of_all else ""
    sentences = [
        images_and_budget(results),
        f"{unit_and_spread(results)}; the best checkpoint of each run",
        "Each attack is run alone, and an image counts if it is correct when clean and under it",
        *(["; ".join(meanings)] if meanings else []),
        f"{nsd} (ddof 0; over seeds: ddof 1{always_wrong})",
        f"{best}: the best of a column, {second}: the second best, by the means as shown; "
        "differences may be within the spread",
    ]
    return ". ".join(sentences) + "."


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def layout(
    results: Mapping[str, Any],
) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, Sequence[Cell]]]]]:
    """Return attack and figure of each column; and of each family name and cells of its methods."""
    families = by_family(results["methods"])
    methods = [method for members in families.values() for method in members]
    heads = [(attack, name) for attack in attacks(results) for name in figures(results)]
    rows = zip(*(cells(methods, *head) for head in heads), strict=True)
    return heads, {
        capitalised(family): [(method["name"], next(rows)) for method in members]
        for family, members in families.items()
    }


# --- Formats ---


def terminal_lines(results: Mapping[str, Any], *, styled: bool) -> list[list[Segment]]:
    """Return a block of lines for each figure, with a column for each attack.

    More attacks than a terminal has room for have several blocks. styled: mark the best by styles
    and not by signs.
    """
    heads, groups = layout(results)
    texts = {
        family: [(name, [segments(cell, styled=styled) for cell in row]) for name, row in members]
        for family, members in groups.items()
    }
    rows = [row for members in texts.values() for _, row in members]
    longest = max(2 + columns(method["name"]) for method in results["methods"])
    caption_lines = wrapped(caption(results, *("Bold", "underlined") if styled else SIGNS.values()))
    lines: list[list[Segment]] = [*([(line, "")] for line in caption_lines), [("", "")]]
    for name in figures(results):
        of_figure = [k for k, (_, figure) in enumerate(heads) if figure == name]
        titles = {k: attack_name(heads[k][0]) for k in of_figure}
        sizes = {k: 2 + max(len(titles[k]), *(width(row[k]) for row in rows)) for k in of_figure}
        for part in parts_that_fit(list(sizes.values())):
            shown = of_figure[part]
            title = capitalised(METRICS[name]).replace("\N{NBSP}", " ")
            room = max(LEAST, WIDTH - sum(sizes[k] for k in shown))
            room = max(len(title), min(room, MOST, longest))
            head = "".join(titles[k].rjust(sizes[k]) for k in shown)
            lines.append([(title.ljust(room) + head, "")])
            for family, members in texts.items():
                lines.append([(family, "")])
                for label, row in members:
                    lines += method_lines(label, room, [(row[k], sizes[k]) for k in shown])
            lines.append([("", "")])
    return [*lines, *([(line, "")] for line in closing_lines(results))]


def segments(cell: Cell, *, styled: bool) -> list[Segment]:
    """Return a cell as texts with styles."""
    sign, style = ("", MARKS.get(cell.place, "")) if styled else (SIGNS.get(cell.place, ""), "")
    return [(sign + cell.mean, style), (f"±{cell.std}" if cell.std else "", "")]


def width(texts: Sequence[Segment]) -> int:
    return sum(len(text) for text, _ in texts)


def parts_that_fit(sizes: Sequence[int]) -> list[slice]:
    """Return the columns of each block, as many as there is room for beside the names."""
    parts, start = [], 0
    while start < len(sizes):
        fitting = sum(total <= WIDTH - LEAST for total in accumulate(sizes[start:]))
        parts.append(slice(start, start + max(1, fitting)))
        start = parts[-1].stop
    return parts


def method_lines(
    label: str, room: int, row: Sequence[tuple[list[Segment], int]]
) -> list[list[Segment]]:
    """Return the line of a method; a name that needs more room begins in lines above it."""
    *above, last = wrap(label, room, "  ", "    ")
    line = [(last + " " * (room - columns(last)), "")]
    for texts, size in row:
        line += [(" " * (size - width(texts)), ""), *texts]
    return [*([(text, "")] for text in above), line]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    heads, groups = layout(results)
    marks = {0: "{}", 1: "**{}**", 2: "<ins>{}</ins>"}

    def shown(cell: Cell) -> str:
        return marks[cell.place].format(cell.mean) + (f" ± {cell.std}" if cell.std else "")

    table = [["method", *(f"{attack_name(attack)} {FIGURES[name]}" for attack, name in heads)]]
    for family, members in groups.items():
        table.append([f"*{family}*", *[""] * len(heads)])
        table += [[markdown_cell(name), *map(shown, row)] for name, row in members]
    notes = [f"* {in_markdown(note)}" for note in results["notes"]]
    text = in_markdown(caption(results, "Bold", "underlined"))
    return "\n".join([text, "", *markdown_lines(table), *notes]).rstrip() + "\n"


def latex(results: Mapping[str, Any]) -> str:
    r"""Return a float for the package booktabs; it prints a deviation by \absldstd."""
    heads, groups = layout(results)
    marks = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}

    def shown(cell: Cell) -> str:
        mean = "--" if cell.mean == ABSENT else marks[cell.place].format(cell.mean)
        return mean + (rf"\absldstd{{{cell.std}}}" if cell.std else "")

    each, names = len(figures(results)), attacks(results)
    titles = [rf"\multicolumn{{{each}}}{{c}}{{{in_latex(attack_name(a))}}}" for a in names]
    starts = range(2, 2 + each * len(names), each)
    body = []
    for family, members in groups.items():
        title = rf"\multicolumn{{{1 + len(heads)}}}{{l}}{{\emph{{{family}}}}}"
        body += [r"\midrule", latex_line([title])]
        body += [latex_line([in_latex(name), *map(shown, row)]) for name, row in members]
    lines = [
        r"% Needs \usepackage{booktabs}. To leave out the deviations, say",
        r"% \newcommand{\absldstd}[1]{} before.",
        r"\providecommand{\absldstd}[1]{{\tiny$\pm$#1}}",
        r"\begin{table*}",
        r"\centering\footnotesize\setlength{\tabcolsep}{2.5pt}",
        rf"\caption{{{in_latex(caption(results, 'Bold', 'underlined'))}}}",
        r"\begin{tabular}{l" + ("r" * each) * len(names) + "}",
        r"\toprule",
        latex_line(["", *titles]),
        " ".join(rf"\cmidrule(lr){{{start}-{start + each - 1}}}" for start in starts),
        latex_line(["method", *(in_latex(FIGURES[name]) for _, name in heads)]),
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"
