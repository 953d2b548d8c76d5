"""python absld_min.py: flags, output, bad input and its exit codes, interruption."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_data import make_folder

import absld_min
from absld_min import build_model

SCRIPT = str(Path(absld_min.__file__))
QUICK = ["--epochs", "1", "--teacher-epochs", "1", "--max-steps", "2", "--allow-weak-teacher"]
QUICK += ["--device", "cpu"]


def main(*flags):
    """The program in this process: its exit code."""
    try:
        absld_min.main([*map(str, flags)])
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def digests(text):
    return dict(re.findall(r"^(teacher|student) sha256: ([0-9a-f]{64})$", text, re.MULTILINE))


def refused(capsys, code, cause, way_out, *flags):
    assert main(*flags) == code
    printed = capsys.readouterr()
    last = printed.err.strip().splitlines()[-2:]
    assert "Traceback" not in printed.err
    assert cause in last[0] and way_out in last[1], printed.err
    assert not digests(printed.out)


# --- The main job ---


def test_output(capsys):
    assert main(*QUICK, "--seed", 3) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"seed 3, device cpu, torch {torch.__version__}\n")
    columns = [
        "epoch",
        "lr",
        "loss",
        "clean",
        "robust",
        "worst",
        "NSD",
        "temperatures",
        "seconds",
        "images/s",
    ]
    rows = [line.split() for line in text.splitlines()]
    assert rows.count(columns) == 2  # teacher and student
    epochs = [row for row in rows if len(row) == len(columns) + 2 and row[0] == "1"]
    assert len(epochs) == 2 and all(row[8] == "-" for row in epochs)
    (student,) = Path("runs").glob("student*")
    assert [str(student)] in rows
    assert [row[0] for row in rows if len(row) == 3 and row[0].isdigit()] == list("0123456789")
    assert rows[-2][:2] == ["teacher", "sha256:"] and rows[-1][:2] == ["student", "sha256:"]
    assert len(digests(text)) == 2
    assert {"average", "worst", "NSD"} <= {row[0] for row in rows}


def test_same_flags_same_digests_and_the_teacher_is_used_again(capsys):
    assert main(*QUICK) == 0
    first = capsys.readouterr().out
    assert main(*QUICK) == 0
    second = capsys.readouterr().out
    assert digests(second) == digests(first)
    assert (first.count("epoch "), second.count("epoch ")) == (2, 1)
    assert len(list(Path("runs").iterdir())) == 2
    assert main(*QUICK, "--out", "elsewhere") == 0
    assert digests(capsys.readouterr().out) == digests(first)


def test_a_teacher_made_otherwise_is_not_used_again(capsys):
    """Neither one of other flags, nor one whose training was cut short."""
    made = set()
    for flags in ([], ["--seed", 1], ["--epsilon", "0.05"], ["--batch-size", 64]):
        assert main(*QUICK, *flags) == 0
        made.add(digests(capsys.readouterr().out)["teacher"])
    assert len(made) == 4
    for path in Path("runs").glob("teacher*"):
        path.rename(f"{path}.best")
    assert main(*QUICK) == 0
    assert capsys.readouterr().out.count("epoch ") == 2


def test_rslad_and_both_readings_share_a_teacher_and_keep_three_students(capsys):
    for flags in (["--temperature-rate", "0"], [], ["--fidelity", "released"]):
        assert main(*QUICK, *flags) == 0
    names = sorted(path.name for path in Path("runs").iterdir())
    assert [name.split("-")[0] for name in names] == ["student"] * 3 + ["teacher"]


def test_a_folder_of_images_with_a_teacher_from_a_file(tmp_path, capsys):
    root = make_folder(tmp_path / "ein Ordner für Bilder")
    torch.save({"model": build_model("convnet", 2, "mine").state_dict()}, "teacher é.pt")
    flags = ["--dataset", "folder", "--data", root, "--teacher", "teacher é.pt", "--batch-size", 4]
    flags += ["--student", "convnet", "--teacher-model", "convnet", "--out", "Läufe hier"]
    assert main(*QUICK, *flags) == 0
    text = capsys.readouterr().out
    assert digests(text)["teacher"] == absld_min.digest(
        build_model("convnet", 2, "mine").state_dict()
    )
    assert "\ncat " in text and "\ndog " in text
    assert [p.name.split("-")[0] for p in Path("Läufe hier").iterdir()] == ["student"]


@pytest.mark.parametrize("student", ["convnet", "resnet18"])
def test_choice_of_student(student, monkeypatch):
    sets, classes = absld_min.load_data(absld_min.Config(device="cpu"))
    few = [[tensor[:50] for tensor in data] for data in sets]
    monkeypatch.setattr(absld_min, "load_data", lambda config: (few, classes))
    assert main(*QUICK, "--student", student, "--batch-size", 8, "--max-steps", 1) == 0
    (path,) = Path("runs").glob("student*")
    names = torch.load(path, weights_only=True)["model"].keys()
    assert ("layer4.1.conv2.weight" in names) == (student == "resnet18")


def test_choice_of_epochs_and_steps(monkeypatch):
    seen = []
    for name in ("train_teacher", "train"):
        monkeypatch.setattr(absld_min, name, lambda config, *_: seen.append(config))
    flags = "--epochs 7 --teacher-epochs 5 --max-steps 9 --batch-size 32 --seed 4"
    assert main(*flags.split(), "--allow-weak-teacher") == 0
    config = seen[-1]
    found = config.epochs, config.teacher_epochs, config.max_steps, config.batch_size, config.seed
    assert found == (7, 5, 9, 32, 4)


def parsed(monkeypatch, *flags):
    seen = []
    monkeypatch.setattr(absld_min, "load_data", lambda config: seen.append(config) or 1 / 0)
    assert main("--device", "cpu", *flags) == 3
    return seen[0]


def test_defaults_are_those_of_the_data_set(monkeypatch):
    digits = parsed(monkeypatch)
    assert (digits.student, digits.teacher_model, digits.epsilon) == ("convnet", "convnet", 0.1)
    cifar = parsed(monkeypatch, "--dataset", "cifar10")
    assert (cifar.student, cifar.teacher_model, cifar.epochs) == ("resnet18", "wrn-34-10", 300)
    assert (cifar.epsilon, cifar.batch_size, cifar.temperature_rate) == (8 / 255, 128, 0.1)
    assert (cifar.teacher_epochs, cifar.fidelity, cifar.seed) == (76, "paper", 0)
    assert parsed(monkeypatch, "--epochs", "2").teacher_epochs == digits.teacher_epochs


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.031", 0.031), ("0", 0.0)])
def test_epsilon_as_a_fraction_or_a_number(text, value, monkeypatch):
    assert parsed(monkeypatch, "--epsilon", text).epsilon == value


def test_help_lists_every_flag(capsys):
    assert main("--help") == 0
    text = capsys.readouterr().out
    for flag in ["dataset", "data", "teacher", "student", "teacher-model", "epochs", "teacher-epochs", "batch-size", "temperature-rate", "fidelity", "seed", "device", "out"]:  # fmt: skip
        assert f"--{flag} " in text


# --- Bad input: exit code, one line with the cause, one with the way out ---

USAGE = [
    ["--epsilon", "2"], ["--epsilon", "nan"], ["--epsilon", "-1"], ["--epsilon", "8/0"],
    ["--epsilon", "much"], ["--temperature-rate", "-0.1"], ["--temperature-rate", "nan"], ["--temperature-rate", "1e39"], ["--epsilon", "1e99999999"],
    ["--device", "meta"],
    ["--epochs", "0"], ["--teacher-epochs", "-1"], ["--batch-size", "0"], ["--epochs", "2.5"],
    ["--dataset", "imagenet"], ["--student", "vgg"], ["--fidelity", "free"], ["--epoch", "3"],
    ["--no-such-flag"], ["--device", "cuda:99"], ["--device", "toaster"], ["--max-steps", "0"],
]  # fmt: skip


@pytest.mark.parametrize("flags", USAGE, ids=" ".join)
def test_usage(flags, capsys):
    refused(capsys, 2, "", "", *flags)
    assert Path("runs").exists() is False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda(capsys):
    refused(capsys, 2, "error: ", "--device cpu", "--device", "cuda")


def test_out_that_is_a_file(capsys):
    Path("runs").write_text("here already")
    refused(capsys, 2, "runs", "--out", "--device", "cpu")


def test_no_such_data(capsys):
    refused(
        capsys, 3, "nowhere", "in nowhere: {train,test}", "--dataset", "folder", "--data", "nowhere"
    )


def test_no_data_and_no_network(capsys, monkeypatch):
    """The real loader of torchvision, with a network that is not there."""

    def urlopen(*args, **settings):
        raise OSError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    start = time.monotonic()
    refused(capsys, 3, "Name or service", "in images here: {train,test}", "--dataset", "cifar10",
            "--data", "images here")  # fmt: skip
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("fault", ["empty class", "unreadable", "one class", "differ"])
def test_faulty_folder(fault, tmp_path, capsys):
    root = make_folder(
        tmp_path / "images", classes=["cat"] if fault == "one class" else ["cat", "dog"]
    )
    if fault == "empty class":
        (root / "test" / "eel").mkdir()
    if fault == "unreadable":
        (root / "test" / "cat" / "bad.jpg").write_text("no image")
    if fault == "differ":
        (root / "test" / "dog").rename(root / "test" / "wolf")
    named = {"empty class": "eel", "unreadable": "bad.jpg", "one class": "cat", "differ": "wolf"}
    refused(capsys, 3, named[fault], "CLASS", "--dataset", "folder", "--data", root)


def test_batch_larger_than_the_data(capsys):
    refused(capsys, 3, "1018 training images", "", "--batch-size", "2000")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"text", b"PK\3\4 truncated"])
def test_teacher_file_that_is_none(content, capsys):
    Path("teacher.pt").write_bytes(content)
    said = repr(content[:20]) if content else "b''"
    refused(capsys, 4, f"teacher.pt: no state dict, or half of one, but {said}", "weights",
            "--teacher", "teacher.pt")  # fmt: skip


def test_teacher_file_that_is_missing(capsys):
    refused(capsys, 4, "none.pt", "weights", "--teacher", "none.pt")


def test_teacher_of_another_architecture_and_of_other_classes(capsys):
    torch.save(build_model("resnet18", 10).state_dict(), "teacher.pt")
    refused(capsys, 4, "nearest: resnet18", "--teacher-model", "--teacher", "teacher.pt")
    torch.save(build_model("convnet", 100).state_dict(), "teacher.pt")
    refused(capsys, 4, "[100, 64]", "weights", "--teacher", "teacher.pt")


def test_teacher_file_with_keys_that_are_no_names(capsys):
    state = build_model("convnet", 10).state_dict()
    torch.save(dict(enumerate(state.values())), "teacher.pt")
    refused(capsys, 4, "no state dict", "weights", "--teacher", "teacher.pt")


def test_a_library_or_a_build_without_the_device(capsys, monkeypatch):
    def zeros(*args, **settings):
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(capsys, 3, "sklearn", "", "--device", "cpu")
    monkeypatch.setattr(torch, "zeros", zeros)
    refused(capsys, 2, "not compiled with CUDA", "--device cpu", "--device", "cuda")


def test_students_of_other_flags_do_not_replace_each_other():
    for flags in ([], ["--epsilon", "0.05"], ["--fidelity", "released"]):
        assert main(*QUICK, "--batch-size", 8, "--max-steps", 1, *flags) == 0
    assert len(list(Path("runs").glob("student*"))) == 3


def test_folder_that_takes_no_files_is_found_before_training(capsys, monkeypatch):
    def refuse(*args, **settings):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    refused(capsys, 2, "not permitted", "--out", "--device", "cpu")


def test_class_names_that_the_terminal_cannot_show(tmp_path, single_thread):
    root = make_folder(tmp_path / "images", classes=["cat", "日本"])
    flags = ["--dataset", "folder", "--data", str(root), "--student", "convnet"]
    flags += ["--teacher-model", "convnet", "--batch-size", "4"]
    child = start(single_thread | {"PYTHONIOENCODING": "ascii"}, *QUICK, *flags)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, "") and "\\u65e5\\u672c" in out


def test_teacher_near_chance(capsys):
    torch.save(build_model("convnet", 10).state_dict(), "teacher.pt")
    refused(capsys, 4, "near chance", "longer training", "--teacher", "teacher.pt")
    assert main(*QUICK, "--teacher", "teacher.pt") == 0


def test_loss_that_is_not_finite(capsys, monkeypatch):
    loss = absld_min.absld_loss
    monkeypatch.setattr(absld_min, "absld_loss", lambda *z: loss(*z) * float("nan"))
    refused(capsys, 5, "epoch=1 step=0 loss=tensor(nan", "*.best", *QUICK)


def test_out_of_memory(capsys, monkeypatch):
    def train_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 20 GiB")

    monkeypatch.setattr(absld_min.train, "__defaults__", (train_step,))
    refused(capsys, 1, "out of memory. Tried to allocate 20 GiB", "--batch-size", *QUICK)


def test_disk_that_is_full(capsys, monkeypatch):
    def save(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    refused(capsys, 4, "No space left", "", *QUICK)
    assert list(Path("runs").iterdir()) == []


# --- A process of its own: signals, pipes, the terminal ---


def start(environment, *flags, **settings):
    command = [sys.executable, "-u", SCRIPT, *flags]
    return subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_only_whole_files(number, code, single_thread):
    child = start(single_thread, "--device", "cpu")
    for line in child.stdout:
        if line.split()[:1] == ["2"]:  # the second epoch of the teacher has been saved
            break
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in err
    (path,) = Path("runs").iterdir()
    assert path.name.startswith("teacher") and path.name.endswith(".best")
    assert len(torch.load(path, weights_only=True)["history"]) >= 1


def test_output_into_head(single_thread):
    child = start(single_thread, *QUICK)
    child.stdout.readline()
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=60) != 0 and err == ""
    child.stderr.close()


@pytest.mark.parametrize("columns", ["40", "80"])
def test_plain_text_when_piped(columns, single_thread):
    child = start(single_thread | {"COLUMNS": columns, "NO_COLOR": "1"}, *QUICK)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0 and err == ""
    assert "\x1b" not in out and len(digests(out)) == 2
    assert max(map(len, out.splitlines())) <= 100


def test_killed_while_saving_leaves_no_half_file(single_thread):
    """The process dies in the middle of writing: nothing has a final name, and the next run works."""
    code = (
        "import os, absld_min, torch\n"
        "def save(content, path):\n"
        "    open(path, 'wb').write(b'half'); os.kill(os.getpid(), 9)\n"
        f"torch.save = save; absld_min.main({QUICK})"
    )
    child = subprocess.run([sys.executable, "-c", code], env=single_thread, capture_output=True)
    assert child.returncode == -9
    assert not [path for path in Path("runs").iterdir() if path.is_file()]
    assert main(*QUICK) == 0
