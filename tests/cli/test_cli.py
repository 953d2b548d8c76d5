"""absld train and absld recipe show: flags, output, faults and their exit codes, interruption."""

import errno
import fcntl
import functools
import itertools
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from helpers.image_files import make_folder
from helpers.processes import processes
from helpers.program import QUICK, digests, few_digits, load_few, main, refused, the_run
from rich.console import Console
from rich.live import Live

import absld
import absld.runs.training_run
import absld.stepper
from absld.cli import app as cli
from absld.cli.options import format_value
from absld.cli.printing import say, standard_streams
from absld.cli.signals import StopRequest
from absld.cli.training_view import temperature_table
from absld.cli.view import progress_row
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.recipes import RECIPES
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import AbsldError, Interrupted, Stopped
from absld.metrics import ClassAccuracies
from absld.models.architectures import build_model
from absld.progress import EpochReport
from absld.storage.checkpoint import load, save
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")
SOURCE = str(Path(absld.__file__).parents[1])


def train(*flags):
    return main("train", *QUICK, *flags)


# --- Help ---


def imports_no_torch(*flags, **environment):
    """Run the program, and return what it printed before its imports were listed."""
    code = (
        f"import sys; sys.argv = ['absld', *{list(flags)}]\n"
        "from absld.cli.app import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'sklearn', 'torchvision'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": SOURCE, "COLUMNS": "80"} | environment
    child = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0 and child.stdout.endswith("[]\n"), child.stderr
    return child.stdout


@pytest.mark.parametrize("flags", [["--help"], ["train", "--help"], ["recipe", "show", "digits"]])
def test_help_and_recipes_import_no_torch(flags):
    text = imports_no_torch(*flags)
    if "--help" in flags:
        assert 0 < text.index("Examples") < text.index("Options")


@pytest.mark.parametrize(
    ("words", "completed"),
    [("absld train --tea", "--teacher-epochs"), ("absld train --dataset cifar1", "cifar100")],
)
def test_completion_imports_no_torch(words, completed):
    place = str(len(words.split()) - 1)
    text = imports_no_torch(_ABSLD_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=place)
    assert completed in text.split()


def help_of(capfd, monkeypatch, *command):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(*command, "--help") == 0
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    return text


@pytest.mark.parametrize(
    ("command", "config", "others"),
    [
        ("train", Config, ["recipe", "resume", "json"]),
        ("evaluate", EvaluationConfig, ["eps", "against", "strict", "json"]),
        ("compare", Config, ["methods", "seeds", "baseline", "attacks", "examples", "recipe"]),
    ],
)
def test_help_of_80_columns_has_every_setting(command, config, others, capfd, monkeypatch):
    text = help_of(capfd, monkeypatch, command)
    names = [f.name for f in fields(config)]
    if command == "compare":  # which has lists of these two
        names = [name for name in names if name not in ("method", "seed")]
    for name in [*(name.replace("_", "-") for name in names), *others]:
        assert re.search(rf"[ ,]--{name}[ ,]", text), name
    for dataset in RECIPES:
        assert dataset in text


@pytest.mark.parametrize(
    "command", [[], ["report"], ["bench"], ["recipe", "show"], ["teacher", "check"],
                ["teacher", "cache"]],
)  # fmt: skip
def test_help_fits_80_columns(command, capfd, monkeypatch):
    help_of(capfd, monkeypatch, *command)


def test_help_lists_data_before_augmentation(capfd, monkeypatch):
    text = help_of(capfd, monkeypatch, "train")
    assert text.index("─ Data ─") < text.index("─ Augmentation ─") < text.index("─ Run ─")


def test_version(capfd):
    assert main("--version") == 0
    assert capfd.readouterr().out == f"absld {absld.__version__}\n"


@pytest.mark.parametrize("flags", [[], ["recipe"], ["teacher"]])
def test_without_a_command_help_is_printed(flags, capfd):
    main(*flags)
    printed = capfd.readouterr()
    assert "Usage" in printed.out + printed.err and "error: \n" not in printed.err


def rows_of_recipe(capfd, *flags):
    """The rows of `absld recipe show` by setting: value and source; and the whole text."""
    assert main("recipe", "show", *flags) == 0
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = [line for line in text.splitlines() if line[0] not in " #"]
    return {row[:20].strip(): (row[21:41].strip(), row[42:]) for row in rows}, text


def test_recipe_show_has_the_sources_of_a_method_s_recipe(capfd):
    rows, _ = rows_of_recipe(capfd, "cifar10", "--method", "ard")
    assert rows["epochs"] == ("200", "ARD") and rows["start"] == ("uniform", "ARD")
    assert rows["momentum"] == ("0.9", "the authors' release")
    refused(capfd, 2, "not 'ardd'", "did you mean 'ard'", "recipe", "show", "digits",
            "--method", "ardd")  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_show_has_every_setting_with_its_source(name, capfd):
    rows, text = rows_of_recipe(capfd, name)
    config = resolve({"dataset": name})
    assert rows.keys() == {f.name for f in fields(Config)}
    for f in fields(Config):
        value, source = rows[f.name]
        assert value == format_value(getattr(config, f.name)) and source
        assert f.metadata["meaning"] in " ".join(text.split())
    assert (rows["epsilon"][1] == "decided here, for digits") == (name == "digits")


def test_an_unknown_recipe_is_refused(capfd):
    names = "digits, cifar10, cifar100, svhn, tiny-imagenet, folder, paper-cifar10-mobilenetv2"
    refused(capfd, 2, "'other'", names, "recipe", "show", "other")
    refused(capfd, 2, "'digit'", "did you mean 'digits'?", "recipe", "show", "digit")


# --- Flags ---


@pytest.fixture
def parsed(monkeypatch):
    """The settings that a command line gives."""

    def parse(*flags):
        seen = []

        def stop(config, observer, *, resume, distributed):
            seen.append((config, resume))
            raise AbsldError("seen", "enough")

        monkeypatch.setattr(absld.runs.training_run, "train", stop)
        assert main("train", *flags) == 1
        return seen[0]

    return parse


FLAGS = {
    "--epsilon 8/255": {"epsilon": 8 / 255},
    "--epsilon 0.031": {"epsilon": 0.031},
    "--epsilon 0": {"epsilon": 0},
    "--epochs 7 --teacher-epochs 5": {"epochs": 7, "teacher_epochs": 5},
    "--milestones 0.5,0.75": {"milestones": [0.5, 0.75]},
    "--milestones 1/2,3/4": {"milestones": [0.5, 0.75]},
    "--max-steps 9": {"max_steps": 9},
    "--seed -3": {"seed": -3},
    "--method rslad --fidelity released": {"method": "rslad", "fidelity": "released"},
    "--allow-weak-teacher": {"allow_weak_teacher": True},
    "--dataset cifar100 --data here": {"dataset": "cifar100", "data": "here"},
    "--temperature-lower 0.9": {"temperature_lower": 0.9},
    "--temperature-start 5/8": {"temperature_start": 0.625},
    "--temperature-start calibrated": {"temperature_start": "calibrated"},
    "--precision bf16 --device cpu": {"precision": "bf16", "device": "cpu"},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_are_read_as_a_recipe_file_is(flags, parsed):
    assert parsed(*flags.split()) == (resolve(FLAGS[flags]), False)


def test_flags_go_before_a_recipe_file(parsed):
    Path("meine Wahl.toml").write_text('epochs = 9\nepsilon = "8/255"\ndataset = "cifar10"\n')
    config, resume = parsed("--recipe", "meine Wahl.toml", "--epochs", "3", "--resume")
    assert config == resolve({"dataset": "cifar10", "epochs": 3, "epsilon": 8 / 255}) and resume


USAGE = [
    ["--epsilon", "2"], ["--epsilon", "nan"], ["--epsilon", "-1"], ["--epsilon", "8/0"],
    ["--epsilon", "much"], ["--temperature-rate", "-0.1"], ["--learning-rate", "inf"],
    ["--epochs", "0"], ["--teacher-epochs", "-1"], ["--batch-size", "0"], ["--epochs", "2.5"],
    ["--epochs"], ["--dataset", "imagenet"], ["--student", "vgg"], ["--teacher-model", "vgg"],
    ["--fidelity", "free"], ["--epoch", "3"], ["--no-such-flag"], ["more"], ["--max-steps", "0"],
    ["--milestones", "2"], ["--milestones", "a,b"], ["--recipe", "none.toml"], ["--recipe", "."],
    ["--device", "cuda:99"], ["--device", "toaster"], ["--device", "meta"],
    ["--student", "no.such:network"], ["--teacher-model", "no.such:network"],
]  # fmt: skip


@pytest.mark.parametrize("flags", USAGE, ids=" ".join)
def test_wrong_flags_are_refused_before_a_teacher_is_trained(flags, capfd):
    assert "by trades" not in refused(capfd, 2, "", "", "train", *QUICK, *flags)


@pytest.mark.parametrize("flag", ["--image-size", "--batch-size", "--minutes", "--rounds"])
@pytest.mark.parametrize("value", ["nan", "inf", "1e30", "-1", "9" * 30])
def test_sizes_of_a_measurement_that_no_machine_has_are_refused(flag, value, capfd):
    refused(capfd, 2, flag, "--help", "bench", "--student", "convnet", flag, value)


def test_epsilon_in_levels_of_grey_is_refused_with_the_fraction(capfd):
    cause = "epsilon must be in [0, 1], not 8"
    refused(capfd, 2, cause, "did you mean 8/255?", "train", "--eps", "8")


def test_a_mistyped_setting_in_a_recipe_file_is_refused_with_the_nearest(capfd):
    Path("my.toml").write_text("epsilom = 0.1\n")
    refused(capfd, 2, "'epsilom'", "did you mean 'epsilon'", "train", "--recipe", "my.toml")


def test_a_missing_cuda_device_is_a_usage_error(capfd, monkeypatch):
    def zeros(*args, **settings):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch, "zeros", zeros)
    refused(capfd, 2, "not compiled with CUDA", "--device cpu", "train", "--device", "cuda")


@pytest.mark.parametrize("flags", [("--debug", "train"), ("train", "--debug")])
def test_debug_prints_the_traceback_wherever_it_stands(flags, capfd):
    assert main(*flags, "--epochs", "0") == 2
    text = capfd.readouterr().err
    assert "Traceback" in text and text.splitlines()[-2].startswith("error: epochs must be")


# --- Data and teachers ---


def test_missing_images_are_a_data_error(capfd):
    flags = ["train", *QUICK, "--dataset", "folder", "--data", "nowhere hier"]
    refused(capfd, 3, "nowhere hier", "nowhere hier: train/CLASS/*", *flags)


def test_without_a_network_the_folder_of_the_images_is_named(capfd, monkeypatch):
    def urlopen(*args, **settings):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    start = time.monotonic()
    flags = ["train", *QUICK, "--dataset", "cifar10", "--data", "images here"]
    refused(capfd, 3, "Name or service", "images here", *flags)
    assert time.monotonic() - start < 5


def test_a_run_on_few_images_says_what_they_are_too_few_for(tmp_path, capfd):
    root = make_folder(tmp_path / "images")
    flags = ["--dataset", "folder", "--data", root, "--batch-size", 16, "--method", "sat"]
    flags += ["--student", "convnet"]
    assert train(*flags) == 0
    text = capfd.readouterr().out
    assert "1 step of 16 an epoch" in text and "for more steps: --batch-size 4\n" in text
    assert "1 validation image in class cat (fewest): the best epoch is mostly chance\n" in text


@pytest.mark.parametrize("fault", ["empty class", "unreadable", "one class", "differ"])
def test_a_faulty_folder_is_a_data_error(fault, tmp_path, capfd):
    classes = ["cat"] if fault == "one class" else ["cat", "dog"]
    root = make_folder(tmp_path / "images", classes=classes)
    if fault == "empty class":
        (root / "test" / "eel").mkdir()
    if fault == "unreadable":
        (root / "test" / "cat" / "bad.jpg").write_text("no image")
    if fault == "differ":
        (root / "test" / "dog").rename(root / "test" / "wolf")
    named = {"empty class": "eel", "unreadable": "bad.jpg", "one class": "cat", "differ": "wolf"}
    refused(capfd, 3, named[fault], "", "train", *QUICK, "--dataset", "folder", "--data", root)


def test_a_batch_larger_than_the_data_is_refused(capfd):
    refused(capfd, 3, "64 training images", "--batch-size", "train", *QUICK, "--batch-size", 65)


def test_a_teacher_near_chance_is_refused_unless_allowed(teacher, capfd):
    flags = [flag for flag in QUICK if flag != "--allow-weak-teacher"]
    flags = ["train", *flags, "--teacher", teacher]
    refused(capfd, 4, "near chance", "--allow-weak-teacher", *flags)
    assert main(*flags, "--allow-weak-teacher", "--resume") == 0


NETWORKS = """
from torch import nn
def plain(classes): return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
def narrow(): return nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
def grey(classes): return nn.Sequential(nn.Conv2d(1, 1, 3), nn.Flatten(), nn.Linear(36, classes))
class Tuple(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = nn.Linear(192, classes)
    def forward(self, x): return self.linear(x.flatten(1)), x
"""


@pytest.mark.parametrize("role", ["--teacher", "--student"])
@pytest.mark.parametrize("name", ["narrow", "grey", "Tuple"])
def test_a_network_that_does_not_fit_is_named(role, name, teacher, capfd):
    module = module_of(NETWORKS)
    given = {"--teacher": teacher} | {role: f"{module}:{name}"}
    code = train(*[part for pair in given.items() for part in pair])
    text = capfd.readouterr().err
    assert code in (2, 4) and "internal error" not in text and f"{module}:{name}" in text


def module_of(text):
    name = f"nets_{time.monotonic_ns()}"
    Path(f"{name}.py").write_text(text)
    return name


def test_networks_by_name_file_run_and_factory(teacher, capfd):
    module = module_of(NETWORKS)
    found = []

    def trained(teacher, student):
        assert train("--teacher", teacher, "--student", student) == 0
        found.append(digests(capfd.readouterr().out))

    trained(teacher, "convnet")
    trained(the_run(), f"{module}:plain")
    trained(f"{module}:plain", teacher)
    assert found[0]["teacher"] == digest(load(teacher)["model"])
    assert found[1]["teacher"] == found[0]["student"]
    made = [load(run / "best.pt")["architecture"] for run in Path("runs").glob("digits-*")]
    assert sorted(made) == ["convnet", "convnet", f"{module}:plain"]


def test_the_run_of_a_factory_teaches_with_that_factory(capfd):
    module = module_of(NETWORKS)
    assert train("--method", "trades", "--student", f"{module}:plain") == 0
    text = capfd.readouterr().out
    first = digests(text)["student"]
    (run,) = Path("runs").glob("digits-*")
    assert text.endswith(f"\nevaluate it: absld evaluate {run} --model {module}:plain\n")
    assert train("--teacher", run, "--teacher-model", f"{module}:plain") == 0
    assert digests(capfd.readouterr().out)["teacher"] == first
    flags = ["train", *QUICK, "--seed", 2, "--student", run]
    refused(capfd, 4, f"{module}:plain", "--model", *flags)


# --- A run ---


def test_a_run_prints_header_epochs_classes_and_digests(capfd):
    assert train("--seed", 3) == 0
    text = capfd.readouterr().out
    assert "\x1b" not in text and "━" not in text and max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines()]
    assert text.startswith(f"seed 3, device cpu, torch {torch.__version__}\n")
    assert "\nteacher: trained here by TRADES; another: --teacher-model NAME or --teac" in text
    assert re.search(r"\nteacher by trades: .* parameters\), 1 epochs, seed 3\nepoch ", text)
    assert re.search(r"\nstudent by absld: .* parameters\), 1 epochs, seed 3\nepoch ", text)
    head = "epoch     lr    loss  clean robust  worst    NSD temperatures seconds images/s\n"
    assert text.count(head) == 2
    assert [row[6][-1] for row in rows if len(row) == 12 and row[0] == "1"] == ["%", "%"]
    assert [row[0] for row in rows if len(row) == 3 and row[0].isdigit()] == list("0123456789")
    assert {"average", "worst", "NSD"} <= {row[0] for row in rows}
    assert [str(the_run())] in rows and rows[-3][:2] == ["teacher", "sha256:"]
    assert text.endswith(f"\nevaluate it: absld evaluate {the_run()}\n")
    assert digests(text)["student"] == digest(load(the_run() / "best.pt")["model"])
    assert digests(text)["teacher"] == digest(load(the_run("teacher") / "best.pt")["model"])


def test_methods_share_a_teacher_and_keep_their_runs(capfd):
    for method in ("absld", "rslad"):
        assert train("--method", method) == 0
    assert capfd.readouterr().out.count("teacher by trades") == 1
    assert train("--method", "trades") == 0
    text = capfd.readouterr().out
    assert set(digests(text)) == {"student"}
    kinds = sorted(path.name.split("-")[1] for path in Path("runs").glob("digits-*"))
    assert kinds == ["absld", "rslad", "teacher", "trades"]


def test_a_run_directory_has_all_of_a_run(teacher, capfd):
    assert train("--teacher", teacher) == 0
    text, run = capfd.readouterr().out, the_run()
    assert (run / "STATUS").read_text() == "finished\n"
    record = json.loads((run / "metrics.jsonl").read_text())
    assert {"epoch", "loss", "clean", "robust", "temperature_adv", "is_best"} <= record.keys()
    (session,) = json.loads((run / "environment.json").read_text())
    assert session["teacher_sha256"] == digests(text)["teacher"]
    assert {"command", "started", "commit", "python", "torch", "device", "inputs"} <= session.keys()
    assert session["command"].startswith("absld train --epochs 1")
    for name in ("best.pt", "last.pt"):
        content = torch.load(run / name, weights_only=True)
        assert content["architecture"] == "convnet" and content["classes"] == list("0123456789")
    result = json.loads((run / "result.json").read_text())
    assert result["student_sha256"] == digests(text)["student"]


def test_the_settings_of_a_run_are_a_recipe(teacher, capfd):
    assert train("--teacher", teacher, "--epsilon", "8/255") == 0
    first = capfd.readouterr().out
    assert main("train", "--recipe", the_run() / "config.toml", "--out", "again") == 0
    assert digests(capfd.readouterr().out) == digests(first)
    assert the_run().name == the_run(out="again").name


def test_a_run_is_never_written_over(teacher, capfd):
    assert train("--teacher", teacher) == 0
    first = capfd.readouterr().out
    before = {path.name: path.read_bytes() for path in the_run().iterdir()}
    flags = ["train", *QUICK, "--teacher", teacher]
    refused(capfd, 2, f"{the_run()} holds a run", "--resume", *flags)
    assert {path.name: path.read_bytes() for path in the_run().iterdir()} == before
    assert train("--teacher", teacher, "--resume") == 0
    assert capfd.readouterr().out.split("runs/")[-1] == first.split("runs/")[-1]
    assert len(json.loads((the_run() / "environment.json").read_text())) == 2


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_is_one_document_with_the_epochs_on_stderr(teacher, capfd):
    assert train("--teacher", teacher, "--json") == 0
    printed = capfd.readouterr()
    results = strict_json(printed.out)
    assert results["config"] == json.loads(json.dumps(asdict(resolve({
        "epochs": 1, "teacher_epochs": 1, "max_steps": 1, "allow_weak_teacher": True,
        "device": "cpu", "batch_size": 32, "teacher": teacher,
    }))))  # fmt: skip
    assert results["run"] == str(the_run()) and results["classes"] == list("0123456789")
    for name in ("clean", "robust"):
        assert len(results[name]["class_accuracy"]) == 10
        assert results[name]["average"] >= results[name]["worst"] >= 0
    assert results["student_sha256"] == digest(load(the_run() / "best.pt")["model"])
    assert results["warning"] is None
    assert "epoch     lr" in printed.err and "student by absld" in printed.err
    assert main("train", *QUICK, "--teacher", teacher, "--json") == 2
    assert capfd.readouterr().out == ""


def test_selection_on_test_images_is_warned_of_in_every_report(teacher, capfd):
    assert train("--teacher", teacher, "--select-on", "test") == 0
    assert capfd.readouterr().out.count("warning: the best epoch is selected on the test") == 2
    assert train("--teacher", teacher, "--select-on", "test", "--resume", "--json") == 0
    assert strict_json(capfd.readouterr().out)["warning"].startswith("warning: the best epoch")


def test_paths_with_spaces_and_letters_of_any_script(tmp_path, teacher, capfd):
    root = make_folder(tmp_path / "ein Ordner für Bilder", classes=["cat", "日本"])
    made = build_model("convnet", 2, "mine").state_dict()
    torch.save({"model": made}, "teacher é.pt")
    Path("meine Wahl.toml").write_text(
        f'dataset = "folder"\ndata = "{root}"\nteacher = "teacher é.pt"\nout = "Läufe hier"\n'
        'student = "convnet"\nbatch_size = 4\nepochs = 1\nmax_steps = 1\nallow_weak_teacher = true'
    )
    flags = ["train", "--recipe", "meine Wahl.toml", "--device", "cpu"]
    assert main(*flags) == 0
    text = capfd.readouterr().out
    assert "\n日本 " in text and digests(text)["teacher"] == digest(made)
    assert main(*flags, "--resume") == 0
    assert digests(capfd.readouterr().out) == digests(text)
    (run,) = Path("Läufe hier").glob("folder-*")
    assert main("train", "--recipe", run / "config.toml", "--resume") == 0


# --- Faults on the way ---


def test_a_non_finite_loss_ends_with_exit_code_5(teacher, capfd, monkeypatch):
    loss = absld.absld_loss
    monkeypatch.setattr(
        "absld.methods.absld.absld_loss", lambda *z, **settings: loss(*z, **settings) * float("nan")
    )
    flags = ["train", *QUICK, "--teacher", teacher]
    refused(capfd, 5, "epoch 1, step 1: ", "what was saved before stays", *flags)
    assert (the_run() / "STATUS").read_text().startswith("failed: epoch 1, step 1: ")


def test_a_student_broken_by_its_last_step_is_not_a_result(teacher, capfd):
    flags = ["--learning-rate", "1e38", "--teacher", teacher]
    assert train(*flags) == 5
    assert not digests(capfd.readouterr().out)


def failing(error):
    def fail(*given, **settings):
        raise error

    return fail


def test_out_of_memory_suggests_a_smaller_batch(teacher, capfd, monkeypatch):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 20 GiB")
    monkeypatch.setattr("absld.stepper.train_step", failing(error))
    flags = ["train", *QUICK, "--teacher", teacher]
    refused(capfd, 1, "out of memory. Tried to allocate 20 GiB", "--batch-size", *flags)


def test_a_full_disk_is_named(teacher, capfd, monkeypatch):
    monkeypatch.setattr(
        "absld.storage.run_directory.save", failing(OSError(28, "No space left on device"))
    )
    flags = ["train", *QUICK, "--teacher", teacher]
    refused(capfd, 1, "No space left", "check free space", *flags)
    assert (the_run() / "STATUS").read_text().startswith("failed: ")


def test_an_out_folder_that_is_a_file_is_refused(teacher, capfd):
    Path("runs").write_text("here already")
    refused(capfd, 4, "runs: not a dir", "--out", "train", *QUICK, "--teacher", teacher)


LONG = "n" * 300
LONG_NAMES = {
    "evaluate": ["evaluate", LONG],
    "evaluate --out": ["evaluate", "TEACHER", "--dataset", "digits", "--device", "cpu",
                       "--attacks", "clean", "--no-checks", "--out", LONG],
    "report": ["report", LONG],
    "compare": ["compare", LONG, "b"],
    "train --out": ["train", *QUICK, "--teacher", "TEACHER", "--out", LONG],
    "teacher check": ["teacher", "check", LONG, "--dataset", "digits"],
}  # fmt: skip


@pytest.mark.parametrize("command", LONG_NAMES)
def test_a_name_that_is_too_long_is_a_usage_error(command, teacher, capfd):
    flags = [teacher if word == "TEACHER" else word for word in LONG_NAMES[command]]
    refused(capfd, 2, "File name too long", "check this path", *flags)


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EISDIR, 2), (errno.ENOENT, 2), (errno.ENOSPC, 1), (errno.EACCES, 1), (None, 1)],
)
def test_an_error_of_a_path_is_told_apart_from_one_of_the_disk(number, code):
    error = OSError("broken") if number is None else OSError(number, "broken", "p" * 5000)
    found, cause, hint = cli.explain(error)
    assert found == code and cause.startswith("broken") and ("free space" in hint) == (code == 1)
    assert code == 1 or len(cause) <= 200


def test_an_internal_error_asks_for_a_report(teacher, capfd, monkeypatch):
    monkeypatch.setattr("absld.stepper.train_step", failing(ZeroDivisionError("oops")))
    flags = ["train", *QUICK, "--teacher", teacher]
    hint = "internal error, please report it; --debug prints the traceback"
    refused(capfd, 1, "ZeroDivisionError: oops", hint, *flags)


def test_ctrl_c_before_there_is_a_training(capfd, monkeypatch):
    monkeypatch.setattr(cli, "resolve", failing(KeyboardInterrupt()))
    assert main("train") == 130
    assert "internal error" not in capfd.readouterr().err


# --- Resuming ---


@pytest.mark.parametrize(("error", "code"), [(Stopped(143), 143), (KeyboardInterrupt, 130)])
def test_a_signal_behind_another_error_ends_with_its_code(error, code, capfd, monkeypatch):
    """As by an import that it interrupts while a class is made."""

    def interrupted(*given):
        try:
            raise error
        except BaseException as signalled:
            raise RuntimeError("Error calling __set_name__") from signalled

    monkeypatch.setattr("absld.runs.planning.load_data", interrupted)
    assert main("train", *QUICK) == code
    assert capfd.readouterr().err == "Interrupted.\n"


def signal_at_step(monkeypatch, number, step):
    """Send a signal to this process in the step of that number."""
    steps, train_step = [], absld.stepper.train_step

    def signalled(*given):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), number)
        return train_step(*given)

    monkeypatch.setattr("absld.stepper.train_step", signalled)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGUSR2", "SIGXCPU"])
def test_a_signal_saves_the_step_and_names_the_command_to_continue(
    name, teacher, capfd, monkeypatch
):
    """The command is tried in the test below."""
    number = getattr(signal, name)
    flags = ["--max-steps", "2", "--teacher", teacher]
    signal_at_step(monkeypatch, number, 1)
    assert train(*flags) == 128 + number
    command = shlex.join(["absld", "train", *QUICK, *flags, "--resume"])
    assert capfd.readouterr().err.splitlines() == [
        "stopping after this step; a second signal stops at once",
        f"Interrupted in epoch 1. Continue with: {command}",
    ]
    assert (the_run() / "STATUS").read_text() == "interrupted\n"
    progress = load(the_run() / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)


def test_an_interrupted_run_ends_as_if_it_were_not(teacher, capfd, monkeypatch):
    flags = ["--epochs", "3", "--max-steps", "2", "--teacher", teacher]
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 3)
        assert train(*flags) == 143
    _, command = capfd.readouterr().err.splitlines()[-1].split("Continue with: ")
    assert main(*shlex.split(command)[1:]) == 0
    resumed = digests(capfd.readouterr().out)
    assert train(*flags, "--out", "whole") == 0
    assert digests(capfd.readouterr().out) == resumed
    assert records(the_run()) == records(the_run(out="whole"))


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_that_was_ignored_stays_ignored(name, monkeypatch):
    """As SIGHUP by nohup."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.training = True
            os.kill(os.getpid(), number)
            stop.check()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE"])
def test_signals_that_come_repeatedly_do_not_end_the_step(name):
    """A shell and the kernel both send SIGHUP; the kernel sends SIGXCPU every second."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            stop.training = True
            for _ in range(3):
                os.kill(os.getpid(), number)
            with pytest.raises(Interrupted, match=f"signal {int(number)}$"):
                stop.check()
    finally:
        signal.signal(number, before)


def test_signals_that_a_platform_lacks_are_left_out(monkeypatch):
    """Windows has only the first two."""
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE"):
        monkeypatch.delattr(signal, name)
    with StopRequest(ignore_pipes=True) as stop:
        assert stop.before.keys() == {signal.SIGINT, signal.SIGTERM}
        stop.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_signal_after_the_terminal_is_gone_is_kept(monkeypatch):
    with open("gone", "w") as gone:
        os.dup2(os.open("/dev/full", os.O_WRONLY), gone.fileno())
        monkeypatch.setattr(sys, "stderr", gone)
        with StopRequest() as stop:
            stop.training = True
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == signal.SIGHUP
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())


def test_a_second_signal_stops_at_once():
    with StopRequest() as stop:
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
    assert stopped.value.exit_code == 143
    with StopRequest(once=True) as stop:  # torchrun sends what the terminal has sent already
        stop.training = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT


def test_resume_begins_a_run_that_is_not_there_yet(teacher, capfd):
    """So a loop that restarts a job has one command."""
    assert train("--teacher", teacher, "--resume") == 0
    first = capfd.readouterr().out
    assert "--resume: there is no run with these settings in runs, so a new one begins\n" in first
    assert train("--teacher", teacher, "--resume") == 0
    again = capfd.readouterr().out
    assert "a new one begins" not in again and digests(again) == digests(first)


def test_a_run_begun_by_resume_is_told_apart_from_the_nearest(teacher, capfd):
    assert train("--teacher", teacher) == 0
    other = the_run()
    runs = {other}
    for flags, difference in (
        (["--epsilon", "0.2"], "epsilon is 0.1 in the run, 0.2 now"),
        (["--seed", 1], "seed is 0 in the run, 1 now"),
        (["--fidelity", "released"], "fidelity is 'paper' in the run, 'released' now"),
        (["--epochs", 2], "epochs is 1 in the run, 2 now"),
    ):
        capfd.readouterr()
        assert train("--teacher", teacher, "--resume", *flags) == 0
        text = capfd.readouterr().out
        assert f"so a new one begins; in {other} {difference}" in text
        (run,) = {*Path("runs").glob("digits-absld-*")} - runs
        runs.add(run)
        note = next(line for line in text.splitlines() if "a new one begins" in line)
        assert note in json.loads((run / "environment.json").read_text())[0]["notes"]


def test_resuming_with_other_images_or_another_teacher_begins_another_run(
    teacher, capfd, monkeypatch
):
    shutil.copy(teacher, "teacher.pt")
    flags = ["--teacher", "teacher.pt", "--resume"]
    assert train(*flags) == 0
    save({"model": build_model("convnet", 10, "another").state_dict()}, Path("teacher.pt"))
    assert train(*flags) == 0
    assert "teacher_weights is '" in capfd.readouterr().out
    other = few_digits()._replace(train=few_digits().test)
    monkeypatch.setattr(absld.runs.planning, "load_data", lambda *given: other)
    assert train(*flags) == 0
    assert "train_images is '" in capfd.readouterr().out
    assert len(list(Path("runs").glob("digits-absld-*"))) == 3


def test_a_damaged_run_beside_it_does_not_keep_a_run_from_beginning(teacher, capfd):
    """Neither damaged settings nor damaged sessions, of two runs."""
    for seed, name in enumerate(("config.toml", "environment.json", "")):
        assert train("--teacher", teacher, "--resume", "--seed", seed) == 0
        assert "so a new one begins\n" in capfd.readouterr().out
        if name:
            (run,) = Path("runs").glob(f"digits-absld-seed{seed}-*")
            (run / name).write_text("{")


@pytest.mark.parametrize(
    ("kind", "before", "change"),
    [
        ("absld", {"processes": 2, "threads": 64}, "processes: 2, now 1; threads: 64, now 1"),
        ("teacher", {"torch": "2.0"}, "torch: 2.0, now 2."),
    ],
)
def test_a_run_resumed_under_other_conditions_says_so(kind, before, change, capfd, monkeypatch):
    flags = ["--epochs", "2", "--teacher-epochs", "2", "--max-steps", "1"]
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 4 if kind == "absld" else 2)
        assert train(*flags) == 143
    path = the_run(kind) / "environment.json"
    (session,) = json.loads(path.read_text())
    path.write_text(json.dumps([session | before]))
    capfd.readouterr()
    assert train(*flags, "--resume") == 0
    text = capfd.readouterr().out
    assert f"conditions of this run have changed ({change}" in text
    assert text.count("conditions of this run") == 1
    assert train(*flags, "--resume") == 0
    assert "conditions of this run" not in capfd.readouterr().out  # it is finished


# --- The terminal ---


def test_a_terminal_shows_a_live_run(teacher, monkeypatch, capfd):
    """The lines stay; a bar and the temperatures of the classes move below them."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(Live, "update", functools.partialmethod(Live.update, refresh=True))
    assert train("--epochs", 3, "--max-steps", 2, "--teacher", teacher) == 0
    plain = check_live_text(capfd.readouterr().out, "student 2/3", epochs=3)
    assert len(digests(plain)) == 2


def check_live_text(text, title, epochs):
    assert "\x1b[" in text and title in text and " left" in text
    assert "T adv" in text and "T nat" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "\n")
    assert re.search(r"^ *3 +[01]\.\d\d +━+ +[01]\.\d\d +\d+%", plain, re.MULTILINE)
    for epoch in range(1, epochs + 1):
        assert re.search(rf"^ *{epoch} 0\.\d{{4}} ", plain, re.MULTILINE), epoch
    return plain


def test_the_temperatures_of_many_classes_are_the_extremes():
    report = EpochReport(
        1, 0.1, 0.1, 1.0, {}, ClassAccuracies(torch.ones(100), torch.ones(100)),
        {"temperature_adv": torch.linspace(0.5, 5, 100), "temperature_nat": torch.ones(100)},
        1.0, 1.0,
    )  # fmt: skip
    table = temperature_table(report, tuple(map(str, range(100))), resolve({}))
    names = [cell.plain for cell in table.columns[0].cells]
    assert names == [*map(str, range(6)), *map(str, range(94, 100))]


# --- Processes of their own: signals, pipes, the terminal ---

held, go = Path("held"), Path("go")  # in the folder of the test


def child(flags, folder, out, err, environment, hold):
    """The program, with the few digits; in the step of number `hold` it waits for the file go."""
    os.chdir(folder)
    os.environ.update(environment)
    for number, path in ((1, out), (2, err)):
        if path:
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY)
            os.dup2(opened, number)
            os.close(opened)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False) if out else None  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False) if err else None  # noqa: SIM115
    for number, path in ((1, out), (2, err)):
        if not path:
            os.close(number)
    torch.set_num_threads(1)
    absld.runs.planning.load_data = load_few
    numbers, step = itertools.count(1), absld.stepper.train_step

    def step_or_wait(*given):
        if next(numbers) == hold:
            held.touch()
            until(go.exists)  # in short sleeps: a signal may wake another thread
        return step(*given)

    absld.stepper.train_step = step_or_wait
    sys.argv = ["absld", *map(str, flags)]
    cli.main()


@pytest.fixture
def start():
    """Start the program with its output in files; in the end it is gone."""
    started = []

    def start(*flags, out="out", err="err", hold=None, **environment):
        given = (flags, os.getcwd(), out, err, environment, hold)
        started.append(processes.Process(target=child, args=given))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def text_of(path):
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, text_of("err")
        time.sleep(0.002)


def ended(process, seconds=60):
    process.join(seconds)
    assert process.exitcode is not None, "it goes on and on"
    return process.exitcode


LONGER = ["train", *QUICK, "--epochs", "8", "--max-steps", "2"]


@pytest.mark.slow
def test_an_interrupted_process_is_resumed_to_the_same_digest(teacher, capfd, start):
    flags = [*LONGER, "--teacher", teacher]
    process = start(*flags, hold=5)
    until(held.exists)
    assert "\n    2 " in text_of("out")
    os.kill(process.pid, signal.SIGINT)
    until(lambda: text_of("err"))
    go.touch()
    assert ended(process) == 130
    lines = text_of("err").splitlines()
    assert lines[0] == "stopping after this step; a second signal stops at once"
    assert re.fullmatch(
        r"Interrupted in epoch \d\. Continue with: absld train .* --resume", lines[1]
    )
    assert (the_run() / "STATUS").read_text() == "interrupted\n"
    progress = load(the_run() / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (3, 1)
    assert main(*flags, "--resume") == 0
    resumed = capfd.readouterr().out
    assert "\n    2 " not in resumed and "\n    8 " in resumed
    assert main(*flags, "--out", "whole") == 0
    assert digests(capfd.readouterr().out) == digests(resumed)
    assert records(the_run()) == records(the_run(out="whole"))
    assert len(records(the_run())) == 8


def records(run):
    """What is recorded of each epoch, but for times."""
    times = dict.fromkeys(("seconds", "images_per_second"))
    return [json.loads(line) | times for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_interrupted_teacher_continues(capfd, start):
    flags = ["train", *QUICK, "--teacher-epochs", "8"]
    process = start(*flags, hold=3)
    until(held.exists)
    os.kill(process.pid, signal.SIGTERM)
    until(lambda: text_of("err"))
    go.touch()
    assert ended(process) == 143
    assert (the_run("teacher") / "STATUS").read_text() == "interrupted\n"
    assert " of the teacher. Continue with: " in text_of("err")
    assert main(*flags, "--resume") == 0
    resumed = digests(capfd.readouterr().out)
    assert main(*flags, "--out", "whole") == 0
    assert digests(capfd.readouterr().out) == resumed and len(resumed) == 2


@pytest.mark.slow
def test_a_run_waits_for_its_teacher_and_takes_over_if_the_other_is_killed(capfd, start):
    flags = ["train", *QUICK, "--teacher-epochs", "2"]
    first = start(*flags, hold=2)
    until(held.exists)
    second = start(*flags, "--method", "rslad", out="out2")
    third = start(*flags, "--method", "ard", out="out3")
    wait = "waiting for another process, which trains runs/digits-teacher-"
    until(lambda: wait in text_of("out2") and wait in text_of("out3"))
    os.kill(third.pid, signal.SIGINT)
    assert ended(third, 10) == 130
    assert second.is_alive() and text_of("out2").count("waiting") == 1
    first.kill()
    assert ended(second) == 0
    assert len(digests(text_of("out2"))) == 2
    assert main(*flags, "--resume") == 0
    assert digests(capfd.readouterr().out)["teacher"] == digests(text_of("out2"))["teacher"]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_teacher_that_another_process_finishes_meanwhile_is_used(command, capfd, monkeypatch):
    """Said also by compare, which prints no other notes of its runs."""
    lock = RunDirectory.lock

    def busy_at_first(self):
        if "-teacher-" not in self.path.name:
            return lock(self)
        monkeypatch.setattr(RunDirectory, "lock", lock)
        assert train("--method", "trades") == train("--method", "rslad") == 0
        return False

    monkeypatch.setattr(RunDirectory, "lock", busy_at_first)
    flags = ["--methods", "ard,adaad", "--attacks", "clean", "--no-checks"]
    flags = flags if command == "compare" else []
    assert main(command, *QUICK, *flags) == 0
    text = capfd.readouterr().out
    assert text.count(f"waiting for another process, which trains {the_run('teacher')}\n") == 1
    assert text.count("teacher by trades") == 1


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_a_second_process_is_refused(teacher, capfd, start):
    """In one test, for both need a process that hangs in a step."""
    flags = [*LONGER, "--teacher", teacher]
    process = start(*flags, hold=2)
    until(held.exists)
    refused(capfd, 2, "holds a run with these settings (running)", "--resume", *flags)
    refused(capfd, 7, "another process is at work", "--out", *flags, "--resume")
    assert (the_run() / "STATUS").read_text() == "running\n"
    os.kill(process.pid, signal.SIGINT)
    until(lambda: "a second signal" in text_of("err"))
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    assert ended(process, 10) == 130
    assert "Traceback" not in text_of("err")
    assert main(*flags, "--resume") == 0


@pytest.mark.slow
def test_output_into_head_is_quiet_and_ends_the_run_with_its_step_saved(teacher, start):
    os.mkfifo("pipe")
    process = start(*LONGER, "--teacher", teacher, out="pipe", hold=3)
    with open("pipe") as pipe:
        assert pipe.readline().startswith("seed 0")
        until(held.exists)
    go.touch()
    assert ended(process) == 128 + signal.SIGPIPE and text_of("err") == ""
    assert (the_run() / "STATUS").read_text() == "interrupted\n"


@pytest.mark.slow
def test_progress_that_nobody_reads_does_not_end_a_run_with_json(teacher, start):
    os.mkfifo("pipe")
    process = start(*LONGER, "--teacher", teacher, "--json", err="pipe")
    with open("pipe") as pipe:
        assert pipe.readline().startswith("seed 0")
    process.join(60)
    assert process.exitcode == 0
    assert strict_json(text_of("out"))["run"] == str(the_run())


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["out", "err", "both"])
def test_streams_that_are_closed_lose_no_result(closed, teacher, start, tmp_path):
    """A file that got the number of stderr would take what libraries in C print there."""
    streams = {"out": {"out": None}, "err": {"err": None}, "both": {"out": None, "err": None}}
    process = start("train", *QUICK, "--teacher", teacher, "--json", **streams[closed])
    process.join(60)
    assert process.exitcode == 0, text_of("err")
    result = json.loads((the_run() / "result.json").read_text())
    if closed == "err":
        assert strict_json(text_of("out")).items() >= result.items()
    if closed == "out":
        assert "student by absld" in text_of("err")
    assert digest(load(the_run() / "best.pt")["model"]) == result["student_sha256"]


def write_to_all_streams_in(folder):
    """Close the standard streams of this child process; exit with 0 if a file stays empty."""
    os.chdir(folder)
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = None
    with standard_streams(), open("file", "wb") as file:
        number = file.fileno()
        subprocess.run(["sh", "-c", "read line; echo out; echo err >&2"])
        os.write(2, b"from a library")
        print("from Python", file=sys.stderr)
    os._exit(0 if number > 2 and Path("file").read_bytes() == b"" else 1)


def test_a_file_never_gets_the_number_of_a_closed_stream():
    process = processes.Process(target=write_to_all_streams_in, args=(os.getcwd(),))
    process.start()
    assert ended(process) == 0


def test_a_letter_that_stdout_lacks_is_escaped(monkeypatch):
    with open("latin", "w", encoding="latin-1") as latin:
        monkeypatch.setattr(sys, "stdout", latin)
        with standard_streams():
            say("été 日本", sys.stdout)
    assert Path("latin").read_text(encoding="latin-1") == "été \\u65e5\\u672c\n"


def test_what_cannot_be_written_in_the_end_is_dropped(monkeypatch):
    """Otherwise Python would end with exit code 120."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with standard_streams():
            full.write("a result")
        full.flush()


def test_json_on_a_full_disk_is_an_error(teacher, capfd, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert train("--teacher", teacher, "--json") == 1
    assert "No space left on device" in capfd.readouterr().err
    assert (the_run() / "result.json").exists()


def test_json_is_all_of_stdout_whatever_a_network_prints(capfd):
    """Python, a child process, and a library that writes to file 1."""
    prints = "import os\nprint('py')\nos.system('echo child')\nos.write(1, b'lib\\n')\n"
    module = module_of(prints + NETWORKS)
    assert train("--method", "trades", "--student", f"{module}:plain", "--json") == 0
    printed = capfd.readouterr()
    assert strict_json(printed.out)["classes"] == list("0123456789")
    assert {"py", "child", "lib"} <= set(printed.err.splitlines())


def test_a_terminal_that_is_gone_does_not_end_a_training(teacher, capfd, monkeypatch):
    monkeypatch.setattr("absld.cli.view.say", failing(OSError(5, "Input/output error")))
    assert train("--teacher", teacher) == 0
    assert len(digests(capfd.readouterr().out)) == 2


@pytest.mark.slow
def test_piped_output_is_plain(teacher, start):
    """No escape codes, and not a letter but what is said, in 40 columns, too."""
    environment = {"NO_COLOR": "1", "COLUMNS": "40", "TERM": "xterm-256color"}
    assert ended(start("train", *QUICK, "--teacher", teacher, **environment)) == 0
    text = text_of("out")
    assert text_of("err") == "" and "\x1b" not in text and "\r" not in text
    assert len(digests(text)) == 2 and "━" not in text
    tables = [line for line in text.splitlines() if ": " not in line]  # notes may be longer
    assert len(tables) > 15 and max(map(len, tables)) <= 80
    flags = ["train", *QUICK, "--teacher", teacher, "--json", "--resume"]
    assert ended(start(*flags, out="json", **environment)) == 0
    assert strict_json(text_of("json"))["student_sha256"] == digests(text)["student"]


@pytest.mark.slow
def test_a_terminal_of_a_process_shows_a_live_run(teacher, start):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    flags = [*LONGER, "--teacher", teacher]
    terminal = {"out": os.ttyname(slave), "TERM": "xterm-256color", "NO_COLOR": ""}
    process = start(*flags, hold=4, **terminal)  # long enough for the region to be drawn
    text = b""
    while process.is_alive() or select.select([master], [], [], 0)[0]:
        if select.select([master], [], [], 0.05)[0]:
            text += os.read(master, 65536)
        if b"student 2/8" in text:
            go.touch()
    os.close(master)
    os.close(slave)
    assert ended(process) == 0, text_of("err")
    plain = check_live_text(text.decode(), "student 2/8", epochs=8)
    assert len(digests(plain)) == 2


@pytest.mark.slow
def test_python_m_absld_trains_on_all_the_digits(single_thread):
    """Nothing in place of anything: as a person starts it."""
    environment = single_thread | {"PYTHONPATH": SOURCE, "NO_COLOR": "1", "COLUMNS": "40"}
    command = [sys.executable, "-m", "absld", "train", *QUICK]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, "")
    assert len(digests(run.stdout)) == 2 and "\x1b" not in run.stdout
    assert {path.name.split("-")[1] for path in Path("runs").glob("digits-*")} == {
        "teacher",
        "absld",
    }


def test_json_is_ascii_so_any_terminal_can_print_it(tmp_path, capfd):
    folder = make_folder(tmp_path / "images", classes=("café", "x😀"), train=31)
    flags = ["--dataset", "folder", "--data", folder, "--image-size", "8", "--json"]
    assert train(*flags, "--student", "convnet", "--teacher-model", "convnet") == 0
    output = capfd.readouterr().out
    assert output.isascii() and json.loads(output)["classes"] == ["café", "x😀"]


# --- Texts from outside ---

HOSTILE = ("a\x1b[31m", "b\nb", "c\u202ed", "e\u2066", ":cat:", "[red]")
SHOWN = (r"a\x1b[31m", r"b\nb", r"c\u202ed", r"e\u2066", ":cat:", "[red]")


def no_control(text):
    return all(letter.isprintable() or letter in "\n\N{NBSP}" for letter in text)


@pytest.mark.parametrize("live", [False, True])
def test_hostile_names_are_escaped_by_every_command(live, tmp_path, capfd, monkeypatch):
    """Also where the live region would take them for markup or an emoji."""
    data = make_folder(tmp_path / "da\x1bta", HOSTILE, train=8)
    if live:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", "150")
        monkeypatch.setattr(Live, "update", functools.partialmethod(Live.update, refresh=True))
    folder = ["--dataset", "folder", "--data", data, "--image-size", "8"]
    flags = [*folder, "--student", "convnet", "--teacher-model", "convnet", "--out", "o\x1but"]
    assert train(*flags, "--batch-size", 8, "--attack-steps", 1) == 0
    (run,) = Path("o\x1but").glob("folder-absld-*")
    assert main("evaluate", run, "--attacks", "fgsm", "--no-checks", "--device", "cpu") == 0
    main("teacher", "check", run, "--device", "cpu")
    assert main("report", run) == 0
    (data / "test" / HOSTILE[0] / "bad\x1b.png").write_text("no image")
    assert main("evaluate", run, "--attacks", "clean", "--device", "cpu") == 3
    printed = capfd.readouterr()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", printed.out).replace("\r", "\n")
    assert no_control(plain) and no_control(printed.err)
    for name in SHOWN:
        assert plain.count(f"\n{name} ") >= 3, name
    assert r"o\x1but" in plain and r"bad\x1b.png" in printed.err


def test_a_live_row_shows_markup_as_text():
    console = Console(width=100)
    with console.capture() as capture:
        console.print(progress_row("[/] [red]x :cat:", 1, 2, "a\x1b[0m"))
    assert "[/] [red]x :cat:" in capture.get() and r"a\x1b[0m" in capture.get()


@pytest.mark.parametrize("flag", ["--data", "--out", "--teacher"])
def test_a_path_of_other_bytes_than_utf_8_is_refused_before_a_run_begins(flag, capfd):
    refused(capfd, 2, r"takes a text, not 'im\udcff'", "", "train", *QUICK, flag, "im\udcff")
    assert not list(Path().glob("runs/*"))


def test_an_evaluation_of_a_path_of_other_bytes_than_utf_8_is_not_lost(teacher, capfd):
    """It is refused, or shown and stored with the bytes escaped."""
    shutil.copy(teacher, "b\udcff.pt")
    flags = ["evaluate", "b\udcff.pt", "--dataset", "digits", "--attacks", "clean"]
    assert main(*flags, "--no-checks", "--device", "cpu") == 0
    (path,) = Path().glob("**/evaluation.json")
    assert json.loads(path.read_bytes())["network"]["target"] == r"b\udcff.pt"
    assert main("report", path) == 0
    page = path.with_name("report.html").read_text(encoding="utf-8")
    assert r"b\udcff.pt" in page


def test_a_traceback_is_escaped(capfd):
    assert main("--debug", "train", "--recipe", "no\x1bne.toml") == 2
    text = capfd.readouterr().err
    assert "Traceback" in text and r"no\x1bne.toml" in text and no_control(text)
