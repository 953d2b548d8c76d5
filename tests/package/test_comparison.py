"""absld compare: figures against plain Python, tables read back, runs used again, faults."""

import csv
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import few_digits, main, refused

import absld
from absld.config.files import of_run, to_toml
from absld.config.resolve import resolve
from absld.errors import Interrupted, UsageError
from absld.evaluation.evaluate import Evaluation, paired
from absld.evaluation.intervals import over_seeds
from absld.metrics import METRICS
from absld.report import comparison_tables
from absld.report.comparison_plot import plot
from absld.report.summary import ABSENT
from absld.runs import comparison

SETTINGS = ["--epochs", "2", "--teacher-epochs", "1", "--max-steps", "2", "--allow-weak-teacher"]
SETTINGS += ["--device", "cpu", "--batch-size", "16", "--attacks", "fgsm,pgd2", "--no-checks"]
THREE = ["--methods", "rslad,absld-weights,sat", "--seeds", "2"]
T_975 = {1: 12.7062047, 2: 4.3026527, 4: 2.7764451}  # Student's t, from a printed table


def load_few(dataset, folder, image_size):
    return few_digits()


@pytest.fixture(autouse=True)
def in_an_empty_folder_with_few_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("runs.training_run", "evaluation.runner", "runs.comparison"):
        monkeypatch.setattr(f"absld.{module}.load_data", load_few)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A comparison of three methods and two seeds: its folder of runs."""
    folder = tmp_path_factory.mktemp("compared") / "all runs"
    with pytest.MonkeyPatch.context() as patch:
        for module in ("runs.training_run", "evaluation.runner", "runs.comparison"):
            patch.setattr(f"absld.{module}.load_data", load_few)
        assert main("compare", *THREE, *SETTINGS, "--out", folder) == 0
    return folder


def document_of(folder):
    (path,) = Path(folder).glob("comparison-*/comparison.json")
    return json.loads(path.read_text())


def runs_of(folder, kind):
    return sorted(str(path) for path in Path(folder).glob(f"digits-{kind}-seed*"))


def figures(document):
    """All of a document but when it was made, and where."""
    return {k: v for k, v in document.items() if k != "environment"}


def evaluation_of(run):
    """What was said of the images, from the file, as plain Python: labels, and rows of classes."""
    (path,) = Path(run).glob("evaluations/*/predictions.pt")
    kept = torch.load(path, weights_only=True)
    return kept["labels"].tolist(), kept["predictions"].tolist()


def gain(mine, base):
    if mine == base:
        return 0.0
    return (mine - base) / base if base else math.inf


def accuracies(labels, rows):
    return [
        statistics.fmean(
            all(row[n] == k for row in rows) for n, label in enumerate(labels) if label == k
        )
        for k in sorted(set(labels))
    ]


# --- Figures ---


def test_figures_are_those_of_the_predictions(made):
    """Counted again from what was said of each image, without torch."""
    document = document_of(made)
    assert document["schema"] == "absld-comparison-1" and document["baseline"] == "rslad"
    assert [m["name"] for m in document["methods"]] == ["rslad", "absld-weights", "sat"]
    by_run = {}
    for method in document["methods"]:
        assert method["seeds"] == [0, 1]
        for k, run in enumerate(method["runs"]):
            labels, rows = evaluation_of(run)
            clean, robust = accuracies(labels, rows[:1]), accuracies(labels, rows)
            by_run[method["name"], k] = robust
            for kind, values in (("clean", clean), ("robust", robust)):
                for name, value in (
                    ("average", statistics.fmean(values)),
                    ("worst", min(values)),
                    ("gap", max(values) - min(values)),
                    ("normalized_std", statistics.pstdev(values) / (statistics.fmean(values) or 1)),
                ):
                    told = method["figures"][f"{kind}_{name}"]["values"][k]
                    assert told == pytest.approx(value, abs=1e-9), (run, kind, name)
            lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"] for line in lines]
            assert method["figures"]["seconds"]["values"][k] == pytest.approx(sum(seconds))
        for each in method["figures"].values():
            assert each["mean"] == pytest.approx(statistics.fmean(each["values"]))
            assert each["std"] == pytest.approx(statistics.stdev(each["values"]))
    assert document["methods"][0]["differences"] is None
    for method in document["methods"][1:]:
        gains = []
        for seed in (0, 1):
            ours, base = by_run[method["name"], seed], by_run["rslad", seed]
            gains.append(gain(*map(statistics.fmean, (ours, base))) + gain(min(ours), min(base)))
        told = method["differences"]
        assert told["rho"]["values"] == pytest.approx(
            [gain if math.isfinite(gain) else None for gain in gains]
        )
        for name in comparison.FIGURES:
            pairs = zip(
                method["figures"][name]["values"],
                document["methods"][0]["figures"][name]["values"],
                strict=True,
            )
            values = [mine - base for mine, base in pairs]
            assert told[name]["values"] == pytest.approx(values)
            mean, std = statistics.fmean(values), statistics.stdev(values)
            assert told[name]["mean"] == pytest.approx(mean)
            half = T_975[1] * std / 2**0.5
            assert told[name]["over_seeds"] == pytest.approx([mean - half, mean + half], abs=1e-6)
            low, high = told[name]["over_images"]
            assert low <= told[name]["mean"] + 1e-12 and told[name]["mean"] <= high + 1e-12


def test_all_runs_of_a_seed_share_images_and_teacher(made):
    document = document_of(made)
    assert document["notes"] == []
    for seed in (0, 1):
        sessions = [
            json.loads((Path(method["runs"][seed]) / "environment.json").read_text())[-1]
            for method in document["methods"]
        ]
        assert len({str(each["inputs"]) for each in sessions}) == 1
        teachers = [each.get("teacher_sha256") for each in sessions]
        assert teachers[0] == teachers[1] is not None and teachers[2] is None
    assert len(runs_of(made, "teacher")) == 2


def test_the_schedule_is_the_same_for_all_methods(made):
    configs = [
        resolve(absld.config.files.from_toml(f"{run}/config.toml"))
        for kind in ("rslad", "absld-weights", "sat")
        for run in runs_of(made, kind)
    ]
    assert {(c.epochs, c.milestones, c.weight_decay, c.learning_rate) for c in configs} == {
        (2, (215 / 300, 260 / 300, 285 / 300), 2e-4, 0.1)
    }
    assert {c.start for c in configs if c.method == "sat"} == {"uniform"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_over_seeds_is_student_s(count):
    values = [0.1 * k * k - 0.3 for k in range(count)]
    found = over_seeds(torch.tensor(values, dtype=torch.float64))
    half = T_975[count - 1] * statistics.stdev(values) / count**0.5
    assert found.value == pytest.approx(statistics.fmean(values))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_one_seed_says_nothing_of_others():
    found = over_seeds(torch.tensor([0.25], dtype=torch.float64))
    assert found.value == 0.25 and math.isnan(found.low) and math.isnan(found.high)


def said(seed, n=60, classes=3):
    """An evaluation whose predictions are drawn."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    wrong = torch.rand(2, n, generator=random) < 0.4
    predictions = torch.where(wrong, (labels + 1) % classes, labels)
    predictions[1] = torch.where(predictions[0] == labels, predictions[1], predictions[0])
    names = tuple(map(str, range(classes)))
    return Evaluation(names, 0.1, 0, False, ("clean", "a"), torch.arange(n), labels, predictions)


def test_pairs_of_seeds_are_averaged():
    a, b, c, d = map(said, range(4))
    both, first, second = paired([a, b], [c, d]), paired(a, c), paired(b, d)
    for name in METRICS:
        mean = (first.robust[name].value + second.robust[name].value) / 2
        assert both.robust[name].value == pytest.approx(mean)
        mean = (first.clean[name].value + second.clean[name].value) / 2
        assert both.clean[name].value == pytest.approx(mean)
    assert both.rho.value == pytest.approx((first.rho.value + second.rho.value) / 2)
    # An image counts for all: the same pair twice says what it says once, and swapped pairs that
    # nothing differs, in every replicate.
    twice = paired([a, a], [c, c])
    for name in METRICS:
        assert tuple(twice.robust[name]) == pytest.approx(tuple(first.robust[name]))
        assert tuple(paired([a, c], [c, a]).robust[name]) == pytest.approx((0, 0, 0))


def test_more_seeds_make_narrower_intervals_of_the_average():
    """Of independent networks, over the images; here by about the root of 4."""
    ours, base = [said(k) for k in range(4)], [said(k) for k in range(10, 14)]
    widths = []
    for count in (1, 4):
        found = paired(ours[:count], base[:count]).robust["average"]
        widths.append(found.high - found.low)
    assert 0.35 < widths[1] / widths[0] < 0.7


# --- Runs that are there ---


def test_runs_that_are_there_are_used_again(made, monkeypatch, capfd):
    before = document_of(made)
    monkeypatch.setattr(
        "absld.runs.training_run.train", lambda *given, **settings: pytest.fail("trained")
    )
    assert main("compare", *THREE, *SETTINGS, "--out", made) == 0
    assert capfd.readouterr().out.count("was there") == 6
    assert figures(document_of(made)) == figures(before)


def test_runs_by_name_say_what_methods_say(made, capfd):
    runs = [run for kind in ("rslad", "absld-weights", "sat") for run in runs_of(made, kind)]
    given = ["--attacks", "fgsm,pgd2", "--device", "cpu", "--out", "elsewhere", "--no-checks"]
    assert main("compare", *runs, *given, "--json") == 0
    printed = capfd.readouterr()
    document = json.loads(printed.out)
    assert figures(document) == figures(document_of(made))
    assert document == document_of("elsewhere") and "was there" in printed.err
    assert main("compare", *reversed(runs), *given, "--baseline", "rslad", "--json") == 0
    again = json.loads(capfd.readouterr().out)
    by_name = {m["name"]: m["figures"]["robust_worst"]["mean"] for m in again["methods"]}
    assert by_name == {m["name"]: m["figures"]["robust_worst"]["mean"] for m in document["methods"]}
    assert again["baseline"] == "rslad" and again["methods"][-1]["differences"] is None


def test_a_stopped_comparison_continues(made, monkeypatch, capfd):
    """Stopped in the middle of the second run, it ends in the figures of one never stopped."""
    train = absld.runs.training_run.train
    left = [5]

    def stopped(config, observer, **settings):
        step = observer.step

        def counted(report):
            left[0] -= 1
            if left[0] == 0:
                raise Interrupted(signal.SIGINT)
            step(report)

        observer.step = counted
        return train(config, observer, **settings)

    monkeypatch.setattr("absld.runs.training_run.train", stopped)
    refused(capfd, 130, "stopped by signal 2", "the same command goes on",
            "compare", *THREE, *SETTINGS, "--out", "here")  # fmt: skip
    assert not list(Path("here").glob("comparison-*"))
    monkeypatch.setattr("absld.runs.training_run.train", train)
    assert main("compare", *THREE, *SETTINGS, "--out", "here") == 0

    def without_time_and_place(document):
        return [
            (m["name"], {k: v for k, v in m["figures"].items() if k != "seconds"}, m["differences"])
            for m in document["methods"]
        ]

    assert without_time_and_place(document_of("here")) == without_time_and_place(document_of(made))


@pytest.mark.slow
def test_a_signal_stops_it_after_a_step(tmp_path, single_thread):
    """A real process, real digits: exit code 130, and the second call goes on to the end."""
    command = [
        sys.executable, "-m", "absld", "compare", "--methods", "rslad,absld", "--device", "cpu",
        "--epochs", "2", "--teacher-epochs", "4", "--allow-weak-teacher", "--attacks", "fgsm",
        "--no-checks",
    ]  # fmt: skip
    environment = single_thread | {"PYTHONPATH": str(Path(absld.__file__).parents[1])}
    child = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    started = time.monotonic()
    while not list(tmp_path.glob("runs/digits-teacher-*/metrics.jsonl")):
        assert child.poll() is None and time.monotonic() - started < 120
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 130 and b"the same command goes on from here" in errors, errors
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2/2 absld, seed 0: clean ", done.stdout, re.MULTILINE)


# --- What is compared with what ---


def test_a_recipe_file_is_a_method(tmp_path, capfd):
    Path("warm.toml").write_text('temperature_rate = 0.5\nfidelity = "released"\n')
    Path("mine.py").write_text("from absld.methods import Sat\nclass Own(Sat): pass\n")
    given = ["--methods", "absld,warm.toml,mine:Own", *SETTINGS]
    assert main("compare", *given) == 0
    document = document_of("runs")
    names = [m["name"] for m in document["methods"]]
    assert names == ["absld", "absld fidelity=released temperature_rate=0.5", "mine:Own"]
    assert document["methods"][1]["figures"]["clean_average"]["std"] is None
    assert document["methods"][1]["differences"]["robust_worst"]["over_seeds"] == [None, None]
    assert len(runs_of("runs", "mine-Own")) == 1
    Path("long.toml").write_text("epochs = 9\nkl_scale = 0.1\n")
    assert main("compare", "--methods", "absld,long.toml", *SETTINGS, "--out", "other") == 0
    document = document_of("other")
    assert document["notes"] == ["long.toml: epochs left out, all methods train alike"]
    assert [m["name"] for m in document["methods"]] == ["absld", "absld kl_scale=0.1"]
    capfd.readouterr()
    Path("grey.toml").write_text('student = "resnet18"\n')
    refused(capfd, 2, "grey.toml sets student, which is not a method's", "as a flag",
            "compare", "--methods", "absld,grey.toml", *SETTINGS)  # fmt: skip


def trained(*flags):
    assert main("train", *SETTINGS[:-3], *flags) == 0


def test_what_is_not_alike_is_said(capfd):
    trained("--method", "rslad", "--seed", "1")
    trained("--epochs", "1", "--seed", "1", "--teacher-epochs", "2")
    trained("--method", "sat", "--seed", "2", "--select-on", "test")
    capfd.readouterr()
    runs = [run for kind in ("rslad", "absld", "sat") for run in runs_of("runs", kind)]
    assert (
        main("compare", *runs, "--attacks", "fgsm", "--no-checks", "--device", "cpu", "--json") == 0
    )
    document = json.loads(capfd.readouterr().out)
    notes = "\n".join(document["notes"])
    assert "epochs is not the same: 2 of rslad, 1 of absld, 2 of sat" in notes
    assert "teacher_epochs is not the same" in notes
    assert "seed 1: the teachers are not the same" in notes
    assert "the seeds are not the same" in notes
    assert "sat: warning: the best epoch is chosen on the test images" in notes
    assert document["methods"][2]["differences"] is None  # no seed in common
    assert (
        "the seeds are not the same"
        in (next(Path("runs").glob("comparison-*")) / "table.md").read_text()
    )


def test_runs_that_cannot_be_compared(made, capfd):
    sat, rslad = runs_of(made, "sat"), runs_of(made, "rslad")
    trained("--method", "trades", "--epsilon", "0.05")
    capfd.readouterr()
    (other,) = runs_of("runs", "trades")
    refused(capfd, 2, "not evaluated alike: epsilon is 0.05", "same budget",
            "compare", rslad[0], other, "--device", "cpu", "--attacks", "fgsm")  # fmt: skip
    refused(capfd, 2, "one method is no comparison", "fair-rslad", "compare", *rslad)
    copy = shutil.copytree(sat[0], "a copy")
    refused(capfd, 2, "sat, seed 0, is there twice", "give it once",
            "compare", rslad[0], sat[0], copy)  # fmt: skip
    config = Path(copy) / "config.toml"
    config.write_text(to_toml(replace(of_run(config), dataset="cifar10")))
    refused(capfd, 2, "these runs are of cifar10 and digits", "the same images",
            "compare", rslad[0], copy)  # fmt: skip
    (Path(copy) / "STATUS").write_text("interrupted\n")
    refused(capfd, 4, "a copy: no finished run", "--resume", "compare", rslad[0], copy)
    refused(capfd, 4, "nothing: no finished run", "--resume", "compare", rslad[0], "nothing")


def test_a_run_that_fails_is_named(capfd):
    refused(capfd, 5, "sat, seed 0: epoch 1, step ", "lower learning_rate",
            "compare", "--methods", "sat,trades", *SETTINGS, "--learning-rate", "1e30")  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "cause", "way_out"),
    [
        ([], "what is to be compared?", "--methods"),
        (["--methods", "rslad,absld", "a run"], "what is to be compared?", "not both"),
        (["--methods", "rslad"], "one method is no comparison", "absld-margins"),
        (["--methods", "rslad,sat,rslad"], "rslad, seed 0, is there twice", "give it once"),
        (["--methods", "rslad,abslt"], "not 'abslt'", "did you mean 'absld'"),
        (["--methods", "rslad,absld", "--seeds", "few"], "not 'few'", "0,3,7"),
        (["--methods", "rslad,absld", "--seeds", "0"], "different numbers", "0,3,7"),
        (["--methods", "rslad,absld", "--seeds", "2,2"], "different numbers", "0,3,7"),
        (["--methods", "rslad,absld", "--baseline", "sat"], "no 'sat'", "rslad, absld"),
        (["--methods", "rslad,gone.toml"], "gone.toml", "name = value"),
        (["a run", "another", "--epochs", "3"], "epochs cannot be set", "leave it out"),
        (["a run", "another", "--recipe", "my.toml"], "recipe cannot be set", "leave it out"),
        (["a run", "another", "--seeds", "3"], "seeds cannot be set", "leave it out"),
        (["--methods", "rslad,absld", "--attacks", "pgd"], "pgd", "pgd20"),
    ],
)
def test_faults_before_anything_is_trained(flags, cause, way_out, capfd, monkeypatch):
    monkeypatch.setattr(
        "absld.runs.training_run.train", lambda *given, **settings: pytest.fail("trained")
    )
    refused(capfd, 2, cause, way_out, "compare", *flags)


def test_seeds():
    assert absld.cli.options.seed_list("") == [0] and absld.cli.options.seed_list("3") == [0, 1, 2]
    assert absld.cli.options.seed_list("4,") == [4] and absld.cli.options.seed_list("0,3,7") == [
        0,
        3,
        7,
    ]


def test_labels_tell_settings_apart_but_not_seeds():
    configs = [
        resolve({"seed": seed} | given)
        for seed in (0, 1)
        for given in ({}, {"method": "rslad"}, {"kl_scale": 0.1}, {"method": "rslad", "flip": 1})
    ]
    once = ["absld", "rslad", "absld kl_scale=0.1", "rslad flip=1.0"]
    assert comparison.labels_of(configs) == once * 2
    assert comparison.labels_of([resolve({"out": "a"}), resolve({"out": "b"})]) == ["absld"] * 2


def test_checks_that_warn_are_said(made, capfd):
    """Those of `absld evaluate`, whose evaluation this is."""
    given = ["--attacks", "fgsm,pgd2", "--device", "cpu", "--out", "checked"]
    # Copies without the evaluations that other tests asked for.
    plain = shutil.ignore_patterns("evaluations")
    runs = [
        str(shutil.copytree(run, Path(run).name, ignore=plain))
        for run in runs_of(made, "sat")[:1] + runs_of(made, "rslad")[:1]
    ]
    assert main("compare", *runs, *given) == 0
    warned = re.findall(r"^WARN (\S+): (.+)$", capfd.readouterr().out, re.MULTILINE)
    document = document_of("checked")
    assert [name for name, _ in warned] == ["sat", "rslad"]
    for method, run in zip(document["methods"], runs, strict=True):
        assert "a margin attack is among the attacks" in method["warnings"]
        (path,) = Path(run).glob("evaluations/*/evaluation.json")
        single = json.loads(path.read_text())
        assert method["warnings"] == sorted(c["name"] for c in single["checks"] if not c["passed"])
        value = single["robust"]["metrics"]["average"]["value"]
        assert method["figures"]["robust_average"]["values"] == [value]


# --- Tables ---


def a_document(**changes):
    """A comparison of two methods and two seeds, by hand."""

    def spread(*values):
        return {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            "values": list(values),
        }

    def method(name, shift):
        return {
            "name": name,
            "method": "absld",
            "seeds": [0, 1],
            "runs": ["a", "b"],
            "warnings": [],
            "figures": {key: spread(0.5 + shift, 0.6 + shift) for key in comparison.FIGURES}
            | {"seconds": spread(3.0, 4.0)},
            "differences": None,
        }

    first, second = method("rslad", 0.0), method("a_b & 100% | #1", 0.1)
    told = {
        "mean": 0.1,
        "std": 0.0707106781,
        "values": [0.05, 0.15],
        "over_seeds": [0.02, 0.2],
        "over_images": [0.01, 0.2],
    }
    second["differences"] = {key: dict(told) for key in [*comparison.FIGURES, "rho"]}
    return {
        "schema": "absld-comparison-1",
        "environment": {},
        "data": {
            "dataset": "digits",
            "split": "test",
            "images": 40,
            "of": 599,
            "classes": ["a", "b"],
        },
        "settings": {"epsilon": 8 / 255, "attacks": ["fgsm", "pgd20"]},
        "baseline": "rslad",
        "notes": ["one | note"],
        "methods": [first, second],
    } | changes


def cells(line):
    return [part.strip() for part in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_markdown_table_reads_back():
    lines = comparison_tables.markdown(a_document()).splitlines()
    table = [cells(line) for line in lines if line.startswith("|")]
    assert table[0] == [
        "method", "clean average", "clean worst", "robust average", "robust worst", "robust NSD",
        "rho", "seconds",
    ]  # fmt: skip
    assert table[2] == ["rslad", *["55.0 ± 7.1"] * 5, ABSENT, "3.5 ± 0.7"]
    assert table[3] == ["a_b & 100% \\| #1", *["65.0 ± 7.1"] * 5, "0.100 ± 0.071", "3.5 ± 0.7"]
    robust = next(row for row in table if row[:2] == [table[3][0], "robust worst"])
    assert robust[2:] == ["+10.0", "[+2.0, +20.0]", "[+1.0, +20.0]", "better"]
    nsd = next(row for row in table if row[:2] == [table[3][0], "robust NSD"])
    assert nsd[5] == "worse", "a higher NSD is less fair"
    assert ["rslad", "0", *["50.0"] * 5, "3.0"] in table and "* one | note" in lines
    assert "mean ± standard deviation over 2 seeds" in lines[0] and "8/255" in lines[0]


@pytest.mark.parametrize(
    ("seeds", "images", "name", "expected"),
    [
        ([0.1, 0.2], [0.1, 0.2], "robust_worst", "better"),
        ([-0.2, -0.1], [-0.2, -0.1], "robust_worst", "worse"),
        ([-0.2, -0.1], [-0.2, -0.1], "robust_normalized_std", "better"),
        ([0.1, 0.2], [-0.1, 0.2], "robust_worst", "no clear difference"),
        ([-0.1, 0.2], [0.1, 0.2], "clean_average", "no clear difference"),
        ([0.1, 0.2], [-0.2, -0.1], "clean_average", "no clear difference"),
        ([0.0, 0.0], [0.0, 0.0], "rho", "no clear difference"),
        ([None, None], [0.1, 0.2], "rho", "unknown"),
    ],
)
def test_a_verdict_needs_both_intervals(seeds, images, name, expected):
    each = {"over_seeds": seeds, "over_images": images}
    assert comparison_tables.verdict(each, name) == expected


def test_latex_escapes_what_it_must():
    text = comparison_tables.latex(a_document())
    assert r"a\_b \& 100\% | \#1 & 65.0 $\pm$ 7.1 &" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3 and all(len(re.findall(r"(?<!\\)&", line)) == 7 for line in body)
    assert text.count("tabular") == 2 and "±" not in "".join(body) and ABSENT not in "".join(body)


def test_csv_reads_back(made):
    (path,) = made.glob("comparison-*/table.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    document = document_of(made)
    assert [row["seed"] for row in rows] == ["0", "1", "mean", "std"] * 3
    for row in rows:
        method = next(m for m in document["methods"] if m["name"] == row["method"])
        for name, each in method["figures"].items():
            told = {"mean": each["mean"], "std": each["std"]} | dict(
                zip("01", each["values"], strict=True)
            )
            assert float(row[name]) == told[row["seed"]]


def test_terminal_lines_fit(made):
    lines = comparison_tables.terminal(document_of(made))
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("absld-weights  robust worst") for line in lines)


def test_one_seed_and_figures_that_are_not_there():
    document = a_document()
    for method in document["methods"]:
        method["seeds"] = [3]
        for each in method["figures"].values():
            each["values"], each["std"] = each["values"][:1], None
    told = document["methods"][1]["differences"]
    for each in told.values():
        each.update(values=[0.1], std=None, over_seeds=[None, None])
    told["rho"].update(mean=None, values=[None], over_images=[None, None])
    text = comparison_tables.markdown(document)
    assert "one seed" in text and "±" not in text.replace("mean ±", "")
    row = next(cells(line) for line in text.splitlines() if "| rho |" in line and "#1" in line)
    assert row[2:] == [ABSENT, ABSENT, ABSENT, "unknown"]
    assert "\\pm" not in comparison_tables.latex(document)


def test_many_classes_have_their_worst_tenth():
    data = a_document()["data"] | {"classes": [str(k) for k in range(100)]}
    text = comparison_tables.markdown(a_document(data=data))
    assert "| robust worst 10 % |" in text


# --- The plot ---


def test_every_seed_is_a_point(made, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **k: drawn.append((x, y)) or original(self, x, y, *a, **k),
    )
    document = document_of(made)
    plot(document, Path("points.png"))
    assert Path("points.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 2 * len(document["methods"])
    for k, method in enumerate(document["methods"]):
        (x, y), (mean_x, mean_y) = drawn[2 * k], drawn[2 * k + 1]
        assert x == [100 * v for v in method["figures"]["robust_average"]["values"]]
        assert y == [100 * v for v in method["figures"]["robust_worst"]["values"]]
        assert mean_x == [pytest.approx(100 * method["figures"]["robust_average"]["mean"])]
        assert mean_y == [pytest.approx(100 * method["figures"]["robust_worst"]["mean"])]


def test_without_matplotlib_there_is_no_picture_and_all_else(made, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    runs = [run for kind in ("rslad", "sat") for run in runs_of(made, kind)]
    given = ["--attacks", "fgsm,pgd2", "--device", "cpu", "--out", "plain", "--no-checks"]
    assert main("compare", *runs, *given) == 0
    (folder,) = Path("plain").glob("comparison-*")
    assert sorted(os.listdir(folder)) == ["comparison.json", "table.csv", "table.md", "table.tex"]
    with pytest.raises(UsageError, match="points") as caught:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        plot(document_of("plain"), Path("points.png"))
    assert "absld[plots]" in caught.value.way_out
