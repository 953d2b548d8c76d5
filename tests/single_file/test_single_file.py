"""absld_min.py as a text and as a program: what a reader is promised, and what a run prints."""

import ast
import inspect
import pickle
import re
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers.image_files import make_cifar
from helpers.weight_files import Payload

import absld_min
from absld import digest

PATH = Path(absld_min.__file__)
ROOT = PATH.parent
TEXT = PATH.read_text(encoding="utf-8")
LINES = TEXT.splitlines()
TREE = ast.parse(TEXT)
QUICK = ["--epochs", "1", "--teacher-epochs", "1", "--device", "cpu"]


# --- The text ---


def test_the_file_has_at_most_360_lines():
    assert len(LINES) <= 360
    assert max(map(len, LINES)) <= 100


@pytest.mark.parametrize("check", [["format", "--check"], ["check"]], ids=["format", "lint"])
def test_it_keeps_the_rules_of_the_project(check):
    pytest.importorskip("ruff")  # comes with the dependency group `dev`
    command = [sys.executable, "-m", "ruff", *check, "--no-cache", PATH.name]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_rule_exempts_it():
    """Neither in the project's file nor by comments, but where torch has no types."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    for name in ("ruff", "mypy"):
        assert "absld_min" not in repr(tools[name])
    assert not re.search(r"noqa|fmt: |ruff: |mypy: |pragma", TEXT)
    ignored = re.findall(r"(\S+)  # type: ignore\[([\w-]+)\]", TEXT)
    assert ignored == [("loss.backward()", "no-untyped-call"), ("precision", "attr-defined")]


def test_imports_are_the_standard_library_and_the_project_s_dependencies():
    roots = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names == {"torch", "torchvision", "sklearn"}


def test_everything_is_annotated_and_says_what_it_is():
    """Every function has types; every one that is not a method says what it returns or does."""
    for node in ast.walk(TREE):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments += [node.args.vararg] if node.args.vararg else []
            assert node.returns and all(a.annotation for a in arguments if a.arg != "self")
    for node in TREE.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = ast.get_docstring(node).splitlines()[0]
            assert first.endswith((".", "NSD"))
            if isinstance(node, ast.FunctionDef):
                assert first.split()[0] in {"Return", "Yield", "Train"}, first
    tensors = [n for n in TREE.body if isinstance(n, ast.FunctionDef) and "Tensor" in ast.dump(n)]
    for node in tensors:
        assert re.search(r"\(.*[NC].*\)|scalar", ast.get_docstring(node)) or node.name in {
            "absld_loss", "load_data", "train", "trades_step", "batches",
        }, node.name  # fmt: skip


def test_every_step_is_tagged_where_it_is_computed():
    functions = {
        name: "".join(LINES[node.lineno - 1 : node.end_lineno])
        for node in TREE.body
        if (name := getattr(node, "name", None))
    }
    homes = {
        "D1": "soften", "D2": "pgd", "D3": "absld_step", "D4": "absld_loss",
        "D5": "class_risk_sums", "D6": "update_temperature", "D7": "train",
    }  # fmt: skip
    tags = re.findall(r"# (D\d)\b", TEXT)
    assert sorted(set(tags)) == sorted(homes)
    for tag, home in homes.items():
        assert functions[home].count(f"# {tag}") == tags.count(tag) > 0, tag
    described = re.findall(r"^  (D\d)  ", TEXT, re.MULTILINE)
    assert described == sorted(homes)


def test_the_parts_are_in_the_agreed_order():
    parts = [
        "class Config", "def generator", "# --- Soft labels and loss", "def soften",
        "def soft_label_kl", "def absld_loss", "# --- Attacks", "def pgd", "def training_attack",
        "# --- Class temperatures", "def class_risk_sums", "def update_temperature",
        "# --- Networks", "def build_model", "# --- Data", "def load_data", "def batches",
        "# --- Evaluation", "def fairness", "def evaluate", "# --- Training", "def absld_step",
        "def trades_step", "def train(", "def main",
    ]  # fmt: skip
    places = [TEXT.index(f"\n{part}") for part in parts]
    assert places == sorted(places)


def test_no_global_state_and_no_cuda_calls():
    assert (
        ".cuda(" not in TEXT and "manual_seed_all" not in TEXT and "torch.manual_seed" not in TEXT
    )
    assert not re.search(r"^\s*global ", TEXT, re.MULTILINE)


def test_pairs_have_the_agreed_arguments():
    agreed = {
        "soften": ["teacher_logits", "labels", "temperature"],
        "soft_label_kl": ["logits", "soft_labels", "reduction"],
        "absld_loss": [
            "adv_logits", "nat_logits", "soft_adv", "soft_nat", "adv_weight", "kl_scale",
        ],
        "pgd": ["forward", "objective", "x_nat", "noise", "epsilon", "step_size", "steps"],
        "class_risk_sums": ["logits", "labels", "num_classes"],
        "update_temperature": ["temperature", "class_risk", "rate", "lower", "upper"],
        "fairness": ["class_accuracy", "ddof"],
    }  # fmt: skip
    for name, arguments in agreed.items():
        ours, theirs = (
            inspect.signature(inspect.unwrap(getattr(module, name))).parameters
            for module in (absld_min, __import__("absld"))
        )
        assert list(ours) == arguments
        shared = [argument for argument in arguments if argument != "reduction"]
        assert list(theirs)[: len(shared)] == shared
        for argument in shared:
            assert ours[argument].kind == theirs[argument].kind
            assert ours[argument].default == theirs[argument].default


def test_importing_has_no_side_effect(tmp_path, single_thread):
    """Nothing printed or written, no generator and no setting of torch touched."""
    code = """
import random, sklearn.datasets, sklearn.model_selection, torch, torchvision.datasets
state, default = torch.get_rng_state(), random.getstate()
dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
precision = torch.backends.cuda.matmul.fp32_precision
import absld_min
assert torch.equal(torch.get_rng_state(), state) and random.getstate() == default
assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
assert torch.backends.cuda.matmul.fp32_precision == precision
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=single_thread, capture_output=True
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


# --- The program ---


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch, settings_of_torch):
    monkeypatch.chdir(tmp_path)


def weights(path):
    return torch.load(path, weights_only=True)


def test_a_run_prints_its_epochs_and_class_table(capsys):
    absld_min.main([*QUICK, "--seed", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"seed 3, device cpu, torch {torch.__version__}"
    columns = ["epoch", "loss", "clean", "robust", "worst", "NSD", "temperatures"]
    rows = [line.split() for line in lines]
    assert [row for row in rows[1:3]] == [["teacher"], columns]
    assert [row for row in rows[4:6]] == [["student"], columns]
    for row in (rows[3], rows[6]):
        assert row[0] == "1" and len(row) == len(columns) + 2
        assert all(figure.endswith("%") for figure in row[2:6])
        assert row[6:] == ["1.00", "-", "1.00"]  # the rate has decayed: all milestones are over
    assert rows[7] == ["class", "clean", "PGD-20"]
    names = [row[0] for row in rows[8:]]
    assert names == [*"0123456789", "average", "worst", "NSD"]
    assert max(map(len, lines)) <= 80
    classes = [[float(figure.rstrip("%")) for figure in row[1:]] for row in rows[8:18]]
    average = [float(figure.rstrip("%")) for figure in rows[18][1:]]
    means = [sum(column) / 10 for column in zip(*classes, strict=True)]
    assert average == pytest.approx(means, abs=0.01)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["student.pt", "teacher.pt"]
    for path in Path("runs").iterdir():
        assert weights(path).keys() == absld_min.build_model("convnet", 10).state_dict().keys()


def test_known_figures_are_printed_in_their_columns(monkeypatch, capsys):
    """Losses, accuracies and temperatures that are known, in their columns."""
    accuracy = torch.full((2, 10), 0.5)
    accuracy[0, 0], accuracy[1, 3] = 1.0, 0.0

    def step(config, student, teacher, temperature, batch):
        loss = sum(weight.sum() for weight in student.parameters()) * 0 + 2.5
        return loss, torch.arange(20.0).view(2, 10), torch.ones(10)

    monkeypatch.setattr(absld_min, "absld_step", step)
    monkeypatch.setattr(absld_min, "evaluate", lambda *given: accuracy)
    torch.save(absld_min.build_model("convnet", 10).state_dict(), "teacher.pt")
    absld_min.main(["--teacher", "teacher.pt", "--epochs", "30", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[3:33]]
    # Average 0.45, its deviation 0.15 under attack; temperatures move by 0.1 an epoch, in the mean.
    assert rows[0] == ["1", "2.5000", "55.0%", "45.0%", "0.0%", "33.3%", "0.90", "-", "1.10"]
    assert rows[4][6:] == ["0.50", "-", "1.50"] and rows[20][6:] == ["0.50", "-", "3.10"]
    table = {name: figures for name, *figures in (line.rsplit(maxsplit=2) for line in lines[34:])}
    assert table["0"] == ["100.00%", "50.00%"] and table["3"] == ["50.00%", "0.00%"]
    assert table["average"] == ["55.00%", "45.00%"] and table["worst class"] == ["50.00%", "0.00%"]
    assert table["NSD"] == ["27.27%", "33.33%"]


def test_a_teacher_from_a_file_teaches_as_one_that_was_just_trained():
    absld_min.main([*QUICK, "--out", "first"])
    absld_min.main([*QUICK, "--out", "second", "--teacher", "first/teacher.pt"])
    assert digest(weights("first/student.pt")) == digest(weights("second/student.pt"))
    assert [path.name for path in Path("second").iterdir()] == ["student.pt"]
    # As from several GPUs, and with a group that is not used, as in TRADES' published teacher.
    state = weights("first/teacher.pt")
    unused = {f"sub_block1.layer.{n}.weight": torch.zeros(1) for n in range(2)}
    torch.save({f"module.{key}": value for key, value in (state | unused).items()}, "trades.pt")
    absld_min.main([*QUICK, "--out", "third", "--teacher", "trades.pt"])
    assert digest(weights("first/student.pt")) == digest(weights("third/student.pt"))


@pytest.mark.parametrize(
    ("dataset", "images"),
    [("cifar10", 4), pytest.param("cifar100", 20, marks=pytest.mark.slow)],
)
def test_cifar_is_read_from_its_published_archive(dataset, images, tmp_path, monkeypatch, capsys):
    names = make_cifar(tmp_path / "data", dataset, monkeypatch, train=images, test=1)
    flags = ["--dataset", dataset, "--student", "convnet", "--teacher-model", "convnet"]
    absld_min.main([*QUICK, *flags])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(maxsplit=2)[0] for line in lines[-len(names) - 3 : -3]] == names
    assert weights("runs/student.pt")["linear.weight"].shape == (len(names), 64)


def parsed(monkeypatch, *flags):
    seen = []
    monkeypatch.setattr(absld_min, "load_data", lambda config: seen.append(config) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        absld_min.main(list(flags))
    return seen[0]


def test_defaults_are_those_of_the_data_set(monkeypatch):
    digits = parsed(monkeypatch)
    assert (digits.student, digits.teacher_model, digits.epsilon) == ("convnet", "convnet", 0.1)
    assert (digits.epochs, digits.teacher_epochs, digits.padding, digits.flip) == (40, 30, 1, 0.0)
    cifar = parsed(monkeypatch, "--dataset", "cifar10")
    assert cifar == absld_min.Config(dataset="cifar10")
    assert parsed(monkeypatch, "--epochs", "2").teacher_epochs == digits.teacher_epochs
    given = parsed(monkeypatch, "--dataset", "cifar100", "--epsilon", "0.1", "--seed", "5")
    assert (given.dataset, given.epsilon, given.seed, given.epochs) == ("cifar100", 0.1, 5, 300)
    given = parsed(monkeypatch, "--fidelity", "released", "--temperature-rate", "0")
    assert (given.fidelity, given.temperature_rate, given.epochs) == ("released", 0.0, 40)


@pytest.mark.parametrize(("flag", "inside"), [("tf32", "tf32"), ("fp32", "ieee")])
def test_precision_is_said_explicitly(flag, inside, monkeypatch):
    parsed(monkeypatch, "--precision", flag)
    assert torch.backends.cuda.matmul.fp32_precision == inside
    assert torch.backends.cudnn.conv.fp32_precision == inside
    assert torch.backends.cudnn.deterministic


def test_help_has_the_algorithm_and_every_flag_with_its_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        absld_min.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and absld_min.__doc__.strip() in text
    for field in fields(absld_min.Config):
        assert f"--{field.name.replace('_', '-')} " in text
    assert re.search(r"--epochs EPOCHS\s+default: 300, for digits 40", text)


@pytest.mark.parametrize(
    "flags", [["--epochs", "2.5"], ["--dataset", "mnist"], ["--student", "vgg"], ["--no-such"]]
)
def test_a_wrong_flag_is_named(flags, capsys):
    with pytest.raises(SystemExit) as end:
        absld_min.main(flags)
    assert end.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_file_of_weights_runs_no_code(tmp_path):
    Path("teacher.pt").write_bytes(pickle.dumps({"a": Payload(tmp_path / "it ran")}, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        absld_min.main([*QUICK, "--teacher", "teacher.pt"])
    assert not (tmp_path / "it ran").exists()


def test_a_teacher_of_another_network_is_refused():
    torch.save(absld_min.build_model("resnet18", 10).state_dict(), "teacher.pt")
    with pytest.raises(RuntimeError, match="Missing key"):
        absld_min.main([*QUICK, "--teacher", "teacher.pt"])
