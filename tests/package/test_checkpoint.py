"""Files of weights and run directories: whole or not there, unchanged or refused, never run."""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import struct
import tarfile
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import processes
from helpers.weight_files import Payload, same
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.errors import CheckpointError, Interrupted, NonFiniteError
from absld.storage import checkpoint
from absld.storage.checkpoint import content_digest, load, save
from absld.storage.files import digest, replacing
from absld.storage.run_directory import RunDirectory
from absld.storage.training_checkpoint import TrainingCheckpoint

SOURCE = str(Path(absld.__file__).parents[1])
CONTENT = {
    "model": {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(3)},
    "empty": torch.zeros(0, 4),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False]),
    "epoch": 3,
    "score": 0.1 + 0.2,
    "names": ["cat", "日本"],
    "milestones": (0.5, None),
    "settings": {"resume": True, "method": "absld"},
}


def refused(path, *patterns):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    for pattern in (str(path), *patterns):
        assert pattern in str(caught.value)
    assert caught.value.hint and "\n" not in str(caught.value)


# --- Whole or not there ---


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "spaces und Ümlaute.pt"
    save(CONTENT, path)
    assert same(load(path), CONTENT) and same(load(str(path)), CONTENT)
    assert os.listdir(tmp_path) == [path.name]
    assert checkpoint.SEAL not in CONTENT and torch.load(path, weights_only=True)["epoch"] == 3


@contextlib.contextmanager
def full_at(size):
    """The system refuses what would make a file larger than `size`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_disk_that_is_full_before_the_last_byte_keeps_the_old_file(share, tmp_path):
    path = tmp_path / "last.pt"
    save(CONTENT, path)
    size = int(share * path.stat().st_size)
    save({"epoch": 1}, path)
    with pytest.raises(OSError), full_at(size):
        save(CONTENT, path)
    assert load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_keeps_the_old_file(name, tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save({"epoch": 1}, path)

    def fail(*given):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        with pytest.raises(OSError, match="Input/output"):
            save({"epoch": 2}, path)
    assert load(path) == {"epoch": 1} and os.listdir(tmp_path) == ["last.pt"]


def test_a_new_file_that_fails_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "STATUS") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path, done = tmp_path / "last.pt", []
    fsync, replace = os.fsync, os.replace

    def heard(number):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else path.exists())
        fsync(number)

    monkeypatch.setattr(os, "fsync", heard)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), replace(a, b)))
    save({"epoch": 1}, path)
    assert done == [False, "name", "folder"]


def save_and_die(path, moment):
    """Save a second content, and be killed before `moment`: a name in os."""
    setattr(os, moment, lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    save({"epoch": 2, "padding": torch.zeros(10**5)}, path)


@pytest.mark.parametrize("moment", ["fsync", "replace", "open"])
def test_a_process_killed_while_saving_leaves_a_whole_file(moment, tmp_path):
    """Before the content is on the disk, before it is renamed, and after (os.open: the folder)."""
    path = tmp_path / "last.pt"
    save({"epoch": 1}, path)
    child = processes.Process(target=save_and_die, args=(path, moment))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert load(path)["epoch"] == (2 if moment == "open" else 1)
    save({"epoch": 3}, path)  # over what the other left behind
    assert os.listdir(tmp_path) == ["last.pt"] and load(path) == {"epoch": 3}


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        save({}, tmp_path / "nowhere" / "last.pt")


# --- Unchanged ---


@pytest.mark.parametrize("offset", [0, 5, 23])
def test_a_flipped_byte_of_a_tensor_is_noticed(offset, tmp_path):
    """The archive itself would load: torch does not compare its check sums."""
    path = tmp_path / "last.pt"
    save(CONTENT, path)
    raw = bytearray(path.read_bytes())
    raw[raw.index(CONTENT["model"]["weight"].numpy().tobytes()) + offset] ^= 1
    path.write_bytes(raw)
    torch.load(path, weights_only=True)
    refused(path, "changed since its SHA-256 was taken")


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_a_changed_value_is_noticed(name, tmp_path):
    content = torch.load(saved(tmp_path), weights_only=True)
    del content[name]
    torch.save(content, tmp_path / "last.pt")
    refused(tmp_path / "last.pt", "SHA-256")


def saved(folder):
    save(CONTENT, folder / "last.pt")
    return folder / "last.pt"


def test_a_file_of_others_has_no_seal_and_loads(tmp_path):
    torch.save([1, 2], tmp_path / "other.pt")
    assert load(tmp_path / "other.pt") == [1, 2]


@pytest.mark.parametrize(
    "value",
    [
        np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("best"),
        np.arange(6.0).reshape(2, 3), np.array(["cat", "dog"]), np.array(3, dtype=np.uint8),
        np.zeros(2, "c16"), np.array([b"cat", b"d"]),
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("seal", [False, True])
def test_values_of_numpy_beside_weights_are_read(value, seal, tmp_path):
    path = tmp_path / "net.pt"
    content = {"model": {"w": torch.ones(2)}, "best_acc": value}
    (save if seal else torch.save)(content, path)
    read = load(path)["best_acc"]
    assert np.array_equal(read, value) and read.dtype == value.dtype
    # The list of the process, by which others call torch.load, is as before.
    assert np.dtype not in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("old", [False, True])
def test_what_trainings_of_others_keep_is_read(old, tmp_path):
    """A module's parameters, an optimiser, a scheduler with a Counter, OrderedDicts, shared parts."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2, 2])
    content = {
        "net": net.state_dict(), "ema": net.state_dict(), "parameters": list(net.parameters()),
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "kinds": [torch.float16, torch.device("cpu"), torch.Size([1]), 2j, None, b"ab"],
    }  # fmt: skip
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    read = load(tmp_path / "a.pt")
    assert content_digest(read) == content_digest(content)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_the_digest_of_plain_values_outlives_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    assert content_digest(torch.load(file, weights_only=True)) == content_digest(value)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, 1.0), (1, True), (1, "1"), (None, "None"), ([1], (1,)), ([], {}), ([[1], 2], [[1, 2]]),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}), (0.0, -0.0), ([["a"], []], [["a", []]]),
        (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(1), torch.zeros(1, dtype=torch.int32)),
        (torch.zeros(1), -torch.zeros(1)),
    ],
)  # fmt: skip
def test_other_values_have_other_digests(a, b):
    assert content_digest(a) != content_digest(b)


def test_the_digest_of_weights_is_as_defined():
    """SHA-256 over the sorted names, each followed by dtype, shape and raw bytes."""
    state = {"b": torch.tensor(3), "a": torch.tensor([[1.0, 2.0]])}
    content = b"atorch.float32(1, 2)" + struct.pack("<2f", 1, 2)
    content += b"btorch.int64()" + struct.pack("<q", 3)
    assert digest(state) == hashlib.sha256(content).hexdigest()
    assert digest({"x": torch.eye(3)[:, :2]}) == digest({"x": torch.eye(3)[:, :2].contiguous()})


# --- What a file is instead ---


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_truncated_file(share, tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    refused(path, "truncated or damaged")


def test_a_file_that_is_missing_and_a_folder(tmp_path):
    refused(tmp_path / "none.pt", "no such file")
    refused(tmp_path, "directory")


def test_a_dict_with_attributes_is_refused(tmp_path):
    """They could stand in the place of its methods, as `keys`."""
    content = OrderedDict(model=torch.zeros(1))
    content.values_of = 1
    torch.save(content, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "holds a dict with attributes")


def test_an_old_file_that_is_a_tar_archive_too_is_refused_at_once(tmp_path):
    """torch.load would try to read it as one: time that grows with the square of its size."""
    block = bytearray(tarfile.TarInfo("a").tobuf(tarfile.PAX_FORMAT))
    block[:25] = b"\x80\x02N." * 5 + bytes(5)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "a.pt").write_bytes(bytes(block) + bytes(1024))
    refused(tmp_path / "a.pt", "a tar archive, not weights")


def test_a_program_by_torch_jit_is_not_called_damaged(tmp_path):
    """It is whole, and fetching it again does not help."""
    path = tmp_path / "teacher.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells those who write such files to stop
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "a TorchScript program" in str(caught.value) and "again" not in caught.value.hint


@pytest.mark.parametrize("unguarded", ["0", "1"])
def test_a_payload_never_runs(unguarded, tmp_path, monkeypatch):
    """Also where the environment, which torch reads at each load, asks it to drop its guard."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", unguarded)
    proof = tmp_path / "it ran"
    content = {"model": Payload(proof)}
    torch.save(content, tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(content, protocol=2))
    for name in ("zip.pt", "pickle.pt"):
        refused(tmp_path / name, "refused", "mkdir")
    assert not proof.exists()


def test_a_whole_module_is_refused_by_type_and_told_how_to_export(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "teacher.pt")
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "teacher.pt")
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    assert "state_dict()" in caught.value.hint


# --- Run directories ---


def test_status_says_how_a_run_ended(tmp_path):
    run = RunDirectory(tmp_path / "a run")
    assert not run.exists()
    with run:
        assert run.exists() and run.status() == "running"
    assert run.status() == "finished"
    with pytest.raises(NonFiniteError), run:
        raise NonFiniteError("loss nan,\n {}", "")
    assert run.status() == "failed: loss nan, {}"
    for interruption in (Interrupted(15), KeyboardInterrupt(), SystemExit(143)):
        with pytest.raises(type(interruption)), run:
            raise interruption
        assert run.status() == "interrupted"


def test_a_status_that_cannot_be_written_does_not_hide_the_fault(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)

    def refuse(status):
        raise OSError(28, "No space left on device")

    with pytest.raises(NonFiniteError), run:
        monkeypatch.setattr(run, "set_status", refuse)
        raise NonFiniteError("loss nan")
    with RunDirectory(tmp_path) as again:  # the lock is free
        assert again.status() == "running"


def enter(path, entered, leave):
    """Be at work in a run until told to leave."""
    with RunDirectory(path):
        entered.set()
        leave.wait(60)


def test_a_second_process_is_refused_and_the_first_goes_on(tmp_path):
    entered, leave = processes.Event(), processes.Event()
    child = processes.Process(target=enter, args=(tmp_path, entered, leave), daemon=True)
    child.start()
    assert entered.wait(60)
    run = RunDirectory(tmp_path)
    with pytest.raises(CheckpointError, match="another process is at work"), run:
        pytest.fail("two at work")
    assert run.status() == "running"
    leave.set()
    child.join(60)
    assert child.exitcode == 0 and run.status() == "finished"


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    entered, leave = processes.Event(), processes.Event()
    child = processes.Process(target=enter, args=(tmp_path, entered, leave), daemon=True)
    child.start()
    assert entered.wait(60)
    child.kill()
    child.join(60)
    run = RunDirectory(tmp_path)
    assert run.status() == "running"  # it had no time to say otherwise
    with run:
        pass
    assert run.status() == "finished"


@pytest.mark.parametrize(
    "error",
    [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")],
    ids=["NotImplementedError", "ENOLCK"],
)
def test_a_file_system_without_locks_gives_a_cause_and_a_hint(error, tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)

    def acquire(*args, **settings):
        raise error

    monkeypatch.setattr(run._lock, "acquire", acquire)
    with pytest.raises(CheckpointError, match="no file locks") as caught, run:
        pytest.fail("not locked")
    assert caught.value.hint == "give an --out on another file system"
    assert not run.exists()


# --- Links in a run, which may be somebody else's ---


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "a file of mine"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
@pytest.mark.parametrize("name", [".lock", ".partial-STATUS", "STATUS", "metrics.jsonl"])
def test_nothing_is_written_through_a_link_in_a_run(name, link, victim, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    link(victim, folder / name)
    try:
        with RunDirectory(folder) as run:
            run.append_record({"epoch": 1})
    except CheckpointError as error:
        assert f"{name}: a link" in str(error)
    else:
        assert "STATUS" in name and run.status() == "finished"


@pytest.mark.parametrize("name", [".lock", ".partial-STATUS", "STATUS", "metrics.jsonl"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_in_a_run_is_named_and_kept(name, make, tmp_path):
    if make is os.mkfifo and "STATUS" in name:
        return  # replaced, as any file is
    make(tmp_path / name)
    run, message = RunDirectory(tmp_path), rf"{name}: (a directory|not a regular file)"
    with pytest.raises(CheckpointError, match=message), run:
        run.append_record({"epoch": 1})
    assert (tmp_path / name).exists()


@pytest.mark.parametrize("linked", ["evaluations", "evaluations/net-1"])
def test_a_folder_in_a_run_that_is_a_link_is_not_entered(linked, tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    (run / linked).parent.mkdir(parents=True)
    mine.mkdir()
    (run / linked).symlink_to(mine)
    with pytest.raises(CheckpointError, match=f"{linked}: a link"):
        RunDirectory(run / "evaluations" / "net-1", run).lock()
    assert list(mine.iterdir()) == []


def test_a_run_that_is_given_by_a_link_is_entered(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with RunDirectory(tmp_path / "link" / "evaluations" / "net-1", tmp_path / "link"):
        pass
    assert (tmp_path / "run" / "evaluations" / "net-1" / "STATUS").exists()


def test_records(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.records() == []
    for epoch in (1, 2, 3):
        run.append_record({"epoch": epoch, "risk": [None, 0.1 + 0.2]})
    lines = run.metrics.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    assert run.records()[2] == {"epoch": 3, "risk": [None, 0.1 + 0.2]}


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_record({"epoch": 1})
    run.append_record({"epoch": 2})
    whole = run.metrics.read_bytes()
    for end in range(len(whole) - 1, len(whole) // 2 - 1, -1):
        run.metrics.write_bytes(whole[:end])
        assert run.records() == [{"epoch": 1}]


def test_what_is_recorded_after_a_torn_line_is_read_again(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_record({"epoch": 1})
    with run.metrics.open("a") as file:
        file.write('{"epoch": 2, "lo')
    run.drop_records_after(1)
    run.append_record({"epoch": 2})
    assert run.records() == [{"epoch": 1}, {"epoch": 2}]


def test_records_that_the_checkpoint_does_not_know_are_dropped(tmp_path):
    run = RunDirectory(tmp_path)
    run.drop_records_after(0)
    assert run.records() == []
    for epoch in (1, 2, 3):
        run.append_record({"epoch": epoch, "loss": 0.1 * epoch})
    before = run.metrics.read_text().splitlines(keepends=True)
    run.drop_records_after(2)
    assert run.metrics.read_text().splitlines(keepends=True) == before[:2]


RECORDS = '{"epoch": 1, "clean": [0.5]}\n{"epoch": 2}\n{"epoch": 3}\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (": 3", ": 2", "epoch: 2 in line 3"),
        (": 2", ": 4", "epoch: 4 in line 2"),
        ('{"epoch": 1', '{"epoch": 2', "epoch: 2 in line 1"),
        ("[0.5]", "0.5", "clean: 0.5 is not of type 'array'"),
        ("[0.5]", "null", "clean: None is not of type 'array'"),
        ("[0.5]", '["a"]', "clean: not a list of numbers"),
        ('"clean": [0.5]', '"seconds": null', "seconds: None is not"),
    ],
)
def test_records_that_no_training_wrote_are_refused(old, new, message, tmp_path):
    run = RunDirectory(tmp_path)
    run.metrics.write_text(RECORDS)
    assert [record["epoch"] for record in run.records()] == [1, 2, 3]
    run.metrics.write_text(RECORDS.replace(old, new))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        run.records()


# What a kill before the first state leaves, and what is left of a training that has gone on.
KILLED = [[], ["best.pt"], ["best.pt", "metrics.jsonl"]]
GONE_ON = [["best.pt", "metrics.jsonl", "one more"], ["result.json"], ["a dangling link"]]


@pytest.mark.parametrize("left", KILLED + GONE_ON, ids=", ".join)
def test_a_training_without_its_state_begins_only_if_it_had_none(left, tmp_path):
    run = RunDirectory(tmp_path)
    for name in left:
        if name == "a dangling link":
            run.last.symlink_to("nowhere")
        elif name in ("metrics.jsonl", "one more"):
            run.append_record({"epoch": 1 + (name == "one more")})
        else:
            (tmp_path / name).write_text("{}")
    before = run.records()
    with run:
        checkpoint = TrainingCheckpoint(run, {}, {})
        if left in KILLED:
            assert checkpoint.load() is None
        else:
            with pytest.raises(CheckpointError, match=r"last\.pt: (missing|no such file)"):
                checkpoint.load()
    assert run.records() == before


def test_a_training_with_fewer_records_than_epochs_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    run.append_record({"epoch": 1})
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: ends before epoch 2"):
        run.drop_records_after(2)
    assert run.records() == [{"epoch": 1}]


def test_the_public_names_are_these():
    assert absld.RunDirectory is RunDirectory and absld.digest is digest
