"""`absld compare`: figures against plain Python, tables read back, runs used again, refusals."""

import csv
import json
import math
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
from helpers.program import main, refused, use_few_digits

import absld
from absld.config.files import read_run_config, to_toml
from absld.config.resolve import resolve
from absld.errors import Interrupted, UsageError
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import Evaluation
from absld.evaluation.intervals import over_seeds
from absld.metrics import METRICS
from absld.report import comparison_tables
from absld.report.comparison_plot import plot, plot_classes
from absld.report.summary import ABSENT, verdict
from absld.runs import comparison
from absld.runs.comparison_results import FIGURES

SETTINGS = ["--epochs", "2", "--teacher-epochs", "1", "--max-steps", "2", "--allow-weak-teacher"]
SETTINGS += ["--device", "cpu", "--batch-size", "16", "--attacks", "fgsm,pgd2", "--no-checks"]
THREE = ["--methods", "rslad,absld-weights,sat", "--seeds", "2"]
T_975 = {1: 12.7062047, 2: 4.3026527, 4: 2.7764451}  # Student's t, from a printed table


pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison of three methods and two seeds."""
    folder = tmp_path_factory.mktemp("compared") / "all runs"
    with pytest.MonkeyPatch.context() as patch:
        use_few_digits(patch)
        assert main("compare", *THREE, *SETTINGS, "--out", folder) == 0
    return folder


def document_of(folder):
    (path,) = Path(folder).glob("comparison-*/comparison.json")
    return json.loads(path.read_text())


def runs_of(folder, kind):
    return sorted(str(path) for path in Path(folder).glob(f"digits-{kind}-seed*"))


def figures(results):
    """All of a document but when and where it was made."""
    return {k: v for k, v in results.items() if k != "environment"}


def evaluation_of(run):
    """Labels and rows of predictions of an evaluation file, as plain Python."""
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


def test_all_figures_follow_from_the_predictions(compared):
    """Counted again from the prediction for each image, without torch."""
    results = document_of(compared)
    assert results["schema"] == "absld-comparison-1" and results["baseline"] == "rslad"
    assert [m["name"] for m in results["methods"]] == ["rslad", "absld-weights", "sat"]
    by_run = {}
    for method in results["methods"]:
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
                    computed = method["figures"][f"{kind}_{name}"]["values"][k]
                    assert computed == pytest.approx(value, abs=1e-9), (run, kind, name)
            lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"] for line in lines]
            assert method["figures"]["seconds"]["values"][k] == pytest.approx(sum(seconds))
        for figure in method["figures"].values():
            assert figure["mean"] == pytest.approx(statistics.fmean(figure["values"]))
            assert figure["std"] == pytest.approx(statistics.stdev(figure["values"]))
    assert results["methods"][0]["differences"] is None
    for method in results["methods"][1:]:
        gains = []
        for seed in (0, 1):
            ours, base = by_run[method["name"], seed], by_run["rslad", seed]
            gains.append(gain(*map(statistics.fmean, (ours, base))) + gain(min(ours), min(base)))
        difference = method["differences"]
        assert difference["rho"]["values"] == pytest.approx(
            [gain if math.isfinite(gain) else None for gain in gains]
        )
        for name in FIGURES:
            pairs = zip(
                method["figures"][name]["values"],
                results["methods"][0]["figures"][name]["values"],
                strict=True,
            )
            values = [mine - base for mine, base in pairs]
            assert difference[name]["values"] == pytest.approx(values)
            mean, std = statistics.fmean(values), statistics.stdev(values)
            assert difference[name]["mean"] == pytest.approx(mean)
            half = T_975[1] * std / 2**0.5
            assert difference[name]["over_seeds"] == pytest.approx(
                [mean - half, mean + half], abs=1e-6
            )
            low, high = difference[name]["over_images"]
            assert (
                low <= difference[name]["mean"] + 1e-12 and difference[name]["mean"] <= high + 1e-12
            )


def test_all_runs_of_a_seed_share_images_and_teacher(compared):
    results = document_of(compared)
    assert (
        results["notes"][0] == "images of 10 classes, 8x8, RGB; 0.0 MiB in memory"
    )  # and their counts
    for seed in (0, 1):
        sessions = [
            json.loads((Path(method["runs"][seed]) / "environment.json").read_text())[-1]
            for method in results["methods"]
        ]
        assert len({str(session["inputs"]) for session in sessions}) == 1
        teachers = [session.get("teacher_sha256") for session in sessions]
        assert teachers[0] == teachers[1] is not None and teachers[2] is None
    assert len(runs_of(compared, "teacher")) == 2


def test_the_schedule_is_the_same_for_all_methods(compared):
    configs = [
        resolve(absld.config.files.read_recipe(f"{run}/config.toml"))
        for kind in ("rslad", "absld-weights", "sat")
        for run in runs_of(compared, kind)
    ]
    assert {(c.epochs, c.milestones, c.weight_decay, c.learning_rate) for c in configs} == {
        (2, (215 / 300, 260 / 300, 285 / 300), 2e-4, 0.1)
    }
    assert {c.start for c in configs if c.method == "sat"} == {"uniform"}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_over_seeds_is_students(count):
    values = [0.1 * k * k - 0.3 for k in range(count)]
    found = over_seeds(torch.tensor(values, dtype=torch.float64))
    half = T_975[count - 1] * statistics.stdev(values) / count**0.5
    assert found.value == pytest.approx(statistics.fmean(values))
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))


def test_one_seed_has_no_interval():
    found = over_seeds(torch.tensor([0.25], dtype=torch.float64))
    assert found.value == 0.25 and math.isnan(found.low) and math.isnan(found.high)


def drawn_evaluation(seed, n=60, classes=3):
    """An evaluation with random predictions."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    wrong = torch.rand(2, n, generator=random) < 0.4
    predictions = torch.where(wrong, (labels + 1) % classes, labels)
    predictions[1] = torch.where(predictions[0] == labels, predictions[1], predictions[0])
    names = tuple(map(str, range(classes)))
    return Evaluation(names, 0.1, 0, False, ("clean", "a"), torch.arange(n), labels, predictions)


def test_pairs_of_seeds_are_averaged():
    a, b, c, d = map(drawn_evaluation, range(4))
    both, first, second = (
        paired_differences([a, b], [c, d]),
        paired_differences(a, c),
        paired_differences(b, d),
    )
    for name in METRICS:
        mean = (first.robust[name].value + second.robust[name].value) / 2
        assert both.robust[name].value == pytest.approx(mean)
        mean = (first.clean[name].value + second.clean[name].value) / 2
        assert both.clean[name].value == pytest.approx(mean)
    assert both.rho.value == pytest.approx((first.rho.value + second.rho.value) / 2)
    # An image is resampled for all pairs together: the same pair twice is that pair once, and two
    # swapped pairs have no difference in any replicate.
    twice = paired_differences([a, a], [c, c])
    for name in METRICS:
        assert tuple(twice.robust[name]) == pytest.approx(tuple(first.robust[name]))
        assert tuple(paired_differences([a, c], [c, a]).robust[name]) == pytest.approx((0, 0, 0))


def test_more_seeds_make_narrower_intervals_of_the_average():
    """Over the images, for independent networks: four of them by about half."""
    ours, base = (
        [drawn_evaluation(k) for k in range(4)],
        [drawn_evaluation(k) for k in range(10, 14)],
    )
    widths = []
    for count in (1, 4):
        found = paired_differences(ours[:count], base[:count]).robust["average"]
        widths.append(found.high - found.low)
    assert 0.35 < widths[1] / widths[0] < 0.7


# --- Runs that are there ---


def test_finished_runs_are_used_again(compared, monkeypatch, capfd):
    before = document_of(compared)
    monkeypatch.setattr(
        "absld.runs.training_run.train", lambda *given, **settings: pytest.fail("trained")
    )
    assert main("compare", *THREE, *SETTINGS, "--out", compared) == 0
    assert capfd.readouterr().out.count("trained before") == 6
    assert figures(document_of(compared)) == figures(before)


def test_comparing_runs_gives_the_figures_of_comparing_methods(compared, capfd):
    runs = [run for kind in ("rslad", "absld-weights", "sat") for run in runs_of(compared, kind)]
    given = ["--attacks", "fgsm,pgd2", "--device", "cpu", "--out", "elsewhere", "--no-checks"]
    assert main("compare", *runs, *given, "--json") == 0
    printed = capfd.readouterr()
    results = json.loads(printed.out)
    # Only who reads the images knows how many there are of each class.
    assert figures(results) == figures(document_of(compared)) | {"notes": []}
    assert results == document_of("elsewhere") and "trained before" in printed.err
    assert main("compare", *reversed(runs), *given, "--baseline", "rslad", "--json") == 0
    again = json.loads(capfd.readouterr().out)
    by_name = {m["name"]: m["figures"]["robust_worst"]["mean"] for m in again["methods"]}
    assert by_name == {m["name"]: m["figures"]["robust_worst"]["mean"] for m in results["methods"]}
    assert again["baseline"] == "rslad" and again["methods"][-1]["differences"] is None


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_to_the_same_figures(compared, monkeypatch, capfd):
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
    assert main("compare", *THREE, *SETTINGS, "--out", "here") == 130
    text = capfd.readouterr().err
    stopped_in = r"Interrupted in epoch \d( of the teacher)?\."
    assert re.fullmatch(stopped_in + r" Continue with the same command\.\n", text)
    assert not list(Path("here").glob("comparison-*"))
    monkeypatch.setattr("absld.runs.training_run.train", train)
    assert main("compare", *THREE, *SETTINGS, "--out", "here") == 0

    def without_time_and_place(results):
        return [
            (m["name"], {k: v for k, v in m["figures"].items() if k != "seconds"}, m["differences"])
            for m in results["methods"]
        ]

    assert without_time_and_place(document_of("here")) == without_time_and_place(
        document_of(compared)
    )


@pytest.mark.slow
def test_a_signal_stops_a_real_process_which_then_resumes(tmp_path, single_thread):
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
    assert child.returncode == 130 and b"Continue with the same command." in errors, errors
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^2/2 absld, seed 0: clean ", done.stdout, re.MULTILINE)


# --- What is compared with what ---


@pytest.mark.slow
def test_a_recipe_file_is_a_method(tmp_path, capfd):
    Path("warm.toml").write_text('temperature_rate = 0.5\nfidelity = "released"\n')
    Path("mine.py").write_text("from absld.methods import Sat\nclass Own(Sat): pass\n")
    given = ["--methods", "absld,warm.toml,mine:Own", *SETTINGS]
    assert main("compare", *given) == 0
    results = document_of("runs")
    names = [m["name"] for m in results["methods"]]
    assert names == ["absld", "warm", "mine:Own"]
    assert results["notes"][0] == "warm: absld temperature_rate=0.5 fidelity=released"
    assert results["methods"][1]["figures"]["clean_average"]["std"] is None
    assert results["methods"][1]["differences"]["robust_worst"]["over_seeds"] == [None, None]
    assert len(runs_of("runs", "mine-Own")) == 1
    Path("long.toml").write_text("epochs = 9\nkl_scale = 0.1\n")
    assert main("compare", "--methods", "absld,long.toml", *SETTINGS, "--out", "other") == 0
    results = document_of("other")
    assert results["notes"][0] == (
        "long: absld kl_scale=0.1; epochs left out, all methods train alike"
    )
    assert [m["name"] for m in results["methods"]] == ["absld", "long"]
    capfd.readouterr()
    Path("grey.toml").write_text('student = "resnet18"\n')
    refused(capfd, 2, "grey.toml sets student, which is not a setting of a method", "as a flag",
            "compare", "--methods", "absld,grey.toml", *SETTINGS)  # fmt: skip


def trained(*flags):
    assert main("train", *SETTINGS[:-3], *flags) == 0


def test_differences_between_the_runs_are_noted(capfd):
    trained("--method", "rslad", "--seed", "1")
    trained("--epochs", "1", "--seed", "1", "--teacher-epochs", "2")
    trained("--method", "sat", "--seed", "2", "--select-on", "test")
    capfd.readouterr()
    runs = [run for kind in ("rslad", "absld", "sat") for run in runs_of("runs", kind)]
    assert (
        main("compare", *runs, "--attacks", "fgsm", "--no-checks", "--device", "cpu", "--json") == 0
    )
    results = json.loads(capfd.readouterr().out)
    notes = "\n".join(results["notes"])
    assert "epochs is not the same: 1 of absld; 2 of rslad, sat" in notes
    assert "teacher_epochs is not the same" in notes
    assert "seed 1: the teachers are not the same" in notes
    assert "the seeds are not the same" in notes
    assert "sat: warning: the best epoch is selected on the test images" in notes
    assert results["methods"][2]["differences"] is None  # no seed in common
    assert (
        "the seeds are not the same"
        in (next(Path("runs").glob("comparison-*")) / "table.md").read_text()
    )


def test_runs_that_cannot_be_compared_are_refused(compared, capfd):
    sat, rslad = runs_of(compared, "sat"), runs_of(compared, "rslad")
    trained("--method", "trades", "--epsilon", "0.05")
    Path("l2.toml").write_text('norm = "l2"\n')
    capfd.readouterr()
    (other,) = runs_of("runs", "trades")
    refused(capfd, 2, "epsilon 0.1 in the L-infinity norm and epsilon 0.05 in", "one norm and eps",
            "compare", rslad[0], other)  # fmt: skip
    refused(capfd, 2, "in the L-infinity norm and epsilon 0.1 in the L2 norm", "one norm",
            "compare", "--methods", "rslad,l2.toml", "--epsilon", "0.1")  # fmt: skip
    refused(capfd, 2, "compare needs at least two methods", "fair-rslad", "compare", *rslad)
    copy = shutil.copytree(sat[0], "a copy")
    refused(capfd, 2, "sat, seed 0, is given twice", "give it once",
            "compare", rslad[0], sat[0], copy)  # fmt: skip
    config = Path(copy) / "config.toml"
    config.write_text(to_toml(replace(read_run_config(config), dataset="cifar10")))
    refused(capfd, 2, "these runs are of cifar10 and digits", "the same images",
            "compare", rslad[0], copy)  # fmt: skip
    (Path(copy) / "STATUS").write_text("interrupted\n")
    refused(capfd, 4, "a copy: not a finished run", "--resume", "compare", rslad[0], copy)
    refused(capfd, 4, "nothing: not a finished run", "--resume", "compare", rslad[0], "nothing")


def test_a_run_that_fails_is_named(capfd):
    refused(capfd, 5, "sat, seed 0: epoch 1, step ", "lower learning_rate",
            "compare", "--methods", "sat,trades", *SETTINGS, "--learning-rate", "1e30")  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "cause", "hint"),
    [
        ([], "either --methods or finished runs", "--help"),
        (["--methods", "rslad,absld", "a run"], "either --methods or finished runs", "--help"),
        (["--methods", "rslad"], "compare needs at least two methods", "absld-margins"),
        (["--methods", "rslad,sat,rslad"], "rslad, seed 0, is given twice", "give it once"),
        (["--methods", "rslad,abslt"], "not 'abslt'", "did you mean 'absld'"),
        (["--methods", "rslad,absld", "--seeds", "few"], "not 'few'", "0,3,7"),
        (["--methods", "rslad,absld", "--seeds", "0"], "different numbers", "0,3,7"),
        (["--methods", "rslad,absld", "--seeds", "2,2"], "different numbers", "0,3,7"),
        (["--methods", "rslad,absld", "--baseline", "sat"], "no 'sat'", "rslad, absld"),
        (["--methods", "rslad,gone.toml"], "gone.toml", "name = value"),
        (["a run", "another", "--epochs", "3"], "epochs cannot be set", "omit it"),
        (["a run", "another", "--recipe", "my.toml"], "recipe cannot be set", "omit it"),
        (["a run", "another", "--seeds", "3"], "seeds cannot be set", "omit it"),
        (["--methods", "rslad,absld", "--attacks", "pgd"], "pgd", "pgd20"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_trained(flags, cause, hint, capfd, monkeypatch):
    monkeypatch.setattr(
        "absld.runs.training_run.train", lambda *given, **settings: pytest.fail("trained")
    )
    refused(capfd, 2, cause, hint, "compare", *flags)


def test_seeds_are_a_number_or_a_list():
    assert absld.cli.options.seed_list("") == [0] and absld.cli.options.seed_list("3") == [0, 1, 2]
    assert absld.cli.options.seed_list("4,") == [4] and absld.cli.options.seed_list("0,3,7") == [
        0,
        3,
        7,
    ]


def test_a_recipe_file_has_the_name_of_the_file_unless_another_has_it():
    names = ["absld", "mine/absld.toml", "warm.toml", "a.b.toml", "x/warm.toml", "mine:Own"]
    labels = ["absld", "mine/absld.toml", "warm.toml", "a.b", "x/warm.toml", "mine:Own"]
    assert comparison.label_methods(names) == labels


def test_a_recipe_file_that_repeats_a_method_is_refused():
    Path("again.toml").write_text('method = "rslad"\n')
    with pytest.raises(UsageError, match="rslad and again, seed 0, is given twice"):
        comparison.planned_runs(["rslad", "again.toml"], [0], {}, "", "same")


def test_labels_tell_settings_apart_but_not_seeds():
    configs = [
        resolve({"seed": seed} | given)
        for seed in (0, 1)
        for given in ({}, {"method": "rslad"}, {"kl_scale": 0.1}, {"method": "rslad", "flip": 1})
    ]
    once = ["absld", "rslad", "absld kl_scale=0.1", "rslad flip=1.0"]
    assert comparison.label_configs(configs) == once * 2
    assert comparison.label_configs([resolve({"out": "a"}), resolve({"out": "b"})]) == ["absld"] * 2


def test_sanity_checks_that_warn_are_printed(compared, capfd):
    """Those of `absld evaluate`, whose evaluation this is."""
    given = ["--attacks", "fgsm,pgd2", "--device", "cpu", "--out", "checked"]
    # Copies without the evaluations that other tests asked for.
    plain = shutil.ignore_patterns("evaluations")
    runs = [
        str(shutil.copytree(run, Path(run).name, ignore=plain))
        for run in runs_of(compared, "sat")[:1] + runs_of(compared, "rslad")[:1]
    ]
    assert main("compare", *runs, *given) == 0
    warned = re.findall(r"^WARN (\S+): (.+)$", capfd.readouterr().out, re.MULTILINE)
    results = document_of("checked")
    assert [name for name, _ in warned] == ["sat", "rslad"]
    for method, run in zip(results["methods"], runs, strict=True):
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
            "figures": {key: spread(0.5 + shift, 0.6 + shift) for key in FIGURES}
            | {"seconds": spread(3.0, 4.0)},
            "differences": None,
        }

    first, second = method("rslad", 0.0), method("a_b & 100% | #1", 0.1)
    difference = {
        "mean": 0.1,
        "std": 0.0707106781,
        "values": [0.05, 0.15],
        "over_seeds": [0.02, 0.2],
        "over_images": [0.01, 0.2],
    }
    second["differences"] = {key: dict(difference) for key in [*FIGURES, "rho"]}
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
        "settings": {"norm": "linf", "epsilon": 8 / 255, "attacks": ["fgsm", "pgd20"]},
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
def test_a_verdict_needs_both_intervals_to_exclude_zero(seeds, images, name, expected):
    assert verdict(name, seeds, images) == expected


def test_latex_escapes_special_characters():
    text = comparison_tables.latex(a_document())
    assert r"a\_b \& 100\% | \#1 & 65.0 $\pm$ 7.1 &" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(body) == 3 and all(len(re.findall(r"(?<!\\)&", line)) == 7 for line in body)
    assert text.count("tabular") == 2 and "±" not in "".join(body) and ABSENT not in "".join(body)


def test_a_label_from_outside_acts_in_no_table():
    """Labels hold settings, such as the student, of somebody else's config.toml."""
    results = a_document()
    label = "=1+1 \\| <img src=x> [a](b) `c` \x1b[0m\n\u202e"
    shown = r"=1+1 \| <img src=x> [a](b) `c` \x1b[0m\n\u202e"
    results["methods"][1]["name"] = results["baseline"] = label
    text = comparison_tables.markdown(results)
    head, *rows = [cells(line) for line in text.splitlines() if line.startswith("| ")][:3]
    name = r"=1+1 \\\| \<img src=x\> [a\](b) \`c\` \\x1b[0m\\n\\u202e"
    assert rows[-1][0] == name and {len(row) for row in rows} == {len(head)}
    assert f"Differences to {name.replace(chr(92) + '|', '|')}," in text
    row = next(csv.reader(line for line in comparison_tables.csv_text(results).splitlines()[5:]))
    assert row[0] == f"'{shown}"
    terminal = "\n".join(comparison_tables.terminal_lines(results))
    assert shown in terminal and "\x1b" not in terminal


@pytest.mark.parametrize("start", ["[1em]", "*"])
def test_a_label_is_no_argument_of_the_latex_line_before_it(start):
    results = a_document()
    results["methods"][1]["name"] = f"{start} x"
    assert f"{{{start[0]}}}{start[1:]} x &" in comparison_tables.latex(results)


def test_the_csv_table_reads_back(compared):
    (path,) = compared.glob("comparison-*/table.csv")
    rows = list(csv.DictReader(path.read_text().splitlines()))
    results = document_of(compared)
    assert [row["seed"] for row in rows] == ["0", "1", "mean", "std"] * 3
    for row in rows:
        method = next(m for m in results["methods"] if m["name"] == row["method"])
        for name, figure in method["figures"].items():
            expected = {"mean": figure["mean"], "std": figure["std"]} | dict(
                zip("01", figure["values"], strict=True)
            )
            assert float(row[name]) == expected[row["seed"]]


def test_terminal_lines_fit_110_columns(compared):
    lines = comparison_tables.terminal_lines(document_of(compared))
    assert max(map(len, lines)) <= 110
    assert any(line.startswith("absld-weights  robust worst") for line in lines)


def test_one_seed_and_missing_figures_are_shown_as_absent():
    results = a_document()
    for method in results["methods"]:
        method["seeds"] = [3]
        for figure in method["figures"].values():
            figure["values"], figure["std"] = figure["values"][:1], None
    differences = results["methods"][1]["differences"]
    for figure in differences.values():
        figure.update(values=[0.1], std=None, over_seeds=[None, None])
    differences["rho"].update(mean=None, values=[None], over_images=[None, None])
    text = comparison_tables.markdown(results)
    assert "one seed" in text and "±" not in text.replace("mean ±", "")
    row = next(cells(line) for line in text.splitlines() if "| rho |" in line and "#1" in line)
    assert row[2:] == [ABSENT, ABSENT, ABSENT, "unknown"]
    assert "\\pm" not in comparison_tables.latex(results)


def test_many_classes_have_a_worst_tenth():
    data = a_document()["data"] | {"classes": [str(k) for k in range(100)]}
    text = comparison_tables.markdown(a_document(data=data))
    assert "| robust worst 10 % |" in text


# --- The plot ---


def test_every_seed_is_a_point(compared, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **k: drawn.append((x, y)) or original(self, x, y, *a, **k),
    )
    results = document_of(compared)
    plot(results, Path("points.png"))
    assert Path("points.png").read_bytes().startswith(b"\x89PNG")
    assert len(drawn) == 2 * len(results["methods"])
    for k, method in enumerate(results["methods"]):
        (x, y), (mean_x, mean_y) = drawn[2 * k], drawn[2 * k + 1]
        assert x == [100 * v for v in method["figures"]["robust_average"]["values"]]
        assert y == [100 * v for v in method["figures"]["robust_worst"]["values"]]
        assert mean_x == [pytest.approx(100 * method["figures"]["robust_average"]["mean"])]
        assert mean_y == [pytest.approx(100 * method["figures"]["robust_worst"]["mean"])]


def test_classes_are_means_over_the_seeds(compared):
    for method in document_of(compared)["methods"]:
        runs = [
            json.loads(next(Path(run).glob("evaluations/*/evaluation.json")).read_text())
            for run in method["runs"]
        ]
        assert [row["class"] for row in method["classes"]] == list("0123456789")
        for k, row in enumerate(method["classes"]):
            values = [run["robust"]["classes"][k]["value"] for run in runs]
            if None in values:  # there are no images
                assert row["value"] is row["low"] is row["high"] is None
                continue
            assert row["value"] == pytest.approx(statistics.fmean(values))
            assert row["low"] <= row["value"] <= row["high"]
        assert bool(method["temperatures"]) == method["method"].startswith("absld")
    assert next(compared.glob("comparison-*/classes.png")).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("count", [2, 30])
def test_classes_are_drawn_in_the_order_of_the_baseline(count, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.errorbar
    monkeypatch.setattr(
        Axes,
        "errorbar",
        lambda self, x, y, *a, **k: drawn.append((x, y)) or original(self, x, y, *a, **k),
    )
    names = [f"$\\frac{{ \u732b <b>{k}" for k in range(count)]
    rows = [
        {"class": name, "value": 1 - k / 100, "low": 0.5, "high": None}
        for k, name in enumerate(names)
    ]
    rows[0] |= {"value": None, "low": None}
    results = a_document()
    results["data"]["classes"] = names
    for k, method in enumerate(results["methods"]):
        bounds = {"lower": 0.5, "upper": 5.0}
        adapted = {"adv": [1.5] * count, "nat": [0.5] * count, **bounds}
        method |= {"classes": rows, "temperatures": adapted if k else None}
    plot_classes(results, Path("classes.png"))
    (x, y), _ = drawn
    expected = sorted(100 * row["value"] for row in rows[1:])[:20]
    assert y == pytest.approx(expected) and x == sorted(x)
