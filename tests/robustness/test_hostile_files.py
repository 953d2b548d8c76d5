"""Files that mean harm or are broken, given to every command that loads anything.

Each is refused in two lines and with exit code 4 (a recipe: 2), runs nothing, leaves nothing, and
takes no more memory than a file of its size may.
"""

import functools
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from test_checkpoint import Payload, processes
from test_cli import QUICK, load_few, main
from test_cli import in_an_empty_folder_with_few_digits as in_an_empty_folder_with_few_digits
from test_cli import refused as refused
from test_cli import teacher as teacher
from torch import nn

from absld.errors import CheckpointError
from absld.models.architectures import build_model
from absld.storage.checkpoint import load, save

# One for all tests, for a file of the corpus is made once.
PROOF = Path(tempfile.gettempdir()) / f"it ran in {os.getpid()}"


@pytest.fixture(autouse=True)
def few_digits_everywhere(monkeypatch):
    for module in ("evaluation.runner", "runs.comparison"):
        monkeypatch.setattr(f"absld.{module}.load_data", load_few)


def state():
    return build_model("convnet", 10, "hostile").state_dict()


def as_bytes(content, **given):
    file = io.BytesIO()
    torch.save(content, file, **given)
    return file.getvalue()


def compressed():
    """A good archive, whose tensors are zeros, packed."""
    stored = zipfile.ZipFile(io.BytesIO(as_bytes({"model": {"w": torch.zeros(2**22)}})))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry in stored.infolist():
            archive.writestr(entry.filename, stored.read(entry))
    return packed.getvalue()


def holding_itself():
    content = {"epoch": 1}
    content["model"] = content
    return as_bytes(content)


def laughing():
    """Forty lists, each of which holds the one before twice."""
    content = ["ha"]
    for _ in range(40):
        content = [content, content]
    return as_bytes({"model": content})


def changed(name, value):
    return as_bytes({"model": state() | {name: value}, "architecture": "convnet"})


CORPUS = {
    "a payload": (lambda: as_bytes({"model": Payload(PROOF)}), "would run code"),
    "a payload of old": (lambda: pickle.dumps(Payload(PROOF), 2), "would run code"),
    "a whole module": (lambda: as_bytes(build_model("convnet", 10)), "would run code"),
    "an html page": (lambda: b"<!DOCTYPE html><html>sign in</html>", "HTML page"),
    "a text": (lambda: b"just a note", "no checkpoint"),
    "nothing": (lambda: b"", "the file is empty"),
    "half of it": (lambda: as_bytes(state())[:5000], "truncated or damaged"),
    "half of an old one": (
        lambda: as_bytes(state(), _use_new_zipfile_serialization=False)[:5000],
        "no checkpoint",
    ),
    "noise": (lambda: bytes(range(256)) * 40, "no checkpoint"),
    "a zip bomb": (compressed, "would become 16,7"),
    "a tensor that repeats": (
        lambda: as_bytes({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}),
        "repeats the bytes",
    ),
    "one that holds itself": (holding_itself, "holds itself"),
    "a thousand million laughs": (laughing, "holds more than 1,000,000 values"),
    "a number": (lambda: as_bytes(3), "holds int"),
    "no tensors": (lambda: as_bytes({"model": {"w": "text"}}), "not a named tensor"),
    "not finite": (lambda: changed("0.weight", torch.full((16, 3, 3, 3), torch.nan)), "holds NaN"),
    "other classes": (lambda: as_bytes(build_model("convnet", 7).state_dict()), "needed is (10"),
    "another network": (lambda: changed("more", torch.zeros(1)), "has besides ['more']"),
    "complex": (lambda: changed("0.weight", torch.zeros(1) + 1j), "complex64"),
    "sparse": (lambda: changed("0.weight", torch.eye(3).to_sparse()), "sparse"),
}


@functools.cache
def made(kind):
    """The bytes of a file of the corpus."""
    return CORPUS[kind][0]()


EVALUATE = ["--dataset", "digits", "--device", "cpu", "--attacks", "clean", "--no-checks"]
COMMANDS = {
    "train --teacher": ["train", *QUICK, "--teacher", "FILE"],
    "train --student": ["train", *QUICK, "--student", "FILE"],
    "evaluate": ["evaluate", "FILE", "--model", "convnet", *EVALUATE],
    "evaluate --against": ["evaluate", "RUN", "--device", "cpu", "--attacks", "clean", "--no-checks",
                           "--against", "FILE", "--against-model", "convnet"],
    "evaluate RUN": ["evaluate", "BROKEN RUN", "--device", "cpu", "--attacks", "clean", "--no-checks"],
    "teacher check": ["teacher", "check", "FILE", "--model", "convnet", "--dataset", "digits",
                      "--device", "cpu"],
    "teacher bank": ["teacher", "bank", "--teacher", "FILE", "--device", "cpu"],
    "compare": ["compare", "RUN", "BROKEN RUN", "--attacks", "clean", "--no-checks", "--device", "cpu"],
}  # fmt: skip


@pytest.fixture(scope="session")
def runs(tmp_path_factory, teacher):
    """Two finished runs that can be compared."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("absld.runs.training_run.load_data", load_few)
        for method in ("absld", "rslad"):
            assert main("train", *QUICK, "--teacher", teacher, "--method", method) == 0
    return sorted(path.resolve() for path in folder.glob("runs/digits-*"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", CORPUS)
def test_it_is_refused_by(command, kind, runs, capfd):
    said = CORPUS[kind][1]
    for run, copy in zip(runs, ("a run", "a broken run"), strict=True):
        shutil.copytree(run, copy)
    for path in (Path("tëacher.pt"), Path("a broken run") / "best.pt"):
        path.write_bytes(made(kind))
    names = {"FILE": "tëacher.pt", "RUN": "a run", "BROKEN RUN": "a broken run"}
    before = set(Path().rglob("*"))
    out = refused(capfd, 4, said, "", *[names.get(word, word) for word in COMMANDS[command]])
    assert "epoch" not in out and not PROOF.exists()
    left = {path for path in set(Path().rglob("*")) - before if path.is_file()}
    own = {path for path in left if "a run" in path.parts}  # what was evaluated before is kept
    assert not [path for path in left - own if path.suffix in (".pt", ".bank", ".json")], left


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x00\xff", "codec can't decode"),
        (b"epochs = ", "Invalid value"),
        (b"epochs = " + b"[" * 100_000, ""),
        (b"__import__('os').mkdir('it ran')", ""),
        (b"epochs = 99999999999999999999999999999999\nbatch_size = 1e999", "batch_size takes"),
        (b"out = { a = 1 }", "out takes a text"),
    ],
)
def test_recipes(content, said, capfd):
    Path("my recipe.toml").write_bytes(content)
    refused(capfd, 2, said, "", "train", "--recipe", "my recipe.toml")
    assert not Path("it ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"[1]", b'{"schema": "absld-evaluation-1"}'],
)
def test_evaluations_to_report(content, capfd):
    Path("evaluation.json").write_bytes(content)
    refused(capfd, 4, "evaluation.json", "", "report", "evaluation.json")


def test_safetensors_that_lie(capfd):
    """A header of any length, and tensors beyond the end."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}})
    for content in (
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", len(head)) + head.encode() + bytes(8),
        b"\0" * 7,
    ):
        Path("net.safetensors").write_bytes(content)
        flags = [*EVALUATE, "--model", "convnet"]
        refused(capfd, 4, "no whole safetensors file", "", "evaluate", "net.safetensors", *flags)


# --- Memory ---


def load_and_measure(folder, found):
    """The most that this process ever had, before and after all of the corpus."""
    os.chdir(folder)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # MiB

    before = peak()
    for path in sorted(Path().glob("*.pt")):
        try:
            load(path)
        except CheckpointError:
            found.append(path.stem)
    found.append(peak() - before)


def test_no_file_takes_more_memory_than_its_size_tells(tmp_path):
    for name in CORPUS:
        (tmp_path / f"{name}.pt").write_bytes(made(name))
    claims = pickle.dumps(bytearray(8), 2).replace(b"K\x08", b"")  # bytes that are not there
    (tmp_path / "claims.pt").write_bytes(claims)
    with processes.Manager() as manager:
        found = manager.list()
        child = processes.Process(target=load_and_measure, args=(tmp_path, found))
        child.start()
        child.join(120)
        assert child.exitcode == 0
        *refused_ones, grown = found
    assert {"a zip bomb", "a tensor that repeats", "one that holds itself"} <= set(refused_ones)
    assert grown < 200, f"{grown} MiB"


# --- Seals ---


def test_a_run_whose_settings_were_changed_is_not_evaluated(teacher, capfd):
    assert main("train", *QUICK, "--teacher", teacher) == 0
    (run,) = Path("runs").glob("digits-absld-*")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("epsilon = 0.1", "epsilon = 0.2"))
    capfd.readouterr()
    refused(
        capfd, 4, "has changed since the run wrote it", "give it as --recipe",
        "evaluate", run, "--device", "cpu",
    )  # fmt: skip
    assert main("train", *QUICK, "--teacher", teacher, "--recipe", run / "config.toml") == 0


def test_others_files_that_repeat_little_are_read(tmp_path):
    content = {"w": torch.ones(1).expand(5, 5), "n": nn.Linear(2, 2).state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt")["w"].shape == (5, 5)
    save(content, tmp_path / "b.pt")
    assert load(tmp_path / "b.pt")["w"].sum() == 25
