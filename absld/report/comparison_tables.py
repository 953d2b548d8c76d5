"""A comparison as tables: lines for the terminal, Markdown, LaTeX, CSV. Figures in per cent, but in
CSV as fractions. `document` is that of docs/comparing.md."""

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from absld.report.summary import ABSENT, LOWER_IS_BETTER, MANY, budget, columns, plain

# Figure -> its heading. rho has no figure of its own: it is a difference.
HEADINGS = {
    "clean_average": "clean average",
    "clean_worst": "clean worst",
    "robust_average": "robust average",
    "robust_worst": "robust worst",
    "robust_worst_tenth": "robust worst 10 %",
    "robust_normalized_std": "robust NSD",
    "rho": "rho",
    "seconds": "seconds",
}
COMPARED = ("clean_average", "robust_average", "robust_worst", "robust_normalized_std", "rho")


def headings(document: Mapping[str, Any]) -> dict[str, str]:
    """The columns of a comparison: the worst tenth only where it is more than one class."""
    few = len(document["data"]["classes"]) < MANY
    return {k: v for k, v in HEADINGS.items() if not (few and k == "robust_worst_tenth")}


def title(document: Mapping[str, Any]) -> str:
    data, settings = document["data"], document["settings"]
    return (
        f"{data['dataset']}, {data['images']:,} of {data['of']:,} {data['split']} images, epsilon "
        f"{budget(settings['epsilon'])}; robust: right clean and under "
        f"{', '.join(settings['attacks'])}"
    )


def explanation(document: Mapping[str, Any]) -> str:
    seeds = max(len(method["seeds"]) for method in document["methods"])
    spread = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    return f"Per cent; {spread}. rho: relative gains in worst class and average, summed."


def shown(value: float | None, name: str, sign: str = "") -> str:
    """A figure: in per cent, seconds as they are, rho as a ratio."""
    if value is None:
        return ABSENT
    text = (
        f"{value:{sign}z.3f}"
        if name == "rho"
        else f"{value if name == 'seconds' else 100 * value:{sign}z.1f}"
    )
    return text.replace("-", "\N{MINUS SIGN}")


def cell(method: Mapping[str, Any], name: str, pm: str = " ± ") -> str:
    """Mean and standard deviation of a figure of a method."""
    if name == "rho":
        if method["differences"] is None:
            return ABSENT
        each = method["differences"]["rho"]
    else:
        each = method["figures"][name]
    mean, std = each["mean"], each["std"]
    return shown(mean, name) + (f"{pm}{shown(std, name)}" if std is not None else "")


def rows(document: Mapping[str, Any], pm: str = " ± ") -> list[list[str]]:
    """A row for each method: its name, and a cell for each heading."""
    return [
        [method["name"], *(cell(method, name, pm) for name in headings(document))]
        for method in document["methods"]
    ]


def difference_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Method, figure, difference to the baseline, interval over seeds and over images, verdict."""
    found = []
    for method in document["methods"]:
        for name in COMPARED if method["differences"] else ():
            each = method["differences"][name]
            found.append(
                [
                    method["name"],
                    HEADINGS[name],
                    shown(each["mean"], name, "+"),
                    interval(each["over_seeds"], name),
                    interval(each["over_images"], name),
                    verdict(each, name),
                ]
            )
    return found


DIFFERENCES = ["method", "figure", "difference", "over seeds", "over images", "verdict"]
MEANING = (
    "Differences to {baseline}, seed by seed, in points (rho: as it is). 95 % intervals: over seeds "
    "Student's, for other seeds on these images; over images the paired bootstrap, for other images "
    "and these seeds. A verdict needs both to leave out zero."
)


def interval(ends: list[float | None], name: str) -> str:
    if ends[0] is None or ends[1] is None:
        return ABSENT
    return f"[{shown(ends[0], name, '+')}, {shown(ends[1], name, '+')}]"


def verdict(each: Mapping[str, Any], name: str) -> str:
    """What both intervals say together."""
    signs = set()
    for low, high in (each["over_seeds"], each["over_images"]):
        if low is None or high is None:
            return "unknown"
        signs.add((low > 0) - (high < 0))
    if signs == {1} or signs == {-1}:
        lower_is_better = name.removeprefix("robust_") in LOWER_IS_BETTER
        return "better" if (signs == {1}) != lower_is_better else "worse"
    return "no clear difference"


# --- Formats ---


def aligned(table: list[list[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Rows in columns, those of the numbers `left` to the left, the others to the right."""
    widths = [max(columns(row[k]) for row in table) for k in range(len(table[0]))]

    def fill(text: str, width: int, to_the_left: bool) -> str:
        space = " " * (width - columns(text))
        return text + space if to_the_left else space + text

    return [
        "  ".join(fill(text, widths[k], k in left) for k, text in enumerate(row)).rstrip()
        for row in table
    ]


def terminal(document: Mapping[str, Any]) -> list[str]:
    """The tables as lines; the columns of figures are narrow, so a method has one line."""
    short = {"clean average": "clean", "clean worst": "worst", "robust average": "robust"}
    heads = [short.get(text, text.removeprefix("robust ")) for text in headings(document).values()]
    lines = [*wrapped(title(document)), *wrapped(explanation(document)), ""]
    lines += aligned([["", *heads], *rows(document, "±")])
    if told := difference_rows(document):
        lines += ["", *wrapped(MEANING.format(baseline=document["baseline"])), ""]
        lines += aligned([DIFFERENCES, *told], left=(0, 1, 5))
    lines += ["", *(line for note in document["notes"] for line in wrapped(f"note: {note}"))]
    for method in document["methods"]:
        if method["warnings"]:
            lines += wrapped(f"WARN {method['name']}: {'; '.join(method['warnings'])}")
    return [plain(line) for line in lines]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(plain(text), 100)


def markdown(document: Mapping[str, Any]) -> str:
    def table(head: list[str], body: list[list[str]]) -> list[str]:
        safe = [[plain(text).replace("|", "\\|") for text in row] for row in (head, *body)]
        lines = [f"| {' | '.join(row)} |" for row in safe]
        return [lines[0], "|---" * len(head) + "|", *lines[1:], ""]

    lines = [f"{title(document)}. {explanation(document)}", ""]
    lines += table(["method", *headings(document).values()], rows(document))
    if told := difference_rows(document):
        lines += [MEANING.format(baseline=document["baseline"]), "", *table(DIFFERENCES, told)]
    per_run = [name for name in headings(document) if name != "rho"]
    lines += ["Every run:", ""]
    lines += table(
        ["method", "seed", *(HEADINGS[name] for name in per_run)],
        [
            [
                method["name"],
                str(seed),
                *(shown(method["figures"][name]["values"][k], name) for name in per_run),
            ]
            for method in document["methods"]
            for k, seed in enumerate(method["seeds"])
        ],
    )
    lines += [f"* {plain(note)}" for note in document["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def latex(document: Mapping[str, Any]) -> str:
    """A tabular for the package booktabs."""
    special = str.maketrans(
        {c: f"\\{c}" for c in "&%$#_{}"}
        | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    )

    def cells(row: list[str]) -> str:
        marks = {"±": r"$\pm$", "\N{MINUS SIGN}": "$-$", ABSENT: "--"}
        texts = [plain(text).translate(special) for text in row]
        for mark, command in marks.items():
            texts = [text.replace(mark, command) for text in texts]
        return " & ".join(texts) + r" \\"

    heads = ["method", *headings(document).values()]
    lines = [
        f"% {plain(title(document))}",
        f"% {explanation(document)}",
        r"\begin{tabular}{l" + "r" * (len(heads) - 1) + "}",
        r"\toprule",
        cells(heads),
        r"\midrule",
        *(cells(row) for row in rows(document)),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def csv_text(document: Mapping[str, Any]) -> str:
    """A row for each run, and for each method one of the means and one of the deviations."""
    names = list(document["methods"][0]["figures"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", *names])
    for method in document["methods"]:
        figures = [method["figures"][name] for name in names]
        for k, seed in enumerate(method["seeds"]):
            writer.writerow([method["name"], seed, *(each["values"][k] for each in figures)])
        for kind in ("mean", "std"):
            writer.writerow([method["name"], kind, *(each[kind] for each in figures)])
    return text.getvalue()
