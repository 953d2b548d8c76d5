"""The table of the paper: places, families, each attack alone, and the three formats read back."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from helpers.program import main, refused, use_few_digits

import absld
from absld.cli.printing import say
from absld.config.evaluation_settings import PAPER_ATTACKS
from absld.evaluation.evaluate import Evaluation
from absld.methods import METHODS, family_of
from absld.report import paper_table
from absld.runs.comparison_results import attack_results
from absld.runs.launching import to_flags
from absld.text import columns

FEW = ["--epochs", "1", "--max-steps", "2", "--device", "cpu", "--batch-size", "16", "--no-checks"]
LONG = "absld temperature_start=0.25 temperature_move=relative temperature_rate=0.15"
WIDE = "absld 名前の長い方法と呼ばれる方法の名前の長いもの 0.15"

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison of two methods, one of them from outside."""
    folder = tmp_path_factory.mktemp("compared")
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        code = "from absld.methods import Sat\nclass Own(Sat): pass\n"
        (folder / "outside.py").write_text(code)
        flags = ["--methods", "sat,outside:Own", *FEW]
        flags += ["--table", "paper", "--attacks", "pgd2,fgsm"]
        assert main("compare", *flags) == 0
    return folder


def document_of(folder):
    (path,) = Path(folder).glob("runs/comparison-*/comparison.json")
    return json.loads(path.read_text())


def a_document(averages, attacks=("clean", "fgsm", "pgd20", "pgd20-sat", "cw30", "autoattack")):
    """A comparison by hand of methods of these averages, fractions or pairs for two seeds."""

    def method(name, family, of_seeds):
        values = [of_seeds] if isinstance(of_seeds, float) else list(of_seeds)

        def figure(shift):
            shifted = [value + shift for value in values]
            std = statistics.stdev(shifted) if len(values) > 1 else None
            return {"mean": statistics.fmean(shifted), "std": std, "values": shifted}

        names = {"average": 0.0, "worst": -0.1, "worst_tenth": -0.05, "normalized_std": -0.2}
        figures = {key: figure(shift) for key, shift in names.items()}
        return {
            "name": name,
            "family": family,
            "seeds": list(range(len(values))),
            "warnings": ["a check"],
            "attacks": dict.fromkeys(attacks, figures),
        }

    return {
        "data": {"dataset": "digits", "split": "test", "images": 40, "of": 599, "classes": ["a"]},
        "settings": {"norm": "linf", "epsilon": 8 / 255, "restarts": 1},
        "notes": ["one | note"],
        "methods": [method(*each) for each in averages],
    }


THREE = [
    (LONG, "ABSLD", (0.6, 0.7)),
    ("a_b & 100% | #1", "others", (0.5, 0.5)),
    ("sat", "adversarial training", (0.45, 0.4)),
]


# --- Content ---


@pytest.mark.parametrize(
    ("values", "lower_is_better", "expected"),
    [
        ([0.3, 0.2, 0.1], False, [1, 2, 0]),
        ([0.3, 0.2, 0.1], True, [0, 2, 1]),
        ([0.3, 0.3, 0.2, 0.1], False, [1, 1, 0, 0]),
        ([0.3, 0.2, 0.2, 0.1], False, [1, 2, 2, 0]),
        ([0.3, 0.0, 0.0], False, [1, 0, 0]),
        ([0.3, 0.3], False, [0, 0]),
        ([0.3], False, [0]),
        ([None, 0.3, None, 0.1], True, [0, 0, 0, 1]),
        ([None, None], False, [0, 0]),
    ],
)
def test_the_best_and_second_best_are_marked_and_the_last_never(values, lower_is_better, expected):
    assert paper_table.places(values, lower_is_better=lower_is_better) == expected


def test_means_that_read_alike_are_marked_alike():
    results = a_document([("a", "ABSLD", 0.5004), ("b", "ABSLD", 0.4996), ("c", "ABSLD", 0.4)])
    column = paper_table.cells(results["methods"], "fgsm", "average")
    assert [(cell.mean, cell.place) for cell in column] == [("50.0", 1), ("50.0", 1), ("40.0", 0)]
    column = paper_table.cells(results["methods"], "fgsm", "normalized_std")
    assert [cell.place for cell in column] == [0, 0, 1], "a lower NSD is fairer"


def test_every_method_of_the_package_says_its_family():
    assert not [name for name in METHODS if family_of(name) == "others"]
    assert family_of("rslad") == family_of("ard") == "robust distillation"
    assert family_of("absld") == family_of("absld-margins") == "ABSLD"
    assert family_of("fair-rslad") == "fair training" and family_of("no.such:Method") == "others"


def test_each_attack_is_counted_alone_and_autoattack_as_one():
    """Of two images of each class: the first attack breaks the first image, the second the second,
    and two parts of AutoAttack one image of class 1 each."""
    labels = torch.tensor([0, 0, 1, 1])
    rows = [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    attacks = ("clean", "one", "two", "apgd-ce", "square")
    fixed = ("a", "b"), 0.1, 0, True, attacks, torch.arange(4), labels
    found = attack_results([Evaluation(*fixed, torch.tensor(rows))])
    means = {name: [found[name][k]["mean"] for k in ("average", "worst")] for name in found}
    assert means == {
        "clean": [1, 1],
        "one": [0.75, 0.5],
        "two": [0.75, 0.5],
        "autoattack": [0.5, 0],
    }
    assert found["one"]["normalized_std"]["mean"] == pytest.approx(0.25 / 0.75)
    together = Evaluation(*fixed[:3], False, *fixed[4:], torch.tensor(rows))
    assert attack_results([together]) is None


def test_a_network_that_is_always_wrong_has_no_nsd():
    rows = torch.tensor([[0, 1], [1, 0]])
    fixed = ("a", "b"), 0.1, 0, True, ("clean", "one"), torch.arange(2), torch.tensor([0, 1])
    figure = attack_results([Evaluation(*fixed, rows)])["one"]["normalized_std"]
    assert figure == {"mean": None, "std": None, "values": [None]}


def test_the_columns_are_the_accuracies_of_each_attack_in_the_files(compared):
    """Counted again from the predictions in the files: an attack does not follow the others."""
    results = document_of(compared)
    assert results["settings"]["each"] and results["settings"]["attacks"] == ["pgd2", "fgsm"]
    for method in results["methods"]:
        for run in method["runs"]:
            (path,) = (compared / run).glob("evaluations/*/predictions.pt")
            kept = torch.load(path, weights_only=True)
            labels, clean = kept["labels"].tolist(), kept["predictions"][0].tolist()
            for row, attack in zip(kept["predictions"].tolist(), kept["attacks"], strict=True):
                by_class = [
                    statistics.fmean(
                        said == label == unattacked
                        for said, label, unattacked in zip(row, labels, clean, strict=True)
                        if label == c
                    )
                    for c in sorted(set(labels))
                ]
                found = method["attacks"][attack]
                assert found["average"]["values"] == pytest.approx([statistics.fmean(by_class)])
                assert found["worst"]["values"] == pytest.approx([min(by_class)])
    families = {method["name"]: method["family"] for method in results["methods"]}
    assert families["outside:Own"] == "others" and families["sat"] == "adversarial training"


# --- Formats ---


def plain(lines):
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize("styled", [True, False])
def test_the_terminal_has_80_columns_whatever_the_labels_and_attacks(styled):
    three = [*THREE, (WIDE, "ABSLD", (0.6, 0.7))]
    lines = plain(paper_table.terminal_lines(a_document(three), styled=styled))
    assert max(map(columns, lines)) <= 80
    text = "\n".join(lines)
    assert text.count("PGD-20-sat") == 4, "in the caption, and once in the block of each figure"
    assert " ".join(LONG.split()) in " ".join(text.split()), "a label is wrapped, not shortened"
    assert "".join(WIDE.split()) in "".join(text.split())
    order = [lines.index(family) for family in ("Adversarial training", "ABSLD", "Others")]
    assert order == sorted(order)
    many = [f"pgd{k}" for k in range(1, 25)]
    lines = plain(paper_table.terminal_lines(a_document(THREE, many), styled=styled))
    assert max(map(columns, lines)) <= 80
    heads = [word for line in lines if line.startswith("NSD  ") for word in line.split()[1:]]
    assert heads == [f"PGD-{k}" for k in range(1, 25)], "columns go on in further blocks"


def test_a_terminal_shows_the_best_by_styles_and_a_file_by_signs():
    results = a_document(THREE, ["clean"])
    styled = paper_table.terminal_lines(results, styled=True)
    bold, underlined = (
        [text for line in styled for text, style in line if style == kind]
        for kind in ("bold", "underline")
    )
    assert bold == ["65.0", "55.0", "22.5"] and underlined == ["50.0", "40.0", "30.0"]
    lines = plain(paper_table.terminal_lines(results, styled=False))
    assert any(line.endswith("*65.0±7.1") for line in lines)
    assert any(line.endswith("_30.0±0.0") for line in lines)
    assert plain(styled)[-2:] == ["WARN a_b & 100% | #1: a check", "WARN sat: a check"]


def test_a_styled_text_from_outside_acts_on_no_terminal(capsys):
    say([("\x1b[0m x", "bold"), ("\u202ey", "")], sys.stdout)
    assert capsys.readouterr().out == "\x1b[1m\\x1b[0m x\x1b[0m\\u202ey\n"


def cells(line):
    return [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_table_reads_back():
    text = paper_table.markdown(a_document(THREE, ["clean", "pgd20"]))
    table = [cells(line) for line in text.splitlines() if line.startswith("|")]
    figures = ["avg.", "worst", "NSD"]
    assert table[0] == ["method", *(f"{a} {f}" for a in ("clean", "PGD-20") for f in figures)]
    assert [row[0] for row in table[2:]] == [
        "*Adversarial training*", "sat", "*ABSLD*", LONG, "*Others*", r"a_b & 100% \| #1",
    ]  # fmt: skip
    assert table[3][1:] == ["42.5 ± 3.5", "32.5 ± 3.5", "**22.5** ± 3.5"] * 2
    assert table[5][1:] == ["**65.0** ± 7.1", "**55.0** ± 7.1", "45.0 ± 7.1"] * 2
    marked = ["<ins>50.0</ins> ± 0.0", "<ins>40.0</ins> ± 0.0", "<ins>30.0</ins> ± 0.0"]
    assert table[7][1:] == marked * 2
    for stated in ("over 2 seeds", "40 of 599 test images", "8/255", "ddof 0", "best checkpoint",
                   "PGD-20: 20 steps of 0.0956 epsilon", "lower is better"):  # fmt: skip
        assert stated in text.splitlines()[0], stated
    assert "* one | note" in text


def test_many_classes_have_a_worst_tenth_and_one_seed_no_deviation():
    results = a_document([("a", "ABSLD", 0.5), ("b", "ABSLD", 0.4)], ["clean"])
    results["data"]["classes"] = [str(k) for k in range(100)]
    table = [cells(line) for line in paper_table.markdown(results).splitlines() if "|" in line]
    assert table[0] == ["method", "clean avg.", "clean worst", "clean worst 10 %", "clean NSD"]
    assert table[3] == ["a", "**50.0**", "**40.0**", "**45.0**", "30.0"]
    assert "one seed" in paper_table.markdown(results)
    titles = [
        line.split("  ")[0] for line in plain(paper_table.terminal_lines(results, styled=True))
    ]
    assert {"Average", "Worst class", "Worst 10 %", "NSD"} <= {*titles}


def test_the_latex_table_is_balanced_and_escaped():
    results = a_document([*THREE, ("[1em] *", "others", (0.3, 0.4))], ["clean", "fgsm", "cw30"])
    results["methods"][0]["attacks"]["clean"]["normalized_std"] |= {"mean": None, "std": None}
    text = paper_table.latex(results)
    unescaped = re.sub(r"\\[{}&%$#_\\]", "", "\n".join(text.splitlines()[3:]))
    depth = 0
    for letter in unescaped:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        assert depth >= 0
    assert depth == 0 and unescaped.isascii() and not set("#_%") & set(unescaped)
    begun, ended = (re.findall(rf"\\{kind}{{(.*?)}}", text) for kind in ("begin", "end"))
    assert begun == ["table*", "tabular"] and ended == begun[::-1]
    assert r"\begin{tabular}{lrrrrrrrrr}" in text
    lines = [line for line in text.splitlines() if line.endswith(r" \\")]
    for line in lines:
        spans = [int(n) - 1 for n in re.findall(r"\\multicolumn{(\d+)}", line)]
        assert len(re.findall(r"(?<!\\)&", line)) + sum(spans) == 9, line
    assert len(lines) == 2 + 3 + 4, "two of the head, a row for each family and method"
    assert r"a\_b \& 100\% | \#1 & \underline{50.0}\absldstd{0.0} &" in text
    assert f"{LONG.replace('_', chr(92) + '_')} & \\textbf{{65.0}}" in text
    assert (
        "--: of a network that is always wrong" in text
        and " & -- &" in text
        and "{[}1em] {*} &" in text
    )


# --- The command ---


def test_the_tables_are_files_and_are_printed(compared, capfd, monkeypatch):
    monkeypatch.chdir(compared)
    (folder,) = Path("runs").glob("comparison-*")
    results = document_of(".")
    assert (folder / "table-paper.md").read_text() == paper_table.markdown(results)
    assert (folder / "table-paper.tex").read_text() == paper_table.latex(results)
    assert "| robust worst |" in (folder / "table.md").read_text()
    runs = [run for method in results["methods"] for run in method["runs"]]
    flags = ["--attacks", "pgd2,fgsm", "--no-checks", "--device", "cpu"]
    assert main("compare", *runs, *flags, "--table", "paper") == 0
    printed = capfd.readouterr().out
    assert "\n".join(plain(paper_table.terminal_lines(results, styled=False))[:12]) in printed
    assert "\x1b" not in printed, "no terminal"
    assert main("compare", *runs, *flags, "--out", "elsewhere", "--json") == 0
    (other,) = Path("elsewhere").glob("comparison-*")
    assert not list(other.glob("table-paper.*"))
    assert json.loads(capfd.readouterr().out)["methods"][0]["attacks"] is None


def test_the_attacks_of_the_paper_are_the_default_and_reach_the_jobs(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "absld.runs.comparison.compare_methods",
        lambda *given: asked.append(given[3]) or (_ for _ in ()).throw(absld.UsageError("", "")),
    )
    main("compare", "--methods", "sat,trades", "--table", "paper")
    main("compare", "--methods", "sat,trades", "--table", "paper", "--attacks", "fgsm")
    main("compare", "--methods", "sat,trades")
    assert [(config.attacks, config.each) for config in asked] == [
        (PAPER_ATTACKS, True), ("fgsm", True), ("clean,fgsm,pgd20,cw30", False),
    ]  # fmt: skip
    assert "--each" in to_flags(asked[0]) and f"--attacks={PAPER_ATTACKS}" in to_flags(asked[0])


def test_an_unknown_table_is_refused(capfd):
    refused(capfd, 2, "table takes one of differences, paper, not 'papers'", "did you mean 'paper'",
            "compare", "--methods", "sat,trades", "--table", "papers")  # fmt: skip
