"""The report: well-formed, self-contained, complete, and honest about what went wrong."""

import copy
import functools
import json
import re
import struct
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import pytest
import torch
from markupsafe import Markup

from absld.cli.evaluation_view import metric
from absld.errors import CheckpointError, UsageError
from absld.evaluation import results as documents
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import Evaluation
from absld.report import figures, summary
from absld.report.html import render_page, write_report
from absld.report.picture import picture
from absld.report.summary import budget, radius, verdict
from absld.text import clip, columns

ATTACKS = "fgsm,pgd20,cw30"
DIGITS = tuple("0123456789")
HOSTILE = (
    "<script>alert(1)</script>",
    "猫科动物",
    "собака",
    "كلب",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{",
    "a\x00b\u202e&amp;\n",
)
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
TEMPERATURES = ("temperature_adv", "temperature_nat", "class_risk_adv", "class_risk_nat")


def evaluation(classes, per_class=20, seed=0, empty=()):
    """Predictions that get worse from attack to attack, without a network."""
    random = torch.Generator().manual_seed(seed)
    count = len(classes)
    labels = torch.tensor([k for k in range(count) if k not in empty]).repeat(per_class)
    strength = 0.5 + 0.5 * torch.rand(count, generator=random)
    predictions = [labels]
    for _ in range(1 + len(ATTACKS.split(","))):
        breaks = torch.rand(len(labels), generator=random) > 0.4 + 0.6 * strength[labels]
        other = (labels + 1 + torch.randint(count - 1, labels.shape, generator=random)) % count
        predictions.append(
            torch.where(breaks & (predictions[-1] == labels), other, predictions[-1])
        )
    names = ("clean", *ATTACKS.split(","))
    index = torch.arange(len(labels))
    return Evaluation(
        classes, 8 / 255, 0, False, names, index, labels, torch.stack(predictions[1:])
    )


def results_of(classes=DIGITS, **options):
    evaluated = evaluation(tuple(classes), **options)
    images = len(evaluated.labels)
    results = {
        "schema": documents.SCHEMA,
        "environment": {
            "command": "absld evaluate runs/x",
            "started": "2026-01-02T03:04:05+00:00",
            "absld": "0.2.0",
            "commit": "da3256593dc4+",
            "python": "3.11.7",
            "torch": "2.14.1",
            "cuda": None,
            "device": "cpu (x86_64)",
            "threads": 2,
        },
        "seconds": 3.25,
        "network": {
            "target": "runs/x",
            "architecture": "convnet",
            "parameters": 24346,
            "weights_sha256": "ab" * 32,
            "notes": [],
        },
        "data": {
            "dataset": "digits",
            "split": "test",
            "images": images,
            "of": images + 7,
            "images_sha256": "cd" * 32,
            "classes": list(classes),
            "notes": [],
        },
        "settings": {
            "norm": "linf",
            "epsilon": 8 / 255,
            "restarts": 1,
            "each": False,
            "examples": None,
            "seed": 0,
            "precision": "fp32",
            "attacks": ATTACKS.split(","),
        },
        **documents.evaluation_results(evaluated, parse_attacks(ATTACKS, len(classes))),
        "checks": [
            {"name": "no input gradient is zero", "passed": True, "numbers": "0 of 100 images"},
            {"name": "repeated forwards agree", "passed": True, "numbers": "apart by 0.125"},
        ],
        "against": None,
    }
    return json.loads(documents.to_json(results))


def records(num_classes, epochs=4, keys=TEMPERATURES):
    return [
        {"epoch": epoch, "loss": 1.0, "is_best": epoch == 2}
        | {key: [1 + 0.01 * k * epoch for k in range(num_classes)] for key in keys}
        for epoch in range(1, epochs + 1)
    ]


class Page(HTMLParser):
    """The page as a browser reads it: elements, attributes, tables, text; tags must balance."""

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.tables = [], [], []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.open, f"<{tag}/> does not close in HTML"
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or ("th" in self.open and "table" in self.open):
            self.tables[-1][-1][-1] += data

    def all(self, name):
        return [attributes for tag, attributes in self.elements if tag == name]


def page_of(results, training=()):
    return Page(render_page(results, training))


def noise(num_classes, epochs):
    """Records without straight lines, which would be drawn by their ends alone."""
    random = torch.Generator().manual_seed(0)
    return [
        {"epoch": epoch}
        | {key: torch.rand(num_classes, generator=random).tolist() for key in TEMPERATURES}
        for epoch in range(1, epochs + 1)
    ]


SAMPLES = {
    "digits": lambda: (results_of(), records(10)),
    "no records": lambda: (results_of(), []),
    "two": lambda: (results_of(("cat", "dog")), records(2, 1)),
    "hostile": lambda: (results_of(HOSTILE), records(7)),
    "absent": lambda: (results_of(DIGITS, empty=(3, 4)), records(10, 300)),
    "fifteen": lambda: (results_of([f"class {k}" for k in range(15)]), records(15)),
    "hundred": lambda: (results_of([f"long name {k}" for k in range(100)]), noise(100, 200)),
    "unchecked": lambda: (results_of() | {"checks": None}, records(10, keys=TEMPERATURES[2:3])),
}


@functools.cache
def page_of_sample(name):
    return render_page(*SAMPLES[name]())


@pytest.fixture(params=SAMPLES)
def sample(request):
    """Results, the records of a training, and the page made of them."""
    return *SAMPLES[request.param](), page_of_sample(request.param)


# --- The page as HTML ---


def test_the_page_is_well_formed_and_self_contained(sample):
    *_, html = sample
    for tag, attributes in Page(html).elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href", "action")
            assert name != "xlink:href" or value.startswith("#")
            assert "http" not in value or name.startswith("xmlns")
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style and html.count("<style") == 1


def test_figures_are_accessible_and_share_the_page(sample):
    """Each is labelled XML that scales; no id is there twice; none names a font or a date."""
    *_, html = sample
    drawn = re.findall("<svg .*?</svg>", html, re.S)
    assert drawn
    identifiers = []
    for text in drawn:
        root = ET.fromstring(text)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        assert root[0].tag.endswith("title") and root[1].tag.endswith("desc")
        assert "viewBox" in root.attrib and not {"width", "height"} & root.attrib.keys()
        assert "metadata" not in text and "nan" not in text
        identifiers += [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        for used in re.findall(r'(?:url\(|href=")#([\w-]+)', text):
            assert used in identifiers
    assert len(identifiers) == len(set(identifiers))


def test_figures_have_the_colours_of_the_page_in_light_and_dark(sample):
    *_, html = sample
    style, names = html[: html.index("</style>")], figures.COLOURS
    assert style.count("@media (prefers-color-scheme: dark)") == 1
    for text in re.findall("<svg .*?</svg>", html, re.S):
        tags = "".join(re.findall("<[^>]+>", text))
        assert not re.search(r"(?:fill|stroke): (?!none|var\()", tags)
        assert set(re.findall(r"var\(--([\w-]+)\)", tags)) <= names.keys()


def test_the_page_reads_in_order(sample):
    page = Page(sample[2])
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert {cell.get("scope") for cell in page.all("th")} == {"row", "col"}


def test_wide_tables_scroll_or_become_cards(sample):
    """On a telephone a row is a card, whose cells have labels of their own, or the table scrolls."""
    page = Page(sample[2])
    scrolling = [e for e in page.all("div") if e.get("class") == "scroll"]
    assert len(scrolling) == len(page.all("table"))
    assert all(e["tabindex"] == "0" and e["aria-label"] for e in scrolling)
    assert sum("cards" in table["class"] for table in page.all("table")) >= 2
    labels = {cell["data-label"] for cell in page.all("td") if "data-label" in cell}
    assert {*summary.METRICS.values(), "images", "clean", "robust"} <= labels


def test_a_report_of_a_hundred_classes_is_small():
    assert len(page_of_sample("hundred").encode()) < 1_500_000


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_texts_have_contrast_in_light_and_dark(mode):
    light, dark = re.findall(r":root \{(.*?)\}", figures.CSS, re.S)
    colours = {
        name: [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
        for name, digits in re.findall(
            r"--([\w-]+): #(\w{6});", light + (dark if mode == "dark" else "")
        )
    }
    for ground in ("ground", "sheet"):
        for text in ("text", "quiet", "robust", "green", "warn-text"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for drawn in ("robust", "clean", "red", "green"):
            assert contrast(colours[drawn], colours[ground]) >= 3, (drawn, ground)
    assert contrast(colours["warn-text"], colours["warn-ground"]) >= 4.5
    for hue in ("robust", "clean"):  # the darkest cell of the map has half of the ink
        cell = [(a + b) / 2 for a, b in zip(colours[hue], colours["sheet"], strict=True)]
        assert contrast(colours["text"], cell) >= 4.5


# --- The content ---


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the figures out of the page, which takes most of the time."""
    monkeypatch.setattr("absld.report.figures.to_svg", lambda *args: Markup("drawn"))


def cell(interval):
    if interval["value"] is None:
        return f"{DASH} "
    value, low, high = (f"{100 * interval[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_all_numbers_of_the_results_are_there(undrawn):
    results = results_of()
    page = page_of(results, records(10))
    classes, confusion, attacks, checks = page.tables[:3] + page.tables[-1:]
    parts = [*results["attacks"], results["robust"]]
    rows = {row[0].removesuffix(" (worst)"): row[1:] for row in classes[1:]}
    for k, name in enumerate(DIGITS):
        images = str(results["robust"]["classes"][k]["images"])
        assert rows[name] == [images, *(cell(part["classes"][k]) for part in parts)]
    assert [[int(text) for text in row[1:]] for row in confusion[1:]] == results["confusion"]
    assert [row[0] for row in attacks[1:]] == ["clean", *ATTACKS.split(","), "worst case"]
    for row, part in zip(attacks[1:], parts, strict=True):
        assert row[1:] == [*map(cell, part["metrics"].values())]
    assert [row[2] for row in checks[1:]] == [check["numbers"] for check in results["checks"]]
    environment = {k: v for k, v in results["environment"].items() if v is not None}
    for value in [*environment.values(), "ab" * 32, "cd" * 32, "24,346", "200 of 207", "8/255"]:
        assert str(value) in page.text
    for attack in results["attacks"][1:]:
        assert f"objective {attack['objective']}, steps {attack['steps']}" in page.text


def test_a_worst_class_that_is_all_wrong_has_its_own_interval_and_other_metrics_have_none():
    point = {"value": 0.0, "low": 0.0, "high": 0.0}
    classes = [{"value": 0.5, "low": 0.3, "high": 0.7}, {"value": 0.0, "low": 0.0, "high": 0.16}]
    part = {"classes": classes, "metrics": dict.fromkeys(summary.METRICS, point)}
    for name in ("worst", "worst_tenth"):
        assert summary.shown_interval(part, name) == classes[1]
        assert metric(part, name) == "  0.0 [  0.0,  16.0]"
    assert metric(part, "gap") == "  0.0 [    -,     -]"
    assert summary.estimate(summary.shown_interval(part, "gap")) == ("0.0", "")
    part["metrics"]["gap"] = {"value": 0.5, "low": 0.3, "high": 0.6}
    assert metric(part, "gap") == " 50.0 [ 30.0,  60.0]"


def test_headlines(undrawn):
    results = results_of(("cat", "dog"))
    text = page_of(results).text
    clean, robust = results["attacks"][0]["metrics"]["average"], results["robust"]["metrics"]
    values = [robust[name]["value"] for name in ("average", "worst", "worst_tenth", "gap")]
    for value in [clean["value"], *values]:
        assert f"{100 * value:.1f}\N{NBSP}%" in text
    assert "Wilson" in text and "bootstrap" in text


def test_the_worst_class_comes_first_and_is_marked_by_a_word(sample):
    results, _, html = sample
    page = Page(html)
    robust = [k for k in results["robust"]["classes"] if k["value"] is not None]
    robust.sort(key=lambda interval: interval["value"])
    rows = page.tables[0][1:]
    assert [row[-1] for row in rows[: len(robust)]] == [cell(interval) for interval in robust]
    marked = [row[0] for row in rows if row[0].endswith(" (worst)")]
    values = [interval["value"] for interval in robust]
    assert len(marked) == values.count(values[0])
    assert page.text.count(f"worst {100 * values[0]:.1f}") == len(marked), "in the figure"


def test_a_class_without_images_has_no_figures_and_is_last():
    page = Page(page_of_sample("absent"))
    last = page.tables[0][-1]
    assert last[:2] == ["4", "0"] and {text.strip() for text in last[2:]} == {DASH}
    assert "no images" in page.text


def test_hostile_names_are_text():
    results = results_of(HOSTILE)
    results["network"] |= {"target": "<i>\"'&", "architecture": "<i>", "notes": ["<u>"]}
    results["environment"]["command"] = "absld <evaluate>"
    results["checks"][0]["numbers"] = "<em>"
    page = page_of(results, records(7))
    assert not {"i", "u", "em", "evaluate", "script", "img"} & {tag for tag, _ in page.elements}
    for text in (
        "<i>\"'&",
        "<i> on digits",
        "Note: <u>.",
        "absld <evaluate>",
        "<em>",
        *HOSTILE[:6],
    ):
        assert text in page.text
    assert r"a\x00b\u202e&amp;\n" in page.text


def test_figures_show_hostile_names_escaped():
    charts = " ".join(
        re.findall(r"<svg.*?</svg>", render_page(results_of(HOSTILE), records(7)), re.S)
    )
    assert r"a\x00" in charts and "\u202e" not in charts and "\x00" not in charts


def test_class_names_do_not_change_the_colours():
    names = ("#c77700", "fill: #0b5cad")
    assert all(page_of(results_of(names), records(2)).text.count(name) > 5 for name in names)


@pytest.mark.parametrize("failed", [[], [1], [0, 1]])
def test_a_banner_warns_if_and_only_if_a_check_failed(failed, undrawn):
    results = results_of()
    for k in failed:
        results["checks"][k]["passed"] = False
    page = page_of(results)
    outcomes = [row[1] for row in page.tables[-1][1:]]
    assert outcomes == ["WARN" if k in failed else "PASS" for k in (0, 1)]
    assert sum(p.get("class") == "warn" for p in page.all("p")) == bool(failed)
    verb = {0: "-", 1: "warns", 2: "warn"}[len(failed)]
    warning = f"{len(failed)} of 2 sanity checks {verb}: robust accuracy may be overestimated"
    assert (warning in page.text) == bool(failed)
    assert "No sanity checks were run" not in page.text


def test_the_page_says_that_no_checks_were_run(undrawn):
    page = page_of(results_of() | {"checks": None})
    assert page.text.count("No sanity checks were run") == 2 and "WARN" not in page.text


def test_the_page_says_that_no_attack_was_run(undrawn):
    results = results_of()
    results["attacks"], results["settings"]["attacks"] = results["attacks"][:1], []
    assert "none, so the robust figures are those of clean images" in page_of(results).text


@pytest.mark.parametrize(("each", "words"), [(False, "cumulative"), (True, "that attack alone")])
def test_the_page_says_how_the_rows_of_the_attacks_relate(each, words, undrawn):
    results = results_of()
    results["settings"]["each"] = each
    assert words in page_of(results).text


def test_many_classes_have_a_list_of_confusions(undrawn):
    results = results_of([f"c{k}" for k in range(30)])
    rows = page_of(results).tables[1][1:]
    assert len(rows) == 20
    counts = [int(row[2]) for row in rows]
    confusion = results["confusion"]
    wrong = [n for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j]
    assert counts == sorted(wrong, reverse=True)[:20]
    for true, predicted, count, share in rows:
        assert confusion[int(true[1:])][int(predicted[1:])] == int(count)
        assert float(share) == pytest.approx(100 * int(count) / 20, abs=0.05)


def test_trajectories():
    training = records(10, 40)
    training[5]["class_risk_nat"][3] = None  # a class without images in that epoch
    training[6]["class_risk_nat"][3] = float("nan")
    html = render_page(results_of(), training)
    page = Page(html)
    for key, table in zip(TEMPERATURES, page.tables[3:7], strict=True):
        assert table[0][1] == "1" and table[0][-1] == "40"
        for row in table[1:]:
            assert row[-1] == f"{training[-1][key][int(row[0])]:.3g}"
    assert "The best epoch of the run is 2." in page.text
    broken = [path for path in page.all("path") if path["d"].count("M") == 2]
    assert len(broken) == 1


@pytest.mark.parametrize(
    "training",
    [[], [{"epoch": 1, "loss": 1.0, "is_best": True}], records(9)],
    ids=["none", "of another method", "of other classes"],
)
def test_the_page_says_that_there_are_no_trajectories(training, undrawn):
    text = page_of(results_of(), training).text
    assert summary.NO_TRAJECTORIES in text and "The numbers" in text
    assert "Temperature, adversarial images" not in text


def test_one_trajectory(undrawn):
    text = page_of(results_of(), records(10, keys=("class_risk_adv",))).text
    assert "Class risk, adversarial images" in text and "Class risk, clean" not in text


def with_baseline():
    ours, theirs = evaluation(DIGITS), evaluation(DIGITS, seed=1)
    results = results_of()
    network = results["network"] | {"target": "runs/<base>", "weights_sha256": "ef" * 32}
    differences = documents.difference_results(paired_differences(ours, theirs))
    against = {"network": network, **differences}
    return json.loads(documents.to_json(results | {"against": against}))


def test_differences_to_a_baseline(undrawn):
    results = with_baseline()
    page = page_of(results)
    rows = {row[0]: row[1:] for row in page.tables[3][1:]}
    robust = results["against"]["robust"]["average"]
    value, low, high = (f"{100 * robust[key]:+.1f}" for key in ("value", "low", "high"))
    assert rows["average"][2].replace(MINUS, "-") == f"{value} [{low}, {high}]"
    rho = f"{results['against']['rho']['value']:+.3f} ["
    assert rows["rho"][2].replace(MINUS, "-").startswith(rho)
    assert "runs/<base>" in page.text and "ef" * 32 in page.text
    assert "Against the baseline" not in page_of(results_of()).text


@pytest.mark.parametrize(
    ("low", "high", "name", "words"),
    [
        (0.1, 0.2, "average", "better"),
        (-0.2, -0.1, "average", "worse"),
        (0.1, 0.2, "gap", "worse"),
        (-0.2, -0.1, "normalized_std", "better"),
        (-0.1, 0.1, "gap", "no clear difference"),
        (0.0, 0.1, "worst", "no clear difference"),
        (None, 0.1, "rho", "unknown"),
    ],
)
def test_verdicts(low, high, name, words):
    assert verdict(name, (low, high)) == words


# --- Small parts ---


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(8 / 255, "8/255 (0.03137)"), (0.1, "0.1"), (0.0, "0"), (0.5 / 255, "0.00196078")],
)
def test_budget(epsilon, text):
    assert radius(epsilon) == text
    for norm, name in (("linf", "L-infinity"), ("l2", "L2")):
        assert budget({"norm": norm, "epsilon": epsilon}) == f"{text} in the {name} norm"


@pytest.mark.parametrize("text", ["class number 17", "猫科动物与狗的分类", "a" * 50, "", "é" * 30])
@pytest.mark.parametrize("width", [7, 11, 15])
def test_clip(text, width):
    clipped = clip(text, width)
    assert columns(clipped) <= width
    assert clipped == text or (clipped[0], clipped[-1]) == (text[0], text[-1])


@pytest.mark.parametrize(("count", "most"), [(1, 10), (2, 10), (11, 10), (300, 10), (300, 150)])
def test_thinned_trajectories_have_the_first_and_the_last_epoch(count, most):
    epochs = list(range(count))
    thinned = summary.Trajectory("", epochs, [[float(e) for e in epochs]], (0, 1), None).thinned(
        most
    )
    assert thinned.epochs[0] == 0 and thinned.epochs[-1] == count - 1
    assert thinned.lines == [thinned.epochs] and len(thinned.epochs) <= most + 2
    assert thinned.epochs == sorted(set(thinned.epochs))


def test_labels_move_apart_and_stay_inside():
    moved = figures.apart([0.0, 0.01, 0.02, 0.99, 1.0], 0.14)
    assert all(after - before >= 0.14 - 1e-9 for before, after in pairwise(moved))
    assert moved[0] >= 0 and moved[-1] <= 1
    assert figures.apart([], 0.14) == []


# --- Files ---


@pytest.fixture
def run(tmp_path):
    """A run with two evaluations; `new` is the later one, and not the last by name."""
    folder = tmp_path / "run"
    for name, hour in (("new", 5), ("old", 4)):
        home = folder / "evaluations" / name
        home.mkdir(parents=True)
        results = results_of(("cat", "dog"))
        results["environment"]["started"] = f"2026-01-02T0{hour}:00:00+00:00"
        (home / "evaluation.json").write_text(documents.to_json(results), encoding="utf-8")
    lines = (json.dumps(record) + "\n" for record in records(2))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_sources(run, undrawn):
    new, old = run / "evaluations/new", run / "evaluations/old"
    assert write_report(str(run)) == new / "report.html"
    assert write_report(str(old)) == old / "report.html"
    (old / "report.html").unlink()
    assert write_report(str(old / "evaluation.json")) == old / "report.html"
    text = (old / "report.html").read_text(encoding="utf-8")
    assert "2026-01-02T04" in text and text.count("<h3>") == 4
    assert {path.name for path in old.iterdir()} == {"evaluation.json", "report.html"}


def test_the_run_is_that_of_the_target_where_the_json_is_elsewhere(run, tmp_path, undrawn):
    results = results_of(("cat", "dog"))
    results["network"]["target"] = str(run)
    path = tmp_path / "other.json"
    path.write_text(documents.to_json(results))
    assert write_report(str(path)).read_text(encoding="utf-8").count("<h3>") == 4
    results["network"]["target"] = "package.module:factory"
    path.write_text(documents.to_json(results))
    assert summary.NO_TRAJECTORIES in write_report(str(path)).read_text(encoding="utf-8")


@pytest.mark.parametrize("target", ["n" * 5000, "a\0b", "\n"], ids=["long", "null", "line"])
def test_a_target_that_can_be_no_path_is_reported(target, tmp_path, undrawn):
    results = results_of(("cat", "dog"))
    results["network"]["target"] = target
    path = tmp_path / "other.json"
    path.write_text(documents.to_json(results))
    assert summary.NO_TRAJECTORIES in write_report(str(path)).read_text(encoding="utf-8")


def test_an_interval_without_ends_is_drawn():
    results = results_of()
    results["robust"]["classes"][0] |= {"low": None, "high": None}
    assert render_page(results, ())


@pytest.mark.parametrize("value", [[1.0], [], [None, None]], ids=str)
def test_records_of_other_lengths_are_not_drawn(value, run):
    lines = [record | dict.fromkeys(TEMPERATURES, value) for record in records(2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = write_report(str(run)).read_text(encoding="utf-8").count("<h3>")
    assert shown == (4 if len(value) == 2 else 0)


def test_the_same_results_make_the_same_page(run):
    one, other = write_report(str(run)), write_report(str(run), str(run / "b/c.HTML"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("counts", "shown"), [([120, 2], True), ([60, 60], False)])
def test_the_training_images_of_each_class_are_shown_where_they_differ(counts, shown, run, undrawn):
    session = {"inputs": {}, "class_counts": {"train": counts, "validation": [6, 1]}}
    (run / "environment.json").write_text(json.dumps([session]))
    page = Page(write_report(str(run)).read_text(encoding="utf-8"))
    head, *rows = page.tables[0]
    assert ("trained on" in head) == shown and {len(row) for row in rows} == {len(head)}
    if shown:
        place = head.index("trained on")
        assert {row[0].split()[0]: row[place] for row in rows} == {"cat": "120", "dog": "2"}


def test_sources_that_are_not_evaluations(run, tmp_path):
    with pytest.raises(CheckpointError, match="no evaluation in it") as error:
        write_report(str(tmp_path))
    assert error.value.hint == "absld evaluate RUN makes one"
    for source in (tmp_path / "missing", run / "metrics.jsonl"):
        with pytest.raises(CheckpointError):
            write_report(str(source))
    (run / "best.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="a file of weights, not an evaluation") as error:
        write_report(str(run / "best.pt"))
    assert f"absld evaluate {run / 'best.pt'}; or " in error.value.hint


@pytest.mark.parametrize("name", ["report.txt", "report", "report.html.zip"])
def test_other_suffixes_are_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.html, \.png or \.pdf"):
        write_report("missing", str(tmp_path / name))


# --- PNG and PDF ---


def test_png_and_pdf(run, tmp_path):
    before, pyplot = copy.deepcopy(dict(matplotlib.rcParams)), "matplotlib.pyplot" in sys.modules
    png = write_report(str(run), str(tmp_path / "a.png")).read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width == 1654 and 1500 < height < 5000 and len(png) > 50_000
    pdf = write_report(str(run), str(tmp_path / "a.pdf")).read_bytes()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 10_000
    assert pdf == write_report(str(run), str(tmp_path / "b.pdf")).read_bytes()
    write_report(str(run))
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


@pytest.mark.parametrize("name", ["hostile", "absent", "hundred", "unchecked", "no records"])
def test_any_results_can_be_drawn(name):
    """There is no warning, of missing letters or formulas, and no error."""
    assert len(picture(*SAMPLES[name](), "pdf")) > 10_000


def test_a_picture_with_a_baseline_and_a_warning():
    results = with_baseline()
    results["checks"][0] |= {"passed": False, "numbers": "$" * 200}
    results["robust"]["classes"][0]["low"] = results["robust"]["classes"][0]["value"] + 1e-16
    assert len(picture(results, [], "pdf")) > 10_000


def test_settings_of_the_user_do_not_matter():
    results = results_of(("cat", "dog"))
    expected = render_page(results, records(2))
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30, "text.usetex": True}):
        assert render_page(results, records(2)) == expected
