"""absld evaluate: targets, results, the schema of the JSON, faults and exit codes, interruption."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import jsonschema
import pytest
import torch
from helpers.image_files import make_folder
from helpers.program import main, refused

import absld
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import to_toml
from absld.config.resolve import resolve
from absld.data.sources import load_data
from absld.errors import CheckpointError, Stopped, UsageError
from absld.evaluation import resuming, runner, targets
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import evaluate
from absld.evaluation.results import difference_results, read_results
from absld.models.architectures import build_model
from absld.progress import Observer
from absld.storage.checkpoint import load, save
from absld.storage.run_directory import RunDirectory

SCHEMA = json.loads(
    Path(absld.__file__).parent.joinpath("evaluation", "evaluation.schema.json").read_text()
)
FAST = ["--attacks", "fgsm,pgd2,cw2", "--device", "cpu"]

# Networks as other people have them, on top of one with weights.
NETS = """
    import os
    import torch
    from torch import nn
    import absld

    def is_clean(x):
        return ((x * 255).round() - x * 255).abs().max() < 1e-3

    class Wrapped(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.net = absld.load_network(os.environ["STUDENT"], 10, ("nets",)).model
            self.change = forward
        def forward(self, x):
            return self.change(self.net, x)

    def honest(): return Wrapped(lambda net, x: net(x))
    def killed(): return Wrapped(lambda net, x: net(x.detach()))
    def quantised(): return Wrapped(lambda net, x: net((x * 8).round() / 8))
    def random_input(): return Wrapped(lambda net, x: net(x + 0.2 * torch.randn_like(x)))
    def softmax(): return Wrapped(lambda net, x: net(x).softmax(1))
    def normalised(): return Wrapped(lambda net, x: net(x * 0.3 + 0.3))
    def a_tuple(): return Wrapped(lambda net, x: (net(x), x))
    def nan(): return Wrapped(lambda net, x: net(x) * torch.nan)
    def nan_under_attack(): return Wrapped(lambda net, x: net(x) / is_clean(x))
    def narrow(): return Wrapped(lambda net, x: net(x)[:, :9])
    def raising(): return Wrapped(lambda net, x: x.view(7, 7))
    def views(): return Wrapped(lambda net, x: net(x.view(x.size(0), -1).view(x.shape)))
    def in_place(): return Wrapped(lambda net, x: net(x.mul_(0.5)))
    def whole_numbers(): return Wrapped(lambda net, x: net(x).round().long())
    def printing(): return Wrapped(lambda net, x: print("here I am") or net(x))
    def leaving(): raise SystemExit(3)
    def leaves(): return Wrapped(lambda net, x: exit(0))
    def leaves_under_attack(): return Wrapped(lambda net, x: net(x) if is_clean(x) else exit(0))
    def strict(): return Wrapped(lambda net, x: net(x) if 0 <= x.min() and x.max() <= 1 else 1 / 0)
    def named(*, num_classes): return honest()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, trades_run):
    """The runs of a student and its teacher on the digits, little trained."""
    folder = tmp_path_factory.mktemp("trained")
    teacher = shutil.copytree(trades_run, folder / trades_run.name)
    flags = ["--epochs", "8", "--teacher", teacher, "--device", "cpu"]
    assert main("train", *flags, "--out", folder) == 0
    return {"absld": str(next(folder.glob("digits-absld-*"))), "teacher": str(teacher)}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, runs):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("STUDENT", runs["absld"])
    Path("nets.py").write_text(textwrap.dedent(NETS))
    yield
    sys.modules.pop("nets", None)


def evaluated(capfd, *flags):
    """The results that --json prints, which fit the schema."""
    assert main("evaluate", *flags, "--json") == 0, capfd.readouterr().err
    made = json.loads(capfd.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(made)
    return made


def figures(made):
    """All results but when and how fast they were computed."""
    return {k: v for k, v in made.items() if k not in ("environment", "seconds")}


class Quiet(Observer):
    """An observer that ends the evaluation as a signal does, after so many batches."""

    def __init__(self, batches=None):
        self.left = batches

    def attack_batch(self, progress):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Stopped(130)


# --- The result ---


def test_a_run_is_evaluated_on_its_own_images_and_budget(runs, capfd):
    made = evaluated(capfd, runs["absld"], *FAST, "--out", "here")
    data = load_data("digits", "").test
    model = absld.load_network(runs["absld"], 10, ("mine",)).model
    own = evaluate(model, data, epsilon=0.1, attacks="fgsm,pgd2,cw2")
    assert made["settings"]["epsilon"] == 0.1 and made["data"]["dataset"] == "digits"
    assert made["data"]["classes"] == list(data.classes)
    for shown, accuracy in (
        (made["attacks"][0], own.clean_accuracy),
        (made["robust"], own.robust_accuracy),
    ):
        assert [c["value"] for c in shown["classes"]] == pytest.approx(accuracy.tolist())
        fair = absld.fairness(accuracy)
        assert shown["metrics"]["average"]["value"] == pytest.approx(fair.average)
        assert shown["metrics"]["worst"]["value"] == pytest.approx(fair.worst)
        assert shown["metrics"]["normalized_std"]["value"] == pytest.approx(fair.normalized_std)
    assert made["confusion"] == own.confusion().tolist()
    assert [attack["name"] for attack in made["attacks"]] == ["clean", "fgsm", "pgd2", "cw2"]
    assert made["attacks"][2]["step_size"] == 0.003 * 255 / 8
    assert len(made["checks"]) == 11 and made["against"] is None
    (path,) = Path("here").glob("*/evaluation.json")
    assert json.loads(path.read_text()) == made
    kept = load(path.with_name("predictions.pt"))
    assert torch.equal(kept["predictions"], own.predictions)
    assert torch.equal(kept["labels"], data.labels)


def test_a_norm_brings_its_budget(runs, capfd):
    """That of the data set where it is not the run's norm."""
    made = evaluated(capfd, runs["absld"], *FAST, "--norm", "l2", "--no-checks")
    assert (made["settings"]["norm"], made["settings"]["epsilon"]) == ("l2", 0.5)
    model, data = (
        absld.load_network(runs["absld"], 10, ("mine",)).model,
        load_data("digits", "").test,
    )
    own = evaluate(model, data, epsilon=0.5, norm="l2", attacks="fgsm,pgd2,cw2")
    assert made["confusion"] == own.confusion().tolist()
    assert made["attacks"][2]["step_size"] == 15 / 128
    given = EvaluationConfig(norm="l2", epsilon=2.0)
    assert targets.complete_config(given, runs["absld"]).epsilon == 2.0
    for wrong, bound in (("14", "[0, 13.8564]"), ("-1", "0 or more")):
        flags = [runs["absld"], *FAST, "--norm", "l2", "--eps", wrong]
        refused(
            capfd,
            2,
            f"epsilon must be {'in ' if bound[0] == '[' else ''}{bound}, not",
            "",
            "evaluate",
            *flags,
        )


def test_a_run_is_evaluated_in_its_own_norm(runs, tmp_path):
    shutil.copytree(runs["absld"], tmp_path / "run")
    config = resolve({"norm": "l2", "epsilon": 0.7})
    (tmp_path / "run" / "config.toml").write_text(to_toml(config))
    target = str(tmp_path / "run")

    def completed(**settings):
        own = targets.complete_config(EvaluationConfig(**settings), target)
        return own.norm, own.epsilon

    assert completed() == ("l2", 0.7)
    assert completed(dataset="cifar10") == ("l2", 0.5)
    assert completed(norm="linf") == ("linf", 0.1)
    assert completed(norm="linf", dataset="cifar10") == ("linf", 8 / 255)


def test_the_table(runs, capfd):
    assert main("evaluate", runs["absld"], *FAST, "--no-checks") == 0
    text = capfd.readouterr().out
    assert "599 of 599 test images of digits, L-infinity 0.1" in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if len(row) > 5 and row[0].isdigit()] == list("0123456789")
    assert text.count("  worst\n") >= 1
    for label in ("average", "worst class", "worst 10 %", "gap", "NSD", "fgsm", "cw2"):
        assert f"\n{label}" in text
    assert all(len(line) <= 80 for line in text.splitlines()[:-2]) and "\x1b" not in text
    last, page = text.splitlines()[-2:]
    assert page == f"page: absld report {last}"
    assert last.startswith(runs["absld"]) and Path(last).name == "evaluation.json"


def test_nothing_is_computed_twice(runs, capfd, monkeypatch):
    flags = [runs["absld"], *FAST, "--out", "out"]
    bare = evaluated(capfd, *flags, "--no-checks")
    assert bare["checks"] is None
    monkeypatch.setattr(
        "absld.evaluation.evaluate.predict_under_attack", None
    )  # no attack may run again
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_checks", lambda *_: iter(()))
        assert evaluated(capfd, *flags)["checks"] == []
    patched = evaluated(capfd, *flags)  # checked before
    assert figures(patched) == figures(bare) | {"checks": []}
    assert len(list(Path("out").iterdir())) == 1


@pytest.mark.slow
def test_what_decides_the_result_decides_its_place(runs, capfd):
    flags = [runs["absld"], "--attacks", "fgsm", "--no-checks", "--out", "out", "--device", "cpu"]
    variants = [
        [],
        ["--eps", "0.05"],
        ["--epsilon", "8/255"],
        ["--seed", "1"],
        ["--examples", "50"],
        ["--split", "validation"],
        ["--each"],
        ["--restarts", "2"],
        ["--attacks", "fgsm,pgd1"],
        ["--precision", "bf16"],
    ]
    for k, variant in enumerate(variants, 1):
        made = evaluated(capfd, *flags, *variant)
        assert len(list(Path("out").iterdir())) == k, variant
        if "8/255" in variant:
            assert made["settings"]["epsilon"] == 8 / 255
    evaluated(capfd, *flags, "--batch-size", "7", "--data", "elsewhere")
    assert len(list(Path("out").iterdir())) == len(variants)


def test_a_subset_is_in_proportion_to_the_classes(runs, capfd):
    made = evaluated(capfd, runs["absld"], *FAST, "--examples", "100", "--no-checks")
    assert made["data"]["images"] == 100 and made["data"]["of"] == 599
    assert {c["images"] for c in made["robust"]["classes"]} <= {9, 10, 11}


def test_epsilon_0_is_clean_accuracy(runs, capfd):
    made = evaluated(capfd, runs["absld"], *FAST, "--eps", "0", "--no-checks")
    assert made["robust"] == {k: made["attacks"][0][k] for k in ("classes", "metrics")}


@pytest.mark.slow
def test_autoattack_for_real(runs, capfd):
    pytest.importorskip("pyautoattack")
    flags = ["--attacks", "cw5,autoattack", "--examples", "12", "--no-checks", "--device", "cpu"]
    made = evaluated(capfd, runs["absld"], *flags)
    names = [attack["name"] for attack in made["attacks"]]
    assert names == ["clean", "cw5", "apgd-ce", "apgd-t", "fab-t", "square"]
    averages = [attack["metrics"]["average"]["value"] for attack in made["attacks"]]
    assert averages == sorted(averages, reverse=True)


def test_autoattack_is_missed_before_anything_is_done(runs, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    flags = ["evaluate", runs["absld"], "--attacks", "pgd2,autoattack"]
    refused(capfd, 2, "pyautoattack", "pip install 'absld[autoattack]'", *flags)


# --- Targets ---


def test_a_file_a_run_and_a_factory_are_the_same_network(runs, capfd):
    of_run = evaluated(capfd, runs["absld"], *FAST, "--no-checks", "--out", "a")
    weights = load(Path(runs["absld"]) / "best.pt")["model"]
    Path("ein Ordner é").mkdir()
    torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, "ein Ordner é/n.pt")
    flags = [*FAST, "--no-checks", "--dataset", "digits"]
    of_file = evaluated(capfd, "ein Ordner é/n.pt", *flags)
    assert of_file["network"]["notes"] and of_file["network"]["architecture"] == "convnet"
    of_factory = evaluated(capfd, "nets:honest", *flags)
    assert of_factory["network"]["architecture"] == "nets:honest"
    for other in (of_file, of_factory):
        assert other["robust"] == of_run["robust"] and other["settings"] == of_run["settings"]
    assert {p.name[:-9] for p in Path("evaluations").iterdir()} == {"n", "nets-honest"}


def test_a_file_whose_network_only_a_factory_knows(capfd):
    Path("mine.py").write_text(
        "from absld.models.architectures import convnet\ndef net(c): return convnet(c)\n"
    )
    model = build_model("convnet", 10, "mine")
    del model.linear.bias
    torch.save(model.state_dict(), "mine.pt")
    flags = [*FAST, "--dataset", "digits"]
    out = ["evaluate", "mine.pt", *flags]
    refused(capfd, 4, "its network is unknown", "package.module:factory", *out)
    torch.save(build_model("convnet", 10, "mine").state_dict(), "mine.pt")
    made = evaluated(capfd, "mine.pt", *flags, "--model", "mine:net", "--no-checks")
    assert made["network"]["architecture"] == "mine:net"
    sys.modules.pop("mine")


def test_the_same_weights_in_another_network_are_another_evaluation(runs, capfd):
    weights = load(Path(runs["absld"]) / "best.pt")["model"]
    torch.save({f"net.{k}": v for k, v in weights.items()}, "n.pt")
    flags = ["--dataset", "digits", *FAST, "--no-checks"]
    honest, cut = (evaluated(capfd, f"nets:{net}", *flags) for net in ("honest", "killed"))
    assert honest["robust"] != cut["robust"]
    names = {path.name.rpartition("-")[0] for path in Path("evaluations").iterdir()}
    assert names == {"nets-honest", "nets-killed"}
    # The same factory whose code has changed since.
    Path("nets.py").write_text(Path("nets.py").read_text().replace("net(x))", "-net(x))", 1))
    sys.modules.pop("nets")
    assert evaluated(capfd, "nets:honest", *flags)["robust"] != honest["robust"]


@pytest.mark.parametrize("net", ["views", "printing", "named", "strict"])
def test_networks_with_habits_of_their_own(net, capfd):
    """One that views images as vectors, one that prints, a factory that takes its classes by
    name, one that refuses pixels outside of [0,1]: evaluated as the network they are."""
    flags = ["--dataset", "digits", *FAST]
    made = evaluated(capfd, f"nets:{net}", *flags)
    assert made["robust"] == evaluated(capfd, "nets:honest", *flags, "--no-checks")["robust"]


def test_a_folder_of_images(tmp_path, capfd):
    root = make_folder(tmp_path / "ein Ordner für Bilder")
    torch.save(build_model("convnet", 2, "mine").state_dict(), "n.pt")
    flags = ["--dataset", "folder", "--data", root, *FAST, "--attacks", "fgsm,pgd2"]
    made = evaluated(capfd, "n.pt", *flags)
    assert made["data"]["dataset"] == "folder" and made["settings"]["epsilon"] == 8 / 255


@pytest.mark.parametrize(
    ("code", "cause", "hint", "flags"),
    [
        (2, "no data set given", "--dataset", ["n.pt"]),
        (4, "'nowhere': no such run or file", "path", ["nowhere"]),
        (2, "resnet18 is a network without weights", "a file or a run", ["resnet18"]),
        (4, "an HTML page", "download", ["page.pt", "--dataset", "digits"]),
        (2, "no attack 'pdg20'", "pgd20", ["n.pt", "--dataset", "digits", "--attacks", "pdg20"]),
        (2, "named twice", "once", ["n.pt", "--dataset", "digits", "--attacks", "fgsm,fgsm"]),
        (
            2,
            "epsilon must be in [0, 1], not 2",
            "did you mean 2/255?",
            ["n.pt", "--dataset", "digits", "--eps", "2"],
        ),
        (2, "epsilon must be 0 or more, not nan", "--help", ["n.pt", "--eps", "nan"]),
        (2, "epsilon must be 0 or more, not -1", "--help", ["n.pt", "--eps", "-1"]),
        (2, "dataset takes one of", "cifar10", ["n.pt", "--dataset", "cifar"]),
        (2, "examples must be 1 or more", "--help", ["n.pt", "--examples", "0"]),
        (2, "--strict needs the checks", "--checks", ["n.pt", "--strict", "--no-checks"]),
        (2, "--device cuda", "--device cpu", ["n.pt", "--dataset", "digits", "--device", "cuda"]),
        (2, "No such option: --stric", "--help", ["n.pt", "--stric"]),
        (3, "data/test", "needed in data", ["n.pt", "--dataset", "folder"]),
        (4, "gives (2, 9)", "these classes", ["nets:narrow", "--dataset", "digits"]),
        (4, "gives tuple", "these classes", ["nets:a_tuple", "--dataset", "digits"]),
        (4, "shape '[7, 7]'", "another network", ["nets:raising", "--dataset", "digits"]),
        (4, "NaN or infinity of clean", "finite", ["nets:nan", "--dataset", "digits"]),
        (4, "under fgsm", "finite", ["nets:nan_under_attack", "--dataset", "digits"]),
        (4, "writes into its input", "inplace=False", ["nets:in_place", "--dataset", "digits"]),
        (4, "torch.int64", "these classes", ["nets:whole_numbers", "--dataset", "digits"]),
        (2, "SystemExit: 3", "factory", ["nets:leaving", "--dataset", "digits"]),
        (4, "SystemExit(0)", "another network", ["nets:leaves", "--dataset", "digits"]),
        (4, "SystemExit: 0", "--debug", ["nets:leaves_under_attack", "--dataset", "digits"]),
        (4, "tensor a is torch.float8_e4m3fn", "float32", ["f8.pt", "--dataset", "digits"]),
        (4, "no such run or file", "path", ["n.pt", "--dataset", "digits", "--against", ""]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_faults(capfd, code, cause, hint, flags):
    if code == 2 and "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    torch.save(build_model("convnet", 10, "mine").state_dict(), "n.pt")
    torch.save({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, "f8.pt")
    Path("page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    refused(capfd, code, cause, hint, "evaluate", *flags)
    assert not list(Path().glob("evaluations/*/evaluation.json"))


# --- Checks ---


@pytest.mark.parametrize(
    ("net", "check"),
    [
        ("killed", "no input gradient is zero"),
        pytest.param("quantised", "no input gradient is zero", marks=pytest.mark.slow),
        pytest.param("random_input", "repeated forwards agree", marks=pytest.mark.slow),
        ("softmax", "the outputs are logits"),
        pytest.param("normalised", "it takes pixels in [0,1]", marks=pytest.mark.slow),
    ],
)
def test_strict_ends_with_6_where_the_figure_is_not_to_be_trusted(net, check, capfd):
    flags = ["evaluate", f"nets:{net}", "--dataset", "digits", *FAST]
    assert main(*flags) == 0
    assert f"WARN  {check}" in capfd.readouterr().out
    assert main(*flags, "--strict") == 6  # judged again from the finished result
    printed = capfd.readouterr()
    error, hint = printed.err.splitlines()[-2:]
    assert error.startswith("error: ") and check in error and "/gradient-masking/ " in hint
    assert "average" in printed.out  # the result is shown all the same


# --- Two networks ---


def test_the_time_left_of_a_second_network_is_by_its_own_clock(runs, monkeypatch):
    """Of each network the first batch is the origin of time and cost."""
    estimates = []

    def record(spent, done, total):
        estimates.append((spent, done))
        return ""

    monkeypatch.setattr("absld.cli.evaluation_view.time_left", record)
    flags = "--attacks", "fgsm", "--no-checks", "--out", "clock"
    assert main("evaluate", runs["absld"], "--against", runs["teacher"], *flags) == 0
    assert [spent for spent, done in estimates if done == 0] == [0, 0]
    assert estimates[0] == (0, 0) and len(estimates) > 2


def test_against_another_network(runs, capfd):
    made = evaluated(capfd, runs["absld"], "--against", runs["teacher"], *FAST, "--out", "out")
    evaluations = []
    assert made["against"]["checks"] == made["checks"] or len(made["against"]["checks"]) == 11
    for kind in ("absld", "teacher"):
        model = absld.load_network(runs[kind], 10, ("mine",)).model
        data = load_data("digits", "").test
        evaluations.append(evaluate(model, data, epsilon=0.1, attacks="fgsm,pgd2,cw2"))
    assert made["against"]["network"]["target"] == runs["teacher"]
    assert (
        figures(made["against"])["robust"]
        == difference_results(paired_differences(*evaluations))["robust"]
    )
    ours, theirs = (absld.fairness(each.robust_accuracy) for each in evaluations)
    difference = made["against"]["robust"]["worst"]["value"]
    assert difference == pytest.approx(ours.worst - theirs.worst)
    (path,) = Path("out").glob("*/against-*.json")
    assert json.loads(path.read_text()) == made
    assert json.loads(path.with_name("evaluation.json").read_text())["against"] is None
    again = "--against", runs["teacher"], *FAST, "--out", "out"  # read from there
    assert main("evaluate", runs["absld"], *again) == 0
    text = capfd.readouterr().out
    assert "\nminus " in text and "\nrho" in text


def test_each_of_two_networks_has_its_own_model(runs, capfd):
    torch.save(build_model("convnet", 10, "mine").state_dict(), "n.pt")
    Path("mine.py").write_text(
        "from absld.models.architectures import convnet\ndef net(c): return convnet(c)\n"
    )
    flags = ["n.pt", "--model", "mine:net", "--dataset", "digits", *FAST, "--no-checks"]
    made = evaluated(capfd, *flags, "--against", runs["absld"])
    assert made["against"]["network"]["architecture"] == "convnet"
    made = evaluated(capfd, *flags, "--against", "n.pt", "--against-model", "mine:net")
    assert made["against"]["network"]["architecture"] == "mine:net"
    assert "--against" in made["environment"]["command"]
    sys.modules.pop("mine")


def test_the_other_network_is_looked_at_first_and_checked_too(runs, capfd):
    flags = ["evaluate", runs["absld"], *FAST, "--out", "out"]
    torch.save(build_model("convnet", 3, "mine").state_dict(), "n.pt")
    refused(capfd, 4, "expected (10, 64)", "classes", *flags, "--against", "n.pt")
    assert not Path("out").exists()
    assert main(*flags, "--against", "nets:killed", "--strict") == 6
    assert "no input gradient is zero" in capfd.readouterr().err


def test_a_network_is_no_better_than_itself(runs, capfd):
    made = evaluated(capfd, runs["absld"], "--against", "nets:honest", *FAST, "--no-checks")
    for part in ("clean", "robust"):
        for each in made["against"][part].values():
            assert each == {"value": 0.0, "low": 0.0, "high": 0.0}


# --- Interruption ---


def test_an_evaluation_goes_on_where_it_was_stopped(runs, capfd):
    config = EvaluationConfig(attacks="fgsm,pgd2,cw2", batch_size=150, checks=False, out="whole")
    whole = runner.run_evaluation(runs["absld"], config, Quiet())
    for batches in (1, 3, 6, 8):
        config = EvaluationConfig(**vars(config) | {"out": str(batches)})
        with pytest.raises(Stopped):
            runner.run_evaluation(runs["absld"], config, Quiet(batches))
        (path,) = Path(config.out).iterdir()
        assert RunDirectory(path).status() == "interrupted"
        assert not (path / "evaluation.json").exists()
        seen = []
        observer = Quiet()
        observer.attack_batch = seen.append
        again = runner.run_evaluation(runs["absld"], config, observer)
        assert figures(again.results) == figures(whole.results)
        total = 4 + 3 * 4  # at most; what was done is not done again
        assert len(seen) <= total - batches


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_an_evaluation_at_once_and_loses_little(runs, number, single_thread):
    command = [sys.executable, "-m", "absld", "evaluate", runs["absld"], "--out", "out"]
    command += ["--attacks", "pgd2,pgd1000-sat", "--batch-size", "20", "--no-checks"]
    command += ["--examples", "100"]
    with subprocess.Popen(
        command, env=single_thread, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        line = child.stdout.readline()
        while line and not line.startswith("pgd2 "):
            line = child.stdout.readline()
        child.send_signal(number)
        _, error = child.communicate()
    assert child.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in error
    if number != signal.SIGKILL:
        assert error == "Interrupted. Continue with the same command.\n"
        (kept,) = Path("out").glob("*/predictions.pt")
        rows = load(kept)["predictions"]
        assert (rows[:2] >= 0).all() and (rows[2] == -1).any()
    config = EvaluationConfig(
        attacks="pgd2,pgd1000-sat", examples=100, checks=False, batch_size=100, out="out"
    )
    seen = []
    observer = Quiet()
    observer.attack_batch = seen.append
    runner.run_evaluation(runs["absld"], config, observer)
    if number != signal.SIGKILL:  # what had been done is not done again
        assert seen[0].attack == "pgd1000-sat"


def test_progress_is_saved_every_few_seconds(runs, monkeypatch):
    monkeypatch.setattr(resuming, "SAVE_EVERY", 0.0)
    saved = []
    real = save
    monkeypatch.setattr(resuming, "save", lambda *given: (saved.append(1), real(*given)))
    config = EvaluationConfig(attacks="fgsm", batch_size=200, checks=False, out="out")
    runner.run_evaluation(runs["absld"], config, Quiet())
    assert len(saved) >= 6


def test_two_processes_in_one_evaluation(runs, capfd):
    assert main("evaluate", runs["absld"], *FAST, "--out", "out", "--no-checks") == 0
    capfd.readouterr()
    (path,) = Path("out").iterdir()
    with RunDirectory(path):
        flags = ["evaluate", runs["absld"], *FAST, "--out", "out", "--no-checks"]
        refused(capfd, 7, "another process", "wait for it", *flags)


def test_files_that_were_changed_are_refused(runs, capfd):
    flags = ["evaluate", runs["absld"], *FAST, "--out", "out", "--no-checks"]
    assert main(*flags) == 0
    capfd.readouterr()
    (path,) = Path("out").iterdir()
    whole = (path / "predictions.pt").read_bytes()
    (path / "predictions.pt").write_bytes(whole[:-100])
    refused(capfd, 4, "truncated or damaged", "anew", *flags)
    (path / "predictions.pt").write_bytes(whole)
    results = path / "evaluation.json"
    results.write_text(results.read_text().replace("absld-evaluation-1", "absld-evaluation-0"))
    refused(capfd, 4, "schema: 'absld-evaluation-1' was expected", "absld evaluate", *flags)


LITTLE = ["--attacks", "fgsm", "--examples", "20", "--no-checks", "--device", "cpu"]


@pytest.fixture(scope="module")
def evaluated_once(runs, tmp_path_factory):
    """The folder of a finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluated")
    assert main("evaluate", runs["absld"], *LITTLE, "--out", folder) == 0
    return folder


@pytest.fixture
def finished(evaluated_once):
    """The directory of a finished evaluation, below "out"."""
    shutil.copytree(evaluated_once, "out")
    (path,) = Path("out").iterdir()
    return path


@pytest.mark.parametrize(
    ("key", "flags"),
    [
        ("epsilon", ["--eps", "0.05"]),
        ("images_sha256", ["--split", "validation"]),
        ("attacks", ["--attacks", "fgsm,cw1"]),
        ("weights_sha256", []),
    ],
)
def test_results_of_another_evaluation_are_refused(key, flags, runs, finished, capfd):
    """They were copied into the directory of this one. Also where two networks are compared."""
    other = runs["teacher" if key == "weights_sha256" else "absld"]
    assert main("evaluate", other, *LITTLE, *flags, "--out", "others") == 0
    (copied,) = Path("others").glob("*/evaluation.json")
    shutil.copy(copied, finished / "evaluation.json")
    capfd.readouterr()
    against = ["--against", runs["teacher"]] if key == "weights_sha256" else []
    command = ["evaluate", runs["absld"], *LITTLE, *against, "--out", "out"]
    refused(capfd, 4, f"different evaluation, by {key}", "remove it", *command)
    (finished / "evaluation.json").unlink()
    assert main(*command) == 0


def test_figures_are_those_of_the_predictions(runs, finished, capfd):
    """Whatever the file of the results says; it is mended."""
    path = finished / "evaluation.json"
    made = json.loads(path.read_text())
    clean = {key: made["attacks"][0][key] for key in ("classes", "metrics")}
    path.write_text(json.dumps(made | {"robust": clean, "confusion": [[0] * 10] * 10}))
    again = evaluated(capfd, runs["absld"], *LITTLE, "--out", "out")
    assert again == made == json.loads(path.read_text())


@pytest.mark.parametrize(
    "change",
    [
        lambda p: torch.cat([p, p[:1]]),
        lambda p: p[:, :1],
        lambda p: p[0],
        lambda p: torch.full_like(p, 10),
        lambda p: torch.full_like(p, -2),
        lambda p: p.float(),
        lambda p: p.tolist(),
        lambda p: None,
    ],
    ids=["a row more", "a column", "a row", "10", "-2", "floating", "a list", "none"],
)
def test_predictions_of_another_shape_or_class_are_refused(change, runs, finished, capfd):
    path = finished / "predictions.pt"
    kept = load(path)
    save(kept | {"predictions": change(kept["predictions"])}, path)
    flags = [runs["absld"], *LITTLE, "--out", "out"]
    refused(capfd, 4, str(path), "remove it to evaluate anew", "evaluate", *flags)


NOT_ONE = ["", "[]", "{}", "nonsense", '"text"', '{"schema": "absld-evaluation-1"}']


@pytest.mark.parametrize("text", NOT_ONE)
def test_a_file_without_results_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"x\.json"):
        read_results(tmp_path / "x.json")


def test_networks_on_other_images_are_not_paired(runs):
    model = absld.load_network(runs["absld"], 10, ("mine",)).model
    data = load_data("digits", "").test
    some, others = (
        evaluate(model, data, epsilon=0.1, attacks="fgsm", examples=20, seed=seed)
        for seed in (0, 1)
    )
    with pytest.raises(UsageError, match="same images"):
        paired_differences(some, others)


# --- Where it is shown ---


def test_a_report_of_a_run(runs, capfd):
    run = Path(shutil.copytree(runs["absld"], "run"))
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    refused(capfd, 4, "no evaluation in it", "absld evaluate RUN", "report", "run")
    assert main("evaluate", "run", *FAST, "--no-checks") == 0
    capfd.readouterr()
    assert main("report", "run") == 0
    (made,) = run.glob("evaluations/*/report.html")
    assert capfd.readouterr().out == f"{made}\n"
    text = made.read_text()
    assert text.startswith("<!DOCTYPE html>") and "Temperature, adversarial images" in text
    assert main("report", "run", "--out", "ein Bild é.pdf") == 0
    assert Path("ein Bild é.pdf").read_bytes().startswith(b"%PDF")
    refused(capfd, 2, "card.doc", "--out report.html", "report", "run", "--out", "card.doc")


@pytest.mark.slow
def test_into_a_pipe_that_closes(runs, single_thread):
    command = f"{sys.executable} -m absld evaluate {runs['absld']} --attacks fgsm | head -1"
    child = subprocess.run(
        ["bash", "-c", command], env=single_thread, capture_output=True, text=True
    )
    assert child.stderr == "" and child.stdout.startswith("images of 10 classes")


@pytest.mark.slow
def test_on_a_terminal_a_bar_moves_and_leaves_nothing_behind(runs, single_thread):
    primary, secondary = pty.openpty()
    command = [sys.executable, "-m", "absld", "evaluate", runs["absld"], "--no-checks"]
    command += ["--attacks", "pgd200", "--batch-size", "50"]
    environment = single_thread | {"TERM": "xterm", "COLUMNS": "40"}
    with subprocess.Popen(
        command, env=environment, stdout=secondary, stderr=secondary, stdin=secondary
    ) as child:
        os.close(secondary)
        shown = b"".join(sent_to(primary))
        assert child.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert (
        re.search(r"pgd200 \d+/\d+ +\S+ \d:\d\d left", text)
        and " left" in text
        and "worst 10 %" in text
    )


def sent_to(descriptor):
    """What a terminal is sent, until the process ends."""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:
            return
        if not part:
            return
        yield part
