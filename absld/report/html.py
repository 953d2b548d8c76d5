"""The report card of an evaluation: one HTML file that needs nothing else, or a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absld.errors import CheckpointError, UsageError
from absld.evaluation import results as documents
from absld.evaluation.results import warnings
from absld.report import figure as plots
from absld.report.summary import (
    INTERVALS,
    MANY,
    METRICS,
    NO_CHECKS,
    NO_TRAJECTORIES,
    STANDING_OUT,
    TERMS,
    Trajectory,
    attack_order,
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
    reproduction,
    sampled,
    settings,
    title,
    trajectories,
    verdict,
    worst,
)
from absld.report.svg import Bar, Markup, bars, join, lines, tag
from absld.storage.files import replacing
from absld.storage.run_directory import RunDirectory

FREQUENT = 20  # confusions that are listed where there are too many classes for a map
NARROW = 12  # more classes than these take the whole width
EPOCHS = 10  # in the table of a trajectory


# --- Files ---


def make(source: str, out: str | None = None) -> Path:
    """Write the report card of an evaluation, and say where.

    source: a run, whose newest evaluation it is; the directory of an evaluation; or its JSON.
    out: the file, .html, .png or .pdf; `report.html` beside the JSON without one. Raises
    CheckpointError for what is no evaluation, UsageError for another suffix and without
    matplotlib, which .png and .pdf need.
    """
    suffix = Path(out).suffix.lower() if out else ".html"
    if suffix not in (".html", ".png", ".pdf"):
        raise UsageError(f"{out}: a report is .html, .png or .pdf", "needed: --out report.html")
    path, document = found(Path(source))
    records = records_of(path, document)
    target = Path(out) if out else path.with_name("report.html")
    target.parent.mkdir(parents=True, exist_ok=True)
    if suffix == ".html":
        content = card(document, records).encode()
    else:
        content = plots.picture(document, records, suffix[1:])
    with replacing(target) as file:
        file.write(content)
    return target


def found(source: Path) -> tuple[Path, dict[str, Any]]:
    """The JSON that `source` means, and the document in it."""
    path = source / "evaluation.json" if source.is_dir() else source
    if path.exists() or not source.is_dir():
        return path, documents.read(path)
    candidates = [
        (path, documents.read(path))
        for path in sorted(source.glob("evaluations/*/evaluation.json"))
    ]
    if not candidates:
        raise CheckpointError(f"{source}: no evaluation in it", "absld evaluate RUN makes one")
    return max(candidates, key=lambda each: str(each[1]["environment"]["started"]))


def records_of(path: Path, document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of the training of the network; none where its run is not there."""
    homes = [*path.resolve().parents[2:3], Path(document["network"]["target"])]
    return next((found for home in homes if (found := RunDirectory(home).records())), [])


# --- The page ---


def card(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The report card as HTML. records: those of metrics.jsonl, if there are any."""
    heading = f"{title(document)}: robustness of every class"
    sections = [
        result(document),
        classes(document),
        confusion(document),
        attacks(document),
        against(document["against"]) if document["against"] else Markup(),
        training(document, records),
        sanity(document["checks"]),
        section("Settings", definitions(settings(document), "long")),
        section(
            "How to reproduce",
            tag("pre", tag("code", document["environment"]["command"])),
            definitions(reproduction(document), "long"),
        ),
    ]
    page = tag(
        "html",
        tag(
            "head",
            Markup('<meta charset="utf-8">'),
            Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            tag("title", heading),
            tag("style", Markup(STYLE)),
        ),
        tag(
            "body",
            tag("header", tag("h1", heading), definitions(facts(document)), banner(document)),
            tag("main", *sections),
            tag("footer", tag("p", f"Made by absld report from an {document['schema']} document.")),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def banner(document: Mapping[str, Any]) -> Markup:
    """What a reader must know before any figure."""
    notes = [tag("p", f"Note: {note}.", class_="note") for note in document["network"]["notes"]]
    if document["checks"] is None:
        notes.append(tag("p", NO_CHECKS, class_="note"))
    if failed := warnings(document):
        words = (
            f" {len(failed)} of {len(document['checks'])} sanity checks did not pass: "
            f"{'; '.join(failed)}. The network may be less robust than the figures say."
        )
        notes.append(tag("p", tag("strong", "WARN"), words, class_="warn"))
    return join(notes)


def result(document: Mapping[str, Any]) -> Markup:
    tiles = [
        tag(
            "li",
            tag("strong", each.value),
            tag("span", each.interval, class_="interval"),
            tag("span", each.label, class_="label"),
            tag("span", each.note, class_="note"),
        )
        for each in headlines(document)
    ]
    terms = tag("p", f"{TERMS} {INTERVALS}", class_="quiet")
    return section("Result", tag("ul", *tiles, class_="tiles"), terms, wide=True)


def classes(document: Mapping[str, Any]) -> Markup:
    clean, robust = document["attacks"][0]["classes"], document["robust"]["classes"]
    ranked, marked = order(document), worst(document)
    rows = [
        Bar(robust[k]["class"], "worst" if k in marked else "", clean[k], robust[k]) for k in ranked
    ]
    wide = len(rows) > NARROW
    column = (len(rows) + 1) // 2 if wide else len(rows)
    charts = []
    for start in range(0, len(rows), column):
        part = rows[start : start + column]
        which = f"classes {start + 1} to {start + len(part)} of {len(rows)}, the worst first"
        label = "Accuracy of each class, clean and robust"
        charts.append(bars(part, len(rows) > MANY, label, f"Bars with 95 % intervals; {which}."))
    legend = tag(
        "p",
        tag("span", class_="swatch clean"),
        " clean ",
        tag("span", class_="swatch robust"),
        " robust, under all attacks. Figures: robust, in %.",
        class_="legend",
    )
    head = ["class", "images", *(attack["name"] for attack in document["attacks"]), "robust"]
    parts = [*(attack["classes"] for attack in document["attacks"]), robust]
    body = [
        [
            name_of(robust[k]["class"], " (worst)" if k in marked else ""),
            str(robust[k]["images"]),
            *(interval(part[k]) for part in parts),
        ]
        for k in ranked
    ]
    caption = "Share of images that are right, in per cent, with 95 % intervals"
    return section(
        "Classes, the worst first",
        legend,
        tag("div", *charts, class_="charts"),
        details("The numbers, under each attack", table(caption, head, body)),
        wide=wide,
    )


def confusion(document: Mapping[str, Any]) -> Markup:
    counts, names = document["confusion"], document["data"]["classes"]
    heading = "Confusion under attack"
    rule = "Of a broken image, the first wrong class counts."
    if len(names) > MANY:
        rows = [
            [name_of(names[each.true]), name_of(names[each.said]), str(each.times), f"{share:.1f}"]
            for each in confusions(document, FREQUENT)
            for share in (100 * each.times / each.images,)
        ]
        head = ["true class", "taken for", "images", "% of the class"]
        caption = f"The {len(rows)} most frequent confusions. {rule}"
        return section(heading, table(caption, head, rows, "pairs"), wide=True)
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    most = max((s for i, row in enumerate(shares) for j, s in enumerate(row) if i != j), default=0)
    body = []
    for i, row in enumerate(counts):
        cells = [tag("th", short(names[i]), scope="row")]
        for j, count in enumerate(row):
            # Half of the ink at most: the text keeps its contrast, in light and in dark.
            ink = (shares[i][j] if i == j else shares[i][j] / (most or 1)) / 2
            kind = "none" if not count else "right" if i == j else "wrong"
            cells.append(tag("td", str(count), class_=kind, style=f"--ink:{ink:.2f}"))
        body.append(tag("tr", *cells))
    upright = "upright" if max(map(columns, names)) > 4 else None
    head = [tag("th", short(name), scope="col", class_=upright) for name in names]
    words = (
        f"Rows are true classes, columns what their images were taken for. {rule} Blue: right. "
        f"Orange: wrong, darkest at {100 * most:.0f} % of a class."
    )
    made = tag(
        "table",
        tag("caption", "Images by true class and by what was said"),
        tag("thead", tag("tr", tag("th", "true", scope="col"), *head)),
        tag("tbody", *body),
        class_="map",
    )
    return section(heading, tag("p", words), scroller(made, heading), wide=len(names) > NARROW)


def attacks(document: Mapping[str, Any]) -> Markup:
    parts = [(attack["name"], attack["metrics"]) for attack in document["attacks"]]
    parts.append(("worst case", document["robust"]["metrics"]))
    rows: list[list[str]] = [
        [name, *(interval(metrics[key], key) for key in METRICS)] for name, metrics in parts
    ]
    words = (
        f"{attack_order(document)} Figures are in per cent, with 95 % intervals; NSD is a ratio."
    )
    made = table("Metrics under each attack", ["attack", *METRICS.values()], rows)
    return section("Attacks", tag("p", words), made, wide=True)


def against(other: Mapping[str, Any]) -> Markup:
    def cells(each: Mapping[str, Any], name: str) -> list[str]:
        return [interval(each, name, "+"), verdict(each, name)]

    rows: list[list[str]] = [
        [label, *cells(other["clean"][name], name), *cells(other["robust"][name], name)]
        for name, label in METRICS.items()
    ]
    rows.append(["rho", "", "", *cells(other["rho"], "rho")])
    network = other["network"]
    baseline = {
        "Baseline": f"{network['target']} ({network['architecture']})",
        "weights sha256": network["weights_sha256"],
    }
    words = (
        "This network minus the baseline, on the same images. A difference is called better or "
        "worse if its interval leaves out zero. Figures are in points, with paired 95 % intervals; "
        "NSD and rho, the sum of the relative gains in worst class and average, are ratios."
    )
    made = table(
        "Differences to the baseline",
        ["metric", "clean", "which is", "robust", "which is"],
        rows,
    )
    about = definitions(baseline, "long")
    return section("Against the baseline", about, tag("p", words), made, wide=True)


def training(document: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Markup:
    names = document["data"]["classes"]
    shown = trajectories(records, len(names))
    heading = "Class temperatures and risks in training"
    if not shown:
        return section(heading, tag("p", NO_TRAJECTORIES), wide=True)
    first = order(document)[:STANDING_OUT]
    marked = best_epoch(records)
    figures = []
    for each in shown:
        description = (
            f"A line for each of {len(names)} classes over epochs {each.epochs[0]} to "
            f"{each.epochs[-1]}."
        )
        chart = lines(
            each.epochs,
            each.lines,
            names,
            first,
            limits(shown, each.key),
            marked,
            each.title,
            description,
        )
        numbers = details("The numbers", trajectory_table(each, names, order(document)))
        figures.append(tag("figure", tag("h3", each.title), chart, numbers))
    words = f"In colour: the {len(first)} classes of least robust accuracy."
    if shown[0].key.startswith("temperature"):
        words += " A class whose risk is above the mean gets colder from epoch to epoch."
    if marked:
        words += f" The best epoch of the run is {marked}."
    return section(heading, tag("p", words), tag("div", *figures, class_="charts"), wide=True)


def trajectory_table(each: Trajectory, names: Sequence[str], ranked: Sequence[int]) -> Markup:
    kept = sampled(each.epochs, EPOCHS)
    rows = [
        [
            name_of(names[k]),
            *(f"{v:.3g}" if (v := each.lines[k][at]) is not None else "" for at in kept),
        ]
        for k in ranked
    ]
    caption = f"{each.title}, at some of the epochs; metrics.jsonl has all of them"
    return table(caption, ["class", *(str(each.epochs[at]) for at in kept)], rows)


def sanity(checks: Sequence[Mapping[str, Any]] | None) -> Markup:
    heading = "Sanity checks"
    if checks is None:
        return section(heading, tag("p", NO_CHECKS), wide=True)
    rows: list[list[str]] = []
    for check in checks:
        word = "PASS" if check["passed"] else "WARN"
        rows.append([check["name"], tag("span", word, class_=word.lower()), check["numbers"]])
    made = table("Can the figures be trusted?", ["check", "outcome", "numbers"], rows, "texts")
    return section(heading, made, wide=True)


# --- Elements ---


def section(heading: str, *children: Markup, wide: bool = False) -> Markup:
    return tag("section", tag("h2", heading), *children, class_="wide" if wide else None)


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], class_: str | None = None
) -> Markup:
    """A table whose first column names the rows; too wide for the page, it scrolls."""
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    made = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head))),
        tag("tbody", *body),
        class_=class_,
    )
    return scroller(made, caption)


def scroller(wide: Markup, label: str) -> Markup:
    """A box in which what is too wide scrolls, by the keyboard, too."""
    return tag("div", wide, class_="scroll", role="region", aria_label=label, tabindex="0")


def details(summary: str, content: Markup) -> Markup:
    return tag("details", tag("summary", summary), content)


def definitions(shown: Mapping[str, str], class_: str | None = None) -> Markup:
    entries = [tag("div", tag("dt", name), tag("dd", value)) for name, value in shown.items()]
    return tag("dl", *entries, class_=class_)


def interval(each: Mapping[str, Any], name: str = "", sign: str = "") -> Markup:
    """A figure and its interval."""
    value = tag("b", number(each["value"], name, sign))
    return join([value, " ", tag("span", bracket(each, name, sign), class_="interval")])


def name_of(class_name: str, after: str = "") -> Markup:
    """A class name, which may run from right to left, on its own."""
    return join([tag("bdi", class_name), after])


def short(class_name: str) -> Markup:
    return tag("bdi", clip(class_name, 18), title=class_name)


# Contrast of texts is 4.5 or more, of bars and lines 3, on both grounds; blue and orange stay
# apart in any kind of colour blindness.
STYLE = """
:root{color-scheme:light dark;--ground:#f6f7f9;--sheet:#fff;--text:#1c2128;--quiet:#57606a;
--edge:#d5dae0;--grid:#e3e7ec;--robust:#0b5cad;--clean:#c77700;--rgb-right:11 92 173;
--rgb-wrong:220 120 0;--s0:#c43d00;--s1:#0b5cad;--s2:#007a5a;--rest:#a3abb5;
--warn-text:#7a2500;--warn-ground:#fff1e6;--warn-edge:#c43d00;--pass:#00684c}
@media (prefers-color-scheme:dark){:root{--ground:#0f1318;--sheet:#171c22;--text:#e8ecf1;
--quiet:#a5b0bc;--edge:#333c47;--grid:#29313a;--robust:#5ea9f0;--clean:#e0a03a;
--rgb-right:94 169 240;--rgb-wrong:224 140 40;--s0:#ff8a57;--s1:#6cb2ff;--s2:#3ecfa0;--rest:#66707c;
--warn-text:#ffc9a8;--warn-ground:#3a2013;--warn-edge:#ff8a57;--pass:#3ecfa0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px 16px 40px;max-width:1120px;background:var(--ground);
color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
h1{font-size:26px;line-height:1.2;margin:0 0 14px;letter-spacing:-.01em}
h2{font-size:18px;line-height:1.3;margin:0 0 10px}
h3{font-size:15px;margin:0 0 4px}
p{margin:0 0 12px}
dl{margin:0 0 14px;display:grid;gap:3px 28px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr))}
dl div{display:flex;gap:10px}
dt{color:var(--quiet);flex:0 0 64px}
.long{font-size:14px}
.long dt{flex-basis:112px}
dd{margin:0}
main{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr))}
section{background:var(--sheet);border:1px solid var(--edge);border-radius:10px;padding:16px 18px;
min-width:0}
.wide{grid-column:1/-1}
.quiet,footer,.legend,caption{color:var(--quiet);font-size:13px}
section>:last-child{margin-bottom:0}
.note,.warn{border:1px solid var(--edge);border-left:4px solid var(--quiet);border-radius:6px;
background:var(--sheet);padding:8px 12px}
.warn{color:var(--warn-text)}
p.warn{background:var(--warn-ground);border-color:var(--warn-edge)}
p.warn strong{margin-right:4px}
span.warn,span.pass{border:0;padding:0;background:none;font-weight:700;color:var(--pass)}
span.warn{color:var(--warn-text);text-decoration:underline}
.tiles{list-style:none;margin:0 0 12px;padding:0;display:grid;gap:10px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,150px),1fr))}
.tiles li{border:1px solid var(--edge);border-radius:8px;padding:10px 12px;display:flex;
flex-direction:column}
.tiles strong{font-size:26px;line-height:1.25;letter-spacing:-.01em}
.tiles span{font-size:13px}
.tiles .note{border:0;padding:0;background:none;color:var(--quiet)}
.label{font-weight:600}
.interval{color:var(--quiet);white-space:nowrap}
.charts{display:grid;gap:18px 28px;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
figure{margin:0;min-width:0}
svg{display:block;width:100%;max-width:560px;height:auto}
svg text{fill:var(--text);font-size:12px}
svg .tick{fill:var(--quiet);font-size:11px}
svg .strong{font-weight:700}
.grid{stroke:var(--grid)}
.rule{stroke:var(--quiet);stroke-dasharray:3 3}
rect.clean{fill:var(--clean)}
rect.robust{fill:var(--robust)}
.whisker{stroke:var(--text);stroke-width:1.2}
.series{fill:none;stroke-width:2.4;stroke-linejoin:round;stroke-linecap:round}
.rest{stroke:var(--rest);stroke-width:1.1}
.thin{stroke-width:.7}
.tie{stroke:var(--rest);stroke-width:.8}
.s0{stroke:var(--s0)}
.s1{stroke:var(--s1);stroke-dasharray:7 4}
.s2{stroke:var(--s2);stroke-dasharray:2 4}
.swatch{display:inline-block;width:12px;height:12px;border-radius:2px;vertical-align:-1px;
print-color-adjust:exact;-webkit-print-color-adjust:exact}
.swatch.clean{background:var(--clean)}
.swatch.robust{background:var(--robust);margin-left:10px}
.scroll{overflow-x:auto}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--robust);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:14px;overflow-wrap:break-word}
caption{text-align:left;padding:0 0 6px;white-space:normal;max-width:calc(100vw - 48px)}
th,td{padding:5px 8px;text-align:right;border-bottom:1px solid var(--grid);vertical-align:baseline;
white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
td:last-child,th:last-child{padding-right:0}
tbody th{font-weight:600;position:sticky;left:0;background:var(--sheet)}
thead th{color:var(--quiet);font-weight:600;font-size:13px;border-color:var(--edge)}
td b{font-weight:600}
.texts th,.texts td{text-align:left;white-space:normal}
.texts th{white-space:nowrap;min-width:92px}
.pairs td:nth-child(2),.pairs th:nth-child(2){text-align:left}
.map{border-collapse:separate;border-spacing:2px}
.map{font-size:13px}
.map th,.map td{border:0;padding:5px 4px}
.map thead th:not(:first-child){text-align:center}
.map .upright{writing-mode:vertical-rl;padding:6px 2px}
.map .upright bdi{transform:rotate(180deg);display:inline-block}
.map td{text-align:center;min-width:26px;border-radius:3px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.right{background:rgb(var(--rgb-right)/var(--ink));font-weight:600}
.wrong{background:rgb(var(--rgb-wrong)/var(--ink))}
.none{color:var(--quiet)}
details{margin-top:10px}
summary{cursor:pointer;color:var(--robust);font-size:14px;padding:4px 0}
pre{margin:0 0 12px;padding:10px 12px;background:var(--ground);border:1px solid var(--edge);
border-radius:6px;white-space:pre-wrap;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}
footer{margin-top:18px}
@media print{body{background:#fff;padding:0;max-width:none}section,figure,tr{break-inside:avoid}
.scroll{overflow:visible}}
@media (max-width:480px){tbody th bdi{display:inline-block;width:max-content;max-width:38vw;
white-space:normal}
.texts thead{display:none}.texts,.texts caption,.texts tbody,.texts tr,.texts th,.texts td{display:block;border:0;
padding:1px 0;position:static}.texts th{white-space:normal}.texts tr{border-bottom:1px solid
var(--grid);padding:7px 0}
body{padding:16px 10px 28px}section{padding:14px 12px}
h1{font-size:22px}.tiles strong{font-size:22px}
.tiles{grid-template-columns:repeat(2,1fr)}.tiles li{padding:8px 10px}}
"""
