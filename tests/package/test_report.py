"""The report card: well-formed, self-contained, complete, and honest about what went wrong."""

import copy
import json
import re
import struct
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch

from absld.errors import CheckpointError, UsageError
from absld.evaluation import results as documents
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.evaluate import Evaluation, paired
from absld.report import svg
from absld.report.html import STYLE, card, make
from absld.report.summary import budget, clip, columns, sampled, verdict

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
    said = [labels]
    for _ in range(1 + len(ATTACKS.split(","))):
        breaks = torch.rand(len(labels), generator=random) > 0.4 + 0.6 * strength[labels]
        other = (labels + 1 + torch.randint(count - 1, labels.shape, generator=random)) % count
        said.append(torch.where(breaks & (said[-1] == labels), other, said[-1]))
    names = ("clean", *ATTACKS.split(","))
    index = torch.arange(len(labels))
    return Evaluation(classes, 8 / 255, 0, False, names, index, labels, torch.stack(said[1:]))


def document(classes=DIGITS, **options):
    found = evaluation(tuple(classes), **options)
    images = len(found.labels)
    made = {
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
        },
        "settings": {
            "epsilon": 8 / 255,
            "restarts": 1,
            "each": False,
            "examples": None,
            "seed": 0,
            "precision": "fp32",
            "attacks": ATTACKS.split(","),
        },
        **documents.results(found, parse_attacks(ATTACKS, len(classes))),
        "checks": [
            {"name": "no input gradient is zero", "passed": True, "numbers": "0 of 100 images"},
            {"name": "repeated forwards agree", "passed": True, "numbers": "apart by 0.125"},
        ],
        "against": None,
    }
    return json.loads(documents.to_json(made))


def records(num_classes, epochs=4, keys=TEMPERATURES):
    return [
        {"epoch": epoch, "loss": 1.0, "is_best": epoch == 2}
        | {key: [1 + 0.01 * k * epoch for k in range(num_classes)] for key in keys}
        for epoch in range(1, epochs + 1)
    ]


class Page(HTMLParser):
    """What a browser would make of the page: elements, attributes, texts; tags must balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.tables = [], [], []
        self.text = ""
        self.feed(text)
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
        raise AssertionError(f"<{tag}/> does not close in HTML")

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


@pytest.fixture(
    params=[
        (document(), records(10)),
        (document(), []),
        (document(("cat", "dog")), records(2, 1)),
        (document(HOSTILE), records(7)),
        (document(DIGITS, empty=(3, 4)), records(10, 300)),
        (document([f"a class with a long name, number {k}" for k in range(100)]), records(100)),
        (document() | {"checks": None}, records(10, keys=("class_risk_adv",))),
    ],
    ids=["digits", "no records", "two", "hostile", "absent", "hundred", "unchecked"],
    scope="module",
)
def sample(request):
    return request.param


# --- The page as HTML ---


def test_the_page_is_well_formed_and_needs_nothing_else(sample):
    text = card(*sample)
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "href", "xlink:href", "action")
            assert "http" not in value or name == "xmlns"
    assert "url(" not in STYLE and "@import" not in STYLE
    pictures = re.findall("<svg .*?</svg>", text, re.S)
    assert pictures
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.attrib["role"] == "img" and root.attrib["aria-label"]
        assert root[0].tag.endswith("title") and root[1].tag.endswith("desc")
        assert "nan" not in picture and "None" not in picture


def test_the_page_reads_in_order(sample):
    page = Page(card(*sample))
    assert page.all("html") == [{"lang": "en"}]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert {cell.get("scope") for cell in page.all("th")} == {"row", "col"}


def test_a_report_of_a_hundred_classes_is_small():
    names = [f"class {k}" for k in range(100)]
    assert len(card(document(names), records(100, 300)).encode()) < 1_500_000


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_texts_have_contrast_in_light_and_dark(mode):
    light, dark = re.findall(r":root\{(.*?)\}", STYLE, re.S)
    declared = light + (";" + dark if mode == "dark" else "")
    colours = {}
    for name, value in re.findall(r"--([\w-]+):([^;]+)", declared):
        digits = value.strip().lstrip("#")
        if " " in digits:
            colours[name] = [int(part) / 255 for part in digits.split()]
        else:
            full = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
            colours[name] = [int(full[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    for ground in ("ground", "sheet"):
        for text in ("text", "quiet", "robust", "pass", "warn-text"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        for drawn in ("robust", "clean", "s0", "s1", "s2"):
            assert contrast(colours[drawn], colours[ground]) >= 3, (drawn, ground)
    assert contrast(colours["warn-text"], colours["warn-ground"]) >= 4.5
    for hue in ("rgb-right", "rgb-wrong"):  # the darkest cell of the map has half of the ink
        cell = [(a + b) / 2 for a, b in zip(colours[hue], colours["sheet"], strict=True)]
        assert contrast(colours["text"], cell) >= 4.5


# --- What it says ---


def shown(each, scale=100, digits=1):
    if each["value"] is None:
        return f"{DASH} "
    value, low, high = (f"{scale * each[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def test_all_numbers_of_the_document_are_there():
    found = document()
    page = Page(card(found, records(10)))
    classes, confusion, attacks, checks = page.tables[:3] + page.tables[-1:]
    parts = [*found["attacks"], found["robust"]]
    rows = {row[0].removesuffix(" (worst)"): row[1:] for row in classes[1:]}
    for k, name in enumerate(DIGITS):
        images = str(found["robust"]["classes"][k]["images"])
        assert rows[name] == [images, *(shown(part["classes"][k]) for part in parts)]
    assert [[int(cell) for cell in row[1:]] for row in confusion[1:]] == found["confusion"]
    assert [row[0] for row in attacks[1:]] == ["clean", *ATTACKS.split(","), "worst case"]
    for row, part in zip(attacks[1:], parts, strict=True):
        metrics = dict(part["metrics"])
        nsd = metrics.pop("normalized_std")
        assert row[1:] == [*map(shown, metrics.values()), shown(nsd, 1, 3)]
    assert [row[2] for row in checks[1:]] == [check["numbers"] for check in found["checks"]]
    environment = {k: v for k, v in found["environment"].items() if v is not None}
    for value in [*environment.values(), "ab" * 32, "cd" * 32, "24,346", "200 of 207", "8/255"]:
        assert str(value) in page.text
    for attack in found["attacks"][1:]:
        assert f"objective {attack['objective']}, steps {attack['steps']}" in page.text


def test_headlines():
    found = document(("cat", "dog"))
    page = Page(card(found, []))
    clean, robust = found["attacks"][0]["metrics"]["average"], found["robust"]["metrics"]
    values = [robust[name]["value"] for name in ("average", "worst", "worst_tenth", "gap")]
    for value in [clean["value"], *values]:
        assert f"{100 * value:.1f}\N{NBSP}%" in page.text
    assert "Wilson" in page.text and "bootstrap" in page.text


def test_the_worst_class_comes_first_and_is_marked_by_a_word(sample):
    found, _ = sample
    page = Page(card(*sample))
    values = [each["value"] for each in found["robust"]["classes"]]
    there = sorted(value for value in values if value is not None)
    column = [row[-1] for row in page.tables[0][1:]]
    assert column[: len(there)] == [
        shown(each)
        for each in sorted(
            (each for each in found["robust"]["classes"] if each["value"] is not None),
            key=lambda each: each["value"],
        )
    ]
    marked = [row[0] for row in page.tables[0][1:] if row[0].endswith(" (worst)")]
    assert len(marked) == there.count(there[0])
    assert page.text.count("worst 1") + page.text.count(f"worst {100 * there[0]:.1f}") > 0


def test_a_class_without_images_has_no_figures_and_is_last():
    page = Page(card(document(DIGITS, empty=(3,)), records(10)))
    last = page.tables[0][-1]
    assert last[:2] == ["3", "0"] and {cell.strip() for cell in last[2:]} == {DASH}
    assert "no images" in page.text


def test_hostile_names_are_text():
    found = document(HOSTILE)
    found["network"] |= {"target": "<b>\"'&", "architecture": "<i>", "notes": ["<u>"]}
    found["environment"]["command"] = "absld <evaluate>"
    found["checks"][0]["numbers"] = "<em>"
    found["against"] = None
    page = Page(card(found, records(7)))
    assert not {"b", "i", "u", "em", "evaluate", "script", "img"} & {
        t for t, _ in page.elements
    } - {"b"}
    for text in (
        "<b>\"'&",
        "<i> on digits",
        "Note: <u>.",
        "absld <evaluate>",
        "<em>",
        *HOSTILE[:6],
    ):
        assert text in page.text
    assert "a\ufffdb\ufffd&amp; " in page.text  # NUL and a change of direction are gone


@pytest.mark.parametrize("failed", [[], [1], [0, 1]])
def test_a_banner_warns_if_and_only_if_a_check_failed(failed):
    found = document()
    for k in failed:
        found["checks"][k]["passed"] = False
    page = Page(card(found, []))
    outcomes = [row[1] for row in page.tables[-1][1:]]
    assert outcomes == ["WARN" if k in failed else "PASS" for k in (0, 1)]
    banners = [each for each in page.all("p") if each.get("class") == "warn"]
    assert len(banners) == bool(failed)
    assert (f"{len(failed)} of 2 sanity checks did not pass" in page.text) == bool(failed)
    assert "No sanity checks were run" not in page.text


def test_no_checks_are_said_to_be_none():
    page = Page(card(document() | {"checks": None}, []))
    assert "No sanity checks were run" in page.text and "WARN" not in page.text


def test_no_attack_is_said_to_be_none():
    found = document()
    found["attacks"], found["settings"]["attacks"] = found["attacks"][:1], []
    page = Page(card(found, []))
    assert "none, so the robust figures are those of clean images" in page.text


@pytest.mark.parametrize(("each", "words"), [(False, "cumulative"), (True, "that attack alone")])
def test_the_rows_of_the_attacks_say_how_they_relate(each, words):
    found = document()
    found["settings"]["each"] = each
    assert words in Page(card(found, [])).text


def test_many_classes_have_a_list_of_confusions():
    found = document([f"c{k}" for k in range(30)])
    page = Page(card(found, []))
    rows = page.tables[1][1:]
    assert len(rows) == 20
    counts = [int(row[2]) for row in rows]
    flat = [n for i, row in enumerate(found["confusion"]) for j, n in enumerate(row) if i != j]
    assert counts == sorted(flat, reverse=True)[:20]
    for true, said, count, share in rows:
        assert found["confusion"][int(true[1:])][int(said[1:])] == int(count)
        assert float(share) == pytest.approx(100 * int(count) / 20, abs=0.05)


def test_trajectories():
    told = records(10, 40)
    told[5]["class_risk_nat"][3] = None  # a class without images in that epoch
    told[6]["class_risk_nat"][3] = float("nan")
    page = Page(card(document(), told))
    tables = page.tables[3:7]
    assert len(page.all("figure")) == 4
    for key, table in zip(TEMPERATURES, tables, strict=True):
        assert table[0][1] == "1" and table[0][-1] == "40"
        for row in table[1:]:
            assert row[-1] == f"{told[-1][key][int(row[0])]:.3g}"
    assert "The best epoch of the run is 2." in page.text
    broken = [each["d"] for each in page.all("path") if each["d"].count("M") == 2]
    assert len(broken) == 1


@pytest.mark.parametrize(
    "told",
    [[], [{"epoch": 1, "loss": 1.0, "is_best": True}], records(9)],
    ids=["none", "of another method", "of other classes"],
)
def test_no_trajectories_are_said_to_be_none(told):
    page = Page(card(document(), told))
    assert "There are no records of class temperatures" in page.text
    assert page.all("figure") == []


def test_some_trajectories():
    page = Page(card(document(), records(10, keys=("class_risk_adv",))))
    assert len(page.all("figure")) == 1 and "Class risk, adversarial images" in page.text


def with_baseline():
    ours, theirs = evaluation(DIGITS), evaluation(DIGITS, seed=1)
    found = document()
    network = found["network"] | {"target": "runs/<base>", "weights_sha256": "ef" * 32}
    differences = documents.differences(paired(ours, theirs))
    return json.loads(documents.to_json(found | {"against": {"network": network, **differences}}))


def test_differences_to_a_baseline():
    found = with_baseline()
    page = Page(card(found, []))
    rows = {row[0]: row[1:] for row in page.tables[3][1:]}
    each = found["against"]["robust"]["average"]
    expected = f"{100 * each['value']:+.1f} [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
    assert rows["average"][2].replace(MINUS, "-") == expected
    rho = f"{found['against']['rho']['value']:+.3f} ["
    assert rows["rho"][2].replace(MINUS, "-").startswith(rho)
    assert "runs/<base>" in page.text and "ef" * 32 in page.text
    assert "Against the baseline" not in Page(card(document(), [])).text


@pytest.mark.parametrize(
    ("low", "high", "name", "words"),
    [
        (0.1, 0.2, "average", "better"),
        (-0.2, -0.1, "average", "worse"),
        (0.1, 0.2, "gap", "worse"),
        (-0.2, -0.1, "normalized_std", "better"),
        (-0.1, 0.1, "gap", "no clear difference"),
        (0.0, 0.1, "worst", "no clear difference"),
        (None, 0.1, "rho", DASH),
    ],
)
def test_verdicts(low, high, name, words):
    assert verdict({"value": 0.0, "low": low, "high": high}, name) == words


# --- Small parts ---


@pytest.mark.parametrize(
    ("epsilon", "text"),
    [(8 / 255, "8/255 (0.03137)"), (0.1, "0.1"), (0.0, "0"), (0.5 / 255, "0.00196078")],
)
def test_budget(epsilon, text):
    assert budget(epsilon) == text


@pytest.mark.parametrize("text", ["class number 17", "猫科动物与狗的分类", "a" * 50, "", "é" * 30])
@pytest.mark.parametrize("width", [7, 11, 15])
def test_clip(text, width):
    clipped = clip(text, width)
    assert columns(clipped) <= width
    assert clipped == text or (clipped[0], clipped[-1]) == (text[0], text[-1])


@pytest.mark.parametrize(("count", "most"), [(1, 10), (2, 10), (11, 10), (300, 10), (300, 150)])
def test_sampled_epochs_have_the_first_and_the_last(count, most):
    kept = sampled(list(range(count)), most)
    assert kept[0] == 0 and kept[-1] == count - 1 and len(kept) <= most + 2
    assert kept == sorted(set(kept))


@pytest.mark.parametrize(
    ("low", "high"), [(0.5, 5.0), (0.0, 0.0), (1.0, 1.0), (0.93, 1.07), (1.0, 300.0), (0.0, 1e-9)]
)
def test_ticks_enclose_the_values(low, high):
    found = svg.ticks(low, high)
    assert found[0] <= low + 1e-9 and found[-1] >= high - 1e-9
    assert 2 <= len(found) <= 7 and found == sorted(set(found))


def test_labels_move_apart_and_stay_inside():
    moved = svg.apart([0.0, 1.0, 2.0, 99.0, 100.0], 14.0, 0.0, 100.0)
    assert all(after - before >= 14 - 1e-9 for before, after in pairwise(moved))
    assert moved[0] >= 0 and moved[-1] <= 100
    assert svg.apart([], 14.0, 0.0, 100.0) == []


def test_a_path_leaves_out_what_is_not_there():
    assert svg.path(
        [(0.0, 1.0), (1.5, 0.5), None, (3.0, 3.0)]
    ) == "M0 1l0 0 1.5-.5M3 3l0 0".replace("-.5", "-0.5")


# --- Files ---


@pytest.fixture
def run(tmp_path):
    """A run with two evaluations; `new` is the later one, and not the last by name."""
    folder = tmp_path / "run"
    for name, hour in (("new", 5), ("old", 4)):
        home = folder / "evaluations" / name
        home.mkdir(parents=True)
        made = document()
        made["environment"]["started"] = f"2026-01-02T0{hour}:00:00+00:00"
        (home / "evaluation.json").write_text(documents.to_json(made), encoding="utf-8")
    lines = (json.dumps(record) + "\n" for record in records(10))
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_sources(run):
    new, old = run / "evaluations/new", run / "evaluations/old"
    assert make(str(run)) == new / "report.html"
    assert make(str(old)) == old / "report.html"
    (old / "report.html").unlink()
    assert make(str(old / "evaluation.json")) == old / "report.html"
    text = (old / "report.html").read_text(encoding="utf-8")
    assert "2026-01-02T04" in text and text.count("<figure>") == 4
    assert {path.name for path in old.iterdir()} == {"evaluation.json", "report.html"}


def test_the_run_is_that_of_the_target_where_the_json_is_elsewhere(run, tmp_path):
    made = document()
    made["network"]["target"] = str(run)
    path = tmp_path / "other.json"
    path.write_text(documents.to_json(made))
    assert make(str(path)).read_text(encoding="utf-8").count("<figure>") == 4
    made["network"]["target"] = "package.module:factory"
    path.write_text(documents.to_json(made))
    assert "There are no records" in make(str(path)).read_text(encoding="utf-8")


def test_the_same_document_makes_the_same_page(run):
    assert make(str(run)).read_bytes() == make(str(run), str(run / "b/c.HTML")).read_bytes()


def test_what_is_no_evaluation(run, tmp_path):
    with pytest.raises(CheckpointError, match="no evaluation in it") as error:
        make(str(tmp_path))
    assert error.value.way_out == "absld evaluate RUN makes one"
    for source in (tmp_path / "missing", run / "metrics.jsonl"):
        with pytest.raises(CheckpointError):
            make(str(source))


@pytest.mark.parametrize("name", ["report.txt", "report", "report.html.zip"])
def test_other_suffixes_are_refused_before_anything_is_read(tmp_path, name):
    with pytest.raises(UsageError, match=r"\.html, \.png or \.pdf"):
        make("missing", str(tmp_path / name))


# --- The figure ---


def test_png_and_pdf(run, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before, pyplot = copy.deepcopy(dict(matplotlib.rcParams)), "matplotlib.pyplot" in sys.modules
    png = make(str(run), str(tmp_path / "a.png")).read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", png[16:24])
    assert width == 1654 and 1500 < height < 5000 and len(png) > 50_000
    pdf = make(str(run), str(tmp_path / "a.pdf")).read_bytes()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 10_000
    assert pdf == make(str(run), str(tmp_path / "b.pdf")).read_bytes()
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == pyplot


def test_a_figure_of_any_document(sample, tmp_path):
    """No warning, of missing letters or formulas, and no error."""
    pytest.importorskip("matplotlib")
    found, told = sample
    (tmp_path / "evaluations/e").mkdir(parents=True)
    (tmp_path / "evaluations/e/evaluation.json").write_text(json.dumps(found))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in told))
    assert make(str(tmp_path), str(tmp_path / "a.pdf")).stat().st_size > 10_000


def test_a_figure_with_a_baseline_and_a_warning(tmp_path):
    pytest.importorskip("matplotlib")
    found = with_baseline()
    found["checks"][0] |= {"passed": False, "numbers": "$" * 200}
    found["robust"]["classes"][0]["low"] = found["robust"]["classes"][0]["value"] + 1e-16
    (tmp_path / "against.json").write_text(json.dumps(found))
    make(str(tmp_path / "against.json"), str(tmp_path / "a.pdf"))


def test_without_matplotlib(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="png and pdf need matplotlib") as error:
        make(str(run), str(tmp_path / "a.png"))
    assert error.value.way_out == "pip install 'absld[plots]'"
    assert not (tmp_path / "a.png").exists()
    assert make(str(run)).exists()
