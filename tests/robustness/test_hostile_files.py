"""Files that mean harm or are broken are refused, run nothing, and take little memory.

Every file goes through the one loading function (tests/package/test_structure.py: nothing else in
the package unpickles); each command is tried with one such file.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import pickletools
import resource
import shutil
import socket
import struct
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import processes
from helpers.program import QUICK, load_few, main, refused
from helpers.weight_files import Payload
from hypothesis import settings
from torch import nn

from absld.config.files import SEAL, read_run_config, to_toml
from absld.config.resolve import resolve
from absld.errors import CheckpointError
from absld.evaluation.results import read_results
from absld.models.architectures import build_model
from absld.models.loading import load_network
from absld.storage.checkpoint import load, save
from absld.storage.environment import read_sessions
from absld.storage.run_directory import RunDirectory

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")

# The folder that a payload would make. One for all tests: a file's bytes are made once.
PROOF = Path(tempfile.gettempdir()) / f"it ran in {os.getpid()}"


def state():
    return build_model("convnet", 10, "hostile").state_dict()


def as_bytes(content, **settings):
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def compressed(tensor=None):
    """A good archive, compressed; by default its tensors are many zeros."""
    tensor = torch.zeros(2**22) if tensor is None else tensor
    stored = zipfile.ZipFile(io.BytesIO(as_bytes({"model": {"w": tensor}})))
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


def nested(value, depth=45):
    """Tuples of tuples: a text of 2^45 values, hashed or printed."""
    for _ in range(depth):
        value = (value, value)
    return value


def changed_pickle(change):
    """A good file of weights with another pickle in it."""
    given = zipfile.ZipFile(io.BytesIO(as_bytes({"model": {"w": torch.zeros(200)}})))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for entry in given.infolist():
            raw = given.read(entry)
            archive.writestr(entry.filename, change(raw) if "data.pkl" in entry.filename else raw)
    return packed.getvalue()


def pickled(operations):
    return changed_pickle(lambda _: b"\x80\x02" + operations + b".")


NUMPY_CORE = b"cnumpy._core.multiarray\n"
ORDERED = b"ccollections\nOrderedDict\n)R"


def dtype_of(name, flags=b"\x89\x88"):
    return b"cnumpy\ndtype\n(U%c%b%bt" % (len(name), name.encode(), flags) + b"R"


def dtype_state(size, flags=0):
    """A state that is set as numpy's own would be."""
    return b"(K\3U\1|NNNJ%bK\1K%ctb" % (struct.pack("<i", size), flags)


def scalar_of(dtype):
    """Eight bytes, read as a value of a type."""
    return b"}U\1a" + NUMPY_CORE + b"scalar\n" + dtype + b"U\x08" + b"A" * 8 + b"\x86Rs"


def tall_lists():
    """Lists that are filled from the top down: each is small when it is put into the next."""
    names = b"".join(b"]q%c" % number for number in range(41))
    fill = b"".join(b"h%c(h%ch%ce" % (n, n + 1, n + 1) for n in range(40))
    return pickled(names + fill + b"h\0")


def one_record_many_names():
    """Storages whose keys are one record, read without regard to case."""
    keys = [f"{number:010b}".replace("0", "a").replace("1", "A") for number in range(1024)]
    storages = b"".join(
        b"(X\7\0\0\0storagectorch\nFloatStorage\nX\x0a\0\0\0%bX\3\0\0\0cpuK\xc8tQ" % key.encode()
        for key in keys
    )
    return pickled(b"(" + storages + b"l")


def two_directories():
    """An archive whose directory is there twice: readers differ in which one they use."""
    bomb = compressed()
    (place,) = struct.unpack("<L", bomb[-6:-2])
    return bomb[:-22] + bomb[place:]


def overlapping():
    """An archive whose entries all are the same bytes."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(2**20))
        archive.filelist += archive.filelist[-1:] * 999
    return raw.getvalue()


def views_of_one():
    storage = torch.zeros(2**20)
    return as_bytes({"model": {str(n): storage[n : 2**20 - n] for n in range(50)}})


def with_tensor(name, value):
    return as_bytes({"model": state() | {name: value}, "architecture": "convnet"})


# By name: the bytes, and what the message says of them.
def nested_lists(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def without_bytes():
    """An old file whose list of storages is empty: torch would not fill them."""
    content = io.BytesIO(as_bytes(state(), _use_new_zipfile_serialization=False))
    for _ in range(4):
        for _ in pickletools.genops(content):
            pass
    return content.getvalue()[: content.tell()] + pickle.dumps([], 2)


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
    "zip bomb with bytes behind it": (lambda: compressed() + bytes(66_000), "truncated or damaged"),
    "zip bomb with a comment": (
        lambda: compressed()[:-2] + b"\5\0hello",
        "truncated or damaged",
    ),
    "archive with two directories": (two_directories, "truncated or damaged"),
    "entries that overlap": (overlapping, "would become"),
    "compressed": (lambda: compressed(torch.rand(50)), "compressed, which torch.save does not do"),
    "key of nested tuples": (
        lambda: pickled(b"}K\1" + b"q\0h\0\x86" * 45 + b"K\1s"),
        "holds more than 500,000",
    ),
    "value of nested tuples": (lambda: as_bytes({"model": nested("w")}), "holds more than 500,000"),
    "nested tuples in an old format": (
        lambda: as_bytes(nested("w"), _use_new_zipfile_serialization=False),
        "holds more than 500,000 values",
    ),
    "key of a tuple": (lambda: as_bytes({(1, 2): 1}), "keys are not texts or numbers"),
    "keys of one hash": (
        lambda: as_bytes({(2**61 - 1) * n * 8: n for n in range(1000)}),
        "keys are not texts or numbers",
    ),
    "lists filled from the top": (tall_lists, "holds itself"),
    "call of nested tuples": (
        lambda: pickled(b"K\1" + b"q\0h\0\x86" * 45 + b")R"),
        "holds more than 500,000",
    ),
    "bytearray of 10 GB": (
        lambda: pickled(b"c__builtin__\nbytearray\n\x8a\5\0\0\0\0\2\x85R"),
        "bytearray",
    ),
    "text in many places": (
        lambda: pickled(b"](X\x40\x9c\0\0" + b"a" * 40_000 + b"q\0" + b"h\0" * 500 + b"e"),
        "holds more than 500,000",
    ),
    "deep tuple": (lambda: pickled(b"K\1" + b"\x85" * 200), "more than 100 deep"),
    "deep list": (lambda: as_bytes(nested_lists(200)), "more than 100 deep"),
    "part of a storage": (
        lambda: pickled(
            b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpuK\1"
            b"X\1\0\0\x001K\0K\1\x87tQ"
        ),
        "a storage that is a part of another",
    ),
    "storage without bytes": (without_bytes, "holds storages without bytes"),
    "value beside the content": (lambda: pickled(b"K\1K\2"), "values that are not read"),
    "operation of a later protocol": (lambda: pickled(b"\x8f"), "uses EMPTY_SET"),
    "size of what a call returns": (
        lambda: pickled(b"ctorch\nSize\nccollections\nOrderedDict\n)R\x85R"),
        "do not call torch.Size like this",
    ),
    "numpy array of a text": (
        lambda: pickled(
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85X\5\0\0\0i1,i1\x87R"
        ),
        "_reconstruct like this",
    ),
    "name without end": (
        lambda: pickled(b"cos\n" + b"a" * 10_000 + b"\n"),
        "would run code or build objects (os.a",
    ),
    "codec": (
        lambda: pickled(b"c_codecs\nencode\nX\1\0\0\0aX\x08\0\0\0punycode\x86R"),
        "codec",
    ),
    "numpy array without values": (
        lambda: pickled(
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            b"\x8a\5\0\0\0\0\2\x85X\1\0\0\0b\x87R"
        ),
        "_reconstruct like this",
    ),
    "another protocol": (lambda: as_bytes({"x": 1}, pickle_protocol=4), "pickled with protocol 4"),
    "numpy objects": (lambda: as_bytes({"x": np.array([None])}), "call numpy.dtype like this"),
    "numpy type of numbers, not a copy": (
        lambda: pickled(scalar_of(dtype_of("f8", b"\x89\x89"))),
        "call numpy.dtype like this",
    ),
    "numpy type with flags": (
        lambda: pickled(scalar_of(dtype_of("U2") + dtype_state(8, flags=1))),
        "change numpy.dtype",
    ),
    "numpy type with another size": (
        lambda: pickled(scalar_of(dtype_of("S1") + dtype_state(-8))),
        "change numpy.dtype",
    ),
    "numpy type of gigabytes": (
        lambda: pickled(scalar_of(dtype_of("S2000000000"))),
        "call numpy.dtype like this",
    ),
    "numpy type of records": (
        lambda: pickled(scalar_of(dtype_of("(20000,10000)f8"))),
        "call numpy.dtype like this",
    ),
    "numpy scalar without bytes": (
        lambda: pickled(NUMPY_CORE + b"scalar\n" + dtype_of("f8") + b"\x85R"),
        "scalar like this",
    ),
    "numpy array with strides of its own": (
        lambda: pickled(b"cnumpy\nndarray\nM\xff\xff\x85\x85R"),
        "call numpy.ndarray like this",
    ),
    "tensor by its class": (
        lambda: pickled(b"ctorch\nTensor\nM\xff\xff\x85R"),
        "call torch.Tensor like this",
    ),
    "storage by its class": (
        lambda: pickled(b"ctorch.storage\nUntypedStorage\nM\xff\xff\x85R"),
        "UntypedStorage like this",
    ),
    "set": (lambda: as_bytes({1}), "would run code"),
    "counter of a list": (
        lambda: pickled(b"ccollections\nCounter\n](K\1K\2e\x85R"),
        "call collections.Counter like this",
    ),
    "ordered dict of pairs": (
        lambda: pickled(b"ccollections\nOrderedDict\n](K\1N\x86e\x85R"),
        "call collections.OrderedDict like this",
    ),
    "object made without a call": (lambda: pickled(b"ctorch\nTensor\n)\x81"), "uses NEWOBJ"),
    "call of what a call returned": (
        lambda: pickled(b"ctorch\ndevice\n" + ORDERED + b"R"),
        "call torch.device like this",
    ),
    "operations moved by a second header": (
        lambda: pickled(b"ctorch\nTensor\n" + ORDERED + b"\x80\2\x85R"),
        "call torch.Tensor like this",
    ),
    "state of a list": (lambda: pickled(b"]}b"), "change another object"),
    "item of a list": (lambda: pickled(b"]\x88K\1s"), "sets an item of what is not a dict"),
    "items after a tuple": (lambda: pickled(b")K\1a"), "appends to what is not a list"),
    "class": (lambda: pickled(b"ctorch\nFloatStorage\n"), "holds StorageType"),
    "one record, many names": (one_record_many_names, "storage without a number"),
    "views of one storage": (views_of_one, "repeats the bytes"),
    "expanded tensor": (
        lambda: as_bytes({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}),
        "repeats the bytes",
    ),
    "dict that holds itself": (holding_itself, "holds itself"),
    "billion laughs": (billion_laughs, "holds more than 500,000 values"),
    "number": (lambda: as_bytes(3), "holds int"),
    "texts for tensors": (lambda: as_bytes({"model": {"w": "text"}}), "not a named tensor"),
    "NaN": (lambda: with_tensor("0.weight", torch.full((16, 3, 3, 3), torch.nan)), "holds NaN"),
    "other classes": (lambda: as_bytes(build_model("convnet", 7).state_dict()), "expected (10"),
    "another network": (lambda: with_tensor("more", torch.zeros(1)), "unexpected ['more']"),
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
    [
        struct.pack("<Q", 2**60) + b"{}",
        b"\0" * 7,
        tensor_beyond_the_end(),
        struct.pack("<Q", 2**24 + 1) + b"{" + b" " * 2**24,
        struct.pack("<Q", 20_001) + b"{" * 20_001,
    ],
    ids=["header beyond the end", "no header", "tensor beyond the end", "long header", "many"],
)
def test_a_hostile_safetensors_file_is_refused(content):
    Path("net.safetensors").write_bytes(content)
    message = r"net\.safetensors: .*(safetensors file|20,000 tensors)"
    with pytest.raises(CheckpointError, match=message):
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
    "train --resume": ["train", *QUICK, "--teacher", "OWN", "--resume"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, teacher):
    """Two finished runs that can be compared."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("absld.runs.planning.load_data", load_few)
        for method in ("absld", "rslad"):
            assert main("train", *QUICK, "--teacher", teacher, "--method", method) == 0
    return sorted(folder.glob("runs/digits-*"))


@pytest.fixture
def places(runs):
    """Where a file of weights lies that a command of COMMANDS reads."""
    runs_here = ("a run", "a broken run", f"runs/{runs[0].name}")
    for run, copy in zip((*runs, runs[0]), runs_here, strict=True):
        shutil.copytree(run, copy)
    return (
        Path("tëacher.pt"),
        Path("a broken run") / "best.pt",
        Path(runs_here[-1]) / "last.pt",
    )


def check_refused(command, message, teacher, capfd):
    names = {"FILE": "tëacher.pt", "RUN": "a run", "BROKEN RUN": "a broken run", "OWN": teacher}
    before = set(Path().rglob("*"))
    out = refused(capfd, 4, message, "", *[names.get(word, word) for word in COMMANDS[command]])
    assert "epoch  " not in out and not PROOF.exists()
    new = {path for path in set(Path().rglob("*")) - before if "a run" not in path.parts}
    if "OWN" not in COMMANDS[command]:  # whose logits may be cached
        assert not [path for path in new if path.suffix in (".pt", ".cache", ".json")], new


def make_fifo(path):
    """Make a file that would keep a reader waiting."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_pipe(command, places, teacher, capfd):
    for path in places:
        make_fifo(path)
    check_refused(command, "not a regular file", teacher, capfd)


# One or two of each stage: opening, the look at the pickle, its content, names and shapes.
OF_EACH_STAGE = ["payload", "whole module", "HTML page", "empty", "half an archive", "zip bomb",
                 "billion laughs", "expanded tensor", "NaN", "other classes", "another network"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_every_hostile_file(command, places, teacher, capfd):
    """All kinds in the profile `thorough`, which one function refuses: see above."""
    for kind in HOSTILE if settings().max_examples >= 1000 else OF_EACH_STAGE:
        for path in places:
            path.write_bytes(bytes_of(kind))
        check_refused(command, ".pt: ", teacher, capfd)


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


# --- Files of a run that are damaged, or no files ---


def socket_at(path):
    """Bind by the relative name: a socket's path has at most 107 bytes."""
    with contextlib.chdir(path.parent), socket.socket(socket.AF_UNIX) as bound:
        bound.bind(path.name)


def huge(path):
    with path.open("wb") as file:
        file.truncate(10 * 2**30)  # takes no blocks


DAMAGES = {
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a socket": (socket_at, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a directory": (Path.mkdir, "a directory, not a file"),
    "a link to itself": (
        lambda path: path.symlink_to(path.name),
        "regular file|No such file|no such",
    ),
    "10 GB of nothing": (huge, "10,737,418,240 bytes|starts with|header"),
    "bytes of nothing": (lambda path: path.write_bytes(bytes(100) + b"\n"), "."),
    "an empty object": (lambda path: path.write_text("{}\n"), "."),
}
# Any text is a status, and a file that is not there is that of a run which has not begun.
NO_DAMAGE = [("STATUS", "bytes of nothing"), ("STATUS", "an empty object")]
NO_DAMAGE += [(name, "a link to itself") for name in ("environment.json", "metrics.jsonl")]
READERS = {
    "config.toml": read_run_config,
    "environment.json": lambda path: read_sessions(path.parent),
    "metrics.jsonl": lambda path: RunDirectory(path.parent).records(),
    "STATUS": lambda path: RunDirectory(path.parent).status(),
    "evaluation.json": read_results,
    "best.pt": load,
    "best.safetensors": load,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", READERS)
def test_a_file_of_a_run_that_is_damaged_is_refused(name, damage):
    make, message = DAMAGES[damage]
    path = Path.cwd() / name
    make(path)
    if (name, damage) in NO_DAMAGE:
        READERS[name](path)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        READERS[name](path)
    assert caught.value.exit_code == 4 and name in str(caught.value)


def without_seal(path):
    torch.save(load(path), path)


def without_progress(path):
    content = load(path)
    save(content | {"progress": {"epoch": "two"}}, path)


def of_another_network(path):
    save({"model": build_model("convnet", 7).state_dict()}, path)


RESUMED = {
    "nothing": ("last.pt", lambda path: torch.save({}, path), "its SHA-256 is missing"),
    "a number": ("last.pt", lambda path: torch.save(3, path), "its SHA-256 is missing"),
    "no seal": ("last.pt", without_seal, "its SHA-256 is missing"),
    "weights": ("last.pt", lambda path: save(state(), path), "not a checkpoint of a training"),
    "no settings": ("last.pt", lambda path: save({"identity": {}}, path), "another training"),
    "no progress": ("last.pt", without_progress, "not one of this training"),
    "a FIFO": ("last.pt", make_fifo, "not a regular file"),
    "no state": ("last.pt", Path.unlink, "last.pt: missing"),
    "no best": ("best.pt", Path.unlink, "no such file"),
    "no records": ("metrics.jsonl", Path.unlink, "metrics.jsonl: ends before epoch 1"),
    "best of another program": (
        "best.pt",
        lambda path: torch.save([], path),
        "its SHA-256 is missing",
    ),
    "best of another network": ("best.pt", of_another_network, "belongs to a different network"),
    "records": ("metrics.jsonl", lambda path: path.write_text('{"epoch": "1"}\n'), "epoch: '1' is"),
    "sessions": ("environment.json", lambda path: path.write_text("[3]"), "[0]: 3 is not"),
    "no sessions": ("environment.json", Path.unlink, "No such file"),
    "settings": ("config.toml", lambda path: path.write_text("epochs = 1"), "cut short"),
    "a linked lock": (".lock", lambda path: path.symlink_to("best.pt"), "a link"),
}


@pytest.mark.parametrize("fault", RESUMED)
def test_a_training_is_not_resumed_from_what_another_program_wrote(fault, runs, teacher, capfd):
    name, make, message = RESUMED[fault]
    folder = Path(shutil.copytree(runs[0], Path("runs") / runs[0].name))
    (folder / ".lock").unlink(missing_ok=True)
    make(folder / name)
    refused(capfd, 4, message, "", "train", *QUICK, "--teacher", teacher, "--resume")


@pytest.fixture(scope="module")
def config_bytes():
    return to_toml(resolve({"epsilon": 0.1})).encode()


def test_settings_of_a_run_that_are_cut_anywhere_are_refused(config_bytes):
    path = Path("config.toml")
    path.write_bytes(config_bytes)
    assert read_run_config(path).epsilon == 0.1
    for length in range(len(config_bytes) - 1):
        path.write_bytes(config_bytes[:length])
        with pytest.raises(CheckpointError, match=r"config\.toml: (cut short|has changed)"):
            read_run_config(path)


def test_settings_of_another_version_are_refused(config_bytes):
    text = b"warp = 9\n"
    seal = f"{SEAL}{hashlib.sha256(text).hexdigest()}\n".encode()
    Path("config.toml").write_bytes(text + seal)
    with pytest.raises(CheckpointError, match="warp"):
        read_run_config(Path("config.toml"))


# --- Folders that are something else ---

FOLDERS = {
    "evaluations": ["evaluate", "RUN", *EVALUATE],
    "logit-caches": ["teacher", "cache", "--teacher", "OWN", "--device", "cpu"],
    "a run": ["train", *QUICK, "--teacher", "OWN", "--resume"],
}
IN_PLACE = {
    "a file": Path.touch,
    "a FIFO": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link": lambda path: path.symlink_to(Path("mine").resolve()),
}


@pytest.mark.parametrize("kind", IN_PLACE)
@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_is_written_where_something_else_is_in_the_place_of_a_folder(
    folder, kind, runs, teacher, capfd
):
    run = Path(shutil.copytree(runs[0], Path("runs") / runs[0].name))
    place = {"evaluations": run / folder, "a run": run}.get(folder, run.parent / folder)
    shutil.rmtree(place, ignore_errors=True)
    Path("mine").mkdir()
    IN_PLACE[kind](place)
    flags = [{"RUN": run, "OWN": teacher}.get(word, word) for word in FOLDERS[folder]]
    refused(capfd, 4, f"{place}: ", "", *flags)
    assert not list(Path("mine").iterdir())


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
        capfd, 4, "has changed since the run wrote it", "no such last line",
        "evaluate", path, "--device", "cpu",
    )  # fmt: skip
    *lines, _ = (path / "config.toml").read_text().splitlines(keepends=True)
    Path("mine.toml").write_text("".join(lines))
    assert main("train", *QUICK, "--teacher", teacher, "--recipe", "mine.toml") == 0


def test_a_file_of_others_whose_tensors_repeat_a_little_is_read(tmp_path):
    content = {"w": torch.ones(1).expand(5, 5), "n": nn.Linear(2, 2).state_dict()}
    torch.save(content, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt")["w"].shape == (5, 5)
    save(content, tmp_path / "b.pt")
    assert load(tmp_path / "b.pt")["w"].sum() == 25
