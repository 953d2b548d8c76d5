"""Files that mean harm or are broken are refused, run nothing, and take little memory.

Every file goes through the one loading function (tests/package/test_structure.py: nothing else in
the package unpickles); each command is tried with one such file.
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
from helpers.processes import processes
from helpers.program import QUICK, load_few, main, refused
from helpers.weight_files import Payload
from torch import nn

from absld.errors import CheckpointError
from absld.models.architectures import build_model
from absld.models.loading import load_network
from absld.storage.checkpoint import load, save

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")

# The folder that a payload would make. One for all tests: a file's bytes are made once.
PROOF = Path(tempfile.gettempdir()) / f"it ran in {os.getpid()}"


def state():
    return build_model("convnet", 10, "hostile").state_dict()


def as_bytes(content, **settings):
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def compressed():
    """A good archive whose tensors are zeros, compressed."""
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


def billion_laughs():
    """Forty lists, each of which holds the one before twice."""
    content = ["ha"]
    for _ in range(40):
        content = [content, content]
    return as_bytes({"model": content})


def with_tensor(name, value):
    return as_bytes({"model": state() | {name: value}, "architecture": "convnet"})


# By name: the bytes, and what the message says of them.
HOSTILE = {
    "payload": (lambda: as_bytes({"model": Payload(PROOF)}), "would run code"),
    "payload in an old format": (lambda: pickle.dumps(Payload(PROOF), 2), "would run code"),
    "whole module": (lambda: as_bytes(build_model("convnet", 10)), "would run code"),
    "HTML page": (lambda: b"\n  <!DOCTYPE html><html>sign in</html>", "HTML page"),
    "text": (lambda: b"just a note", "it starts with b'just a note'"),
    "empty": (lambda: b"", "the file is empty"),
    "half an archive": (lambda: as_bytes(state())[:5000], "truncated or damaged"),
    "half an old file": (
        lambda: as_bytes(state(), _use_new_zipfile_serialization=False)[:5000],
        "it starts with b'",
    ),
    "noise": (lambda: bytes(range(256)) * 40, "it starts with b'"),
    "zip bomb": (compressed, "would become 16,7"),
    "expanded tensor": (
        lambda: as_bytes({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}),
        "repeats the bytes",
    ),
    "dict that holds itself": (holding_itself, "holds itself"),
    "billion laughs": (billion_laughs, "holds more than 1,000,000 values"),
    "number": (lambda: as_bytes(3), "holds int"),
    "texts for tensors": (lambda: as_bytes({"model": {"w": "text"}}), "not a named tensor"),
    "NaN": (lambda: with_tensor("0.weight", torch.full((16, 3, 3, 3), torch.nan)), "holds NaN"),
    "other classes": (lambda: as_bytes(build_model("convnet", 7).state_dict()), "needed is (10"),
    "another network": (lambda: with_tensor("more", torch.zeros(1)), "has besides ['more']"),
    "complex tensor": (lambda: with_tensor("0.weight", torch.zeros(1) + 1j), "complex64"),
    "sparse tensor": (lambda: with_tensor("0.weight", torch.eye(3).to_sparse()), "sparse"),
}


@functools.cache
def bytes_of(kind):
    return HOSTILE[kind][0]()


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_and_runs_nothing(kind):
    path = Path("tëacher.pt")
    path.write_bytes(bytes_of(kind))
    with pytest.raises(CheckpointError) as caught:
        load_network(str(path), 10, (), "convnet")
    assert str(caught.value).startswith(f"{path}: ") and HOSTILE[kind][1] in str(caught.value)
    assert caught.value.exit_code == 4 and caught.value.hint
    assert not PROOF.exists() and list(Path().iterdir()) == [path]


def tensor_beyond_the_end():
    tensor = {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}
    head = json.dumps({"w": tensor}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(8)


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 2**60) + b"{}", b"\0" * 7, tensor_beyond_the_end()],
    ids=["header beyond the end", "no header", "tensor beyond the end"],
)
def test_a_hostile_safetensors_file_is_refused(content):
    Path("net.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\.safetensors: .*safetensors file"):
        load_network("net.safetensors", 10, (), "convnet")


# --- The refusal reaches the user of every command ---

EVALUATE = ["--device", "cpu", "--attacks", "clean", "--no-checks"]
COMMANDS = {
    "train --teacher": ["train", *QUICK, "--teacher", "FILE"],
    "train --student": ["train", *QUICK, "--student", "FILE"],
    "evaluate": ["evaluate", "FILE", "--model", "convnet", "--dataset", "digits", *EVALUATE],
    "evaluate --against": ["evaluate", "RUN", *EVALUATE, "--against", "FILE",
                           "--against-model", "convnet"],
    "evaluate RUN": ["evaluate", "BROKEN RUN", *EVALUATE],
    "teacher check": ["teacher", "check", "FILE", "--model", "convnet", "--dataset", "digits",
                      "--device", "cpu"],
    "teacher cache": ["teacher", "cache", "--teacher", "FILE", "--device", "cpu"],
    "compare": ["compare", "RUN", "BROKEN RUN", *EVALUATE],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher):
    """Two finished runs that can be compared."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("absld.runs.training_run.load_data", load_few)
        for method in ("absld", "rslad"):
            assert main("train", *QUICK, "--teacher", teacher, "--method", method) == 0
    return sorted(folder.glob("runs/digits-*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_hostile_file(command, runs, capfd):
    for run, copy in zip(runs, ("a run", "a broken run"), strict=True):
        shutil.copytree(run, copy)
    for path in (Path("tëacher.pt"), Path("a broken run") / "best.pt"):
        path.write_bytes(bytes_of("payload"))
    before = set(Path().rglob("*"))
    names = {"FILE": "tëacher.pt", "RUN": "a run", "BROKEN RUN": "a broken run"}
    out = refused(
        capfd, 4, "would run code", "", *[names.get(word, word) for word in COMMANDS[command]]
    )
    assert "epoch" not in out and not PROOF.exists()
    new = {path for path in set(Path().rglob("*")) - before if "a run" not in path.parts}
    assert not [path for path in new if path.suffix in (".pt", ".cache", ".json")], new


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\xff", "codec can't decode"),
        (b"epochs = ", "Invalid value"),
        (b"epochs = " + b"[" * 100_000, ""),
        (b"__import__('os').mkdir('it ran')", ""),
        (b"epochs = 99999999999999999999999999999999\nbatch_size = 1e999", "batch_size takes"),
        (b"out = { a = 1 }", "out takes a text"),
    ],
    ids=["no text", "no value", "deep nesting", "code", "huge numbers", "a table for a text"],
)
def test_a_hostile_recipe_is_refused(content, message, capfd):
    Path("my recipe.toml").write_bytes(content)
    refused(capfd, 2, message, "", "train", "--recipe", "my recipe.toml")
    assert not Path("it ran").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[" * 100_000, b"{}", b"[1]", b'{"schema": "absld-evaluation-1"}'],
)
def test_a_hostile_evaluation_is_not_reported(content, capfd):
    Path("evaluation.json").write_bytes(content)
    refused(capfd, 4, "evaluation.json", "", "report", "evaluation.json")


# --- Memory ---


def load_and_measure(folder, results):
    """Load every file; list those refused, then by how much this process ever grew (MiB)."""
    os.chdir(folder)

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    before = peak()
    for path in sorted(Path().glob("*.pt")):
        try:
            load(path)
        except CheckpointError:
            results.append(path.stem)
    results.append(peak() - before)


def test_no_file_takes_more_memory_than_its_size_tells(tmp_path):
    for kind in HOSTILE:
        (tmp_path / f"{kind}.pt").write_bytes(bytes_of(kind))
    claims = pickle.dumps(bytearray(8), 2).replace(b"K\x08", b"")  # bytes that are not there
    (tmp_path / "claims.pt").write_bytes(claims)
    with processes.Manager() as manager:
        results = manager.list()
        child = processes.Process(target=load_and_measure, args=(tmp_path, results))
        child.start()
        child.join(120)
        assert child.exitcode == 0
        *refused_files, growth = results
    assert {"zip bomb", "expanded tensor", "dict that holds itself"} <= set(refused_files)
    assert growth < 200, f"{growth} MiB"


# --- Seals ---


def test_a_run_whose_settings_were_changed_is_not_evaluated(runs, teacher, capfd):
    path = Path(shutil.copytree(runs[0], "a run"))
    text = (path / "config.toml").read_text()
    (path / "config.toml").write_text(text.replace("epsilon = 0.1", "epsilon = 0.2"))
    refused(
        capfd, 4, "has changed since the run wrote it", "give it as --recipe",
        "evaluate", path, "--device", "cpu",
    )  # fmt: skip
    assert main("train", *QUICK, "--teacher", teacher, "--recipe", path / "config.toml") == 0


def test_a_file_of_others_whose_tensors_repeat_a_little_is_read(tmp_path):
    content = {"w": torch.ones(1).expand(5, 5), "n": nn.Linear(2, 2).state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt")["w"].shape == (5, 5)
    save(content, tmp_path / "b.pt")
    assert load(tmp_path / "b.pt")["w"].sum() == 25
