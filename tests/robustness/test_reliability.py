"""A run that is killed, stopped or out of disk space ends, once resumed, as if nothing had happened.

The tests with real processes are marked slow: they kill them at random moments and in the middle of
a write. The figures of their last run are in docs/reliability.md.
"""

import contextlib
import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import strategies as draw
from helpers.processes import processes
from hypothesis import example, given, settings
from hypothesis import strategies as st

import absld
import absld.data.dataset
import absld.runs.training_run
from absld.cli import app as cli
from absld.config.files import read_run_config, to_toml
from absld.config.resolve import resolve
from absld.data.dataset import InMemoryImages, Splits
from absld.engine.logit_cache import CachedTeacher, LogitCache
from absld.errors import AbsldError, CheckpointError
from absld.models.architectures import build_model
from absld.storage.checkpoint import content_digest, load, save
from absld.storage.environment import read_sessions
from absld.storage.run_directory import RunDirectory

THOROUGH = settings().max_examples >= 1000  # in the profile of that name
FLAGS = ["train", "--epochs", "40", "--batch-size", "8", "--max-steps", "2", "--attack-steps", "2"]
FLAGS += ["--allow-weak-teacher", "--device", "cpu"]


def load_noise(*_):
    """Three small sets of noise: there is nothing to learn, and nothing to import."""
    images = (draw.images(0, 60, side=8, dtype=torch.float32) * 255).to(torch.uint8)
    labels = torch.arange(60) % 10
    parts = [InMemoryImages(images[at : at + 20], labels[at : at + 20], tuple("0123456789"))
             for at in (0, 20, 40)]  # fmt: skip
    return Splits(*parts)


# --- Faults of the disk ---


class Disk:
    """Counts what is written; when `room` bytes are, `full` happens, in the middle of a write."""

    def __init__(self, room, full):
        self.room, self.full = room, full

    def open(self, path, mode="r", *given, **named):
        file = open(path, mode, *given, **named)  # noqa: SIM115
        return self.watched(file) if set(mode) & set("wax") else file

    def watched(self, file):
        disk = self

        class Watched:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                file.close()

            def __getattr__(self, name):
                return getattr(file, name)

            def write(self, data):
                data = bytes(data) if isinstance(data, memoryview) else data
                if len(data) > disk.room:
                    file.write(data[: disk.room])
                    file.flush()
                    disk.full()
                disk.room -= len(data)
                return file.write(data)

        return Watched()


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def no_room():
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only():
    raise OSError(errno.EROFS, "Read-only file system")


FAULTS = {"killed": killed, "no room": no_room, "read-only": read_only}


def program(folder, flags, fault=None, room=0, limit=None):
    """Run `absld` on the noise, in this child process; its output goes to the files out and err."""
    os.chdir(folder)
    for number, path in ((1, "out"), (2, "err")):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    absld.runs.planning.load_data = load_noise
    if fault:
        disk = Disk(room, FAULTS[fault])
        Path.open = lambda self, *given, **named: disk.open(self, *given, **named)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["absld", *flags]
    cli.main()


class Run:
    """A run in a folder of its own, started and resumed any number of times."""

    def __init__(self, folder, teacher):
        self.folder, self.flags = folder, [*FLAGS, "--teacher", str(teacher)]
        self.folder.mkdir()

    def begun(self):
        return bool(list(self.folder.glob("runs/digits-*/STATUS")))

    @property
    def path(self):
        (path,) = self.folder.glob("runs/digits-*")
        return path

    def start(self, *fault, after=None, send=signal.SIGKILL):
        """Start or resume, send a signal after so many seconds; return the exit code."""
        flags = [*self.flags, *(["--resume"] if self.begun() else [])]
        (self.folder / "err").unlink(missing_ok=True)
        process = processes.Process(target=program, args=(self.folder, flags, *fault))
        process.start()
        if after is not None:
            process.join(after)
            if process.is_alive():
                os.kill(process.pid, send)
        process.join(120)
        assert process.exitcode is not None, "it goes on and on"
        return process.exitcode

    def errors(self):
        return (self.folder / "err").read_text().splitlines()

    def outcome(self):
        """Everything that a run leaves except times."""
        times = {"seconds": 0, "images_per_second": 0}
        best, last = load(self.path / "best.pt"), load(self.path / "last.pt")
        best["record"] |= times
        last["progress"]["seconds"] = 0
        return {
            "best": content_digest(best),
            "last": content_digest(last),
            "records": [record | times for record in RunDirectory(self.path).records()],
            "result": (self.path / "result.json").read_text(),
            "status": RunDirectory(self.path).status(),
            "files": sorted(path.name for path in self.path.iterdir()),
        }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    save({"model": build_model("convnet", 10, "teacher").state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, teacher):
    """The outcome of a run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("whole") / "run", teacher)
    assert run.start() == 0, run.errors()
    outcome = run.outcome()
    assert len(outcome["records"]) == 40 and outcome["status"] == "finished"
    assert any(value != 1 for value in outcome["records"][-1]["temperature_adv"])
    return outcome


def assert_resumes_to(whole, run):
    """Resume without a fault, and end as if nothing had happened."""
    assert run.start() == 0, run.errors()
    assert run.outcome() == whole


@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path, teacher, whole):
    """At random moments, and after a random number of bytes written; in as many runs as it takes.

    A hundred in the profile `thorough`, else twenty.
    """
    chance, kills, runs = random.Random(1), {"moment": 0, "write": 0}, 0
    while min(kills.values()) < (50 if THOROUGH else 10):
        run = Run(tmp_path / str(runs), teacher)
        for attempt in range(1000):
            if attempt % 2:
                kind, code = "moment", run.start(after=chance.uniform(0.05, 0.8))
            else:
                kind, code = "write", run.start("killed", int(10 ** chance.uniform(1, 6.5)))
            if code == 0:
                break
            assert code == -signal.SIGKILL, run.errors()
            kills[kind] += 1
        assert run.outcome() == whole
        runs += 1
    print(f"killed {kills}, in {runs} runs")


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@pytest.mark.slow
def test_a_run_stopped_by_signals_resumes_to_the_same_result(tmp_path, teacher, whole):
    """Exit code 128 + signal; while it trains, a checkpoint of the very step."""
    chance, codes, saved = random.Random(2), [], 0
    for number in range(20):  # as many as give two signals time to come while it trains
        if number >= (6 if THOROUGH else 4) and len(set(codes)) > 1 and saved:
            break
        run = Run(tmp_path / str(number), teacher)
        for attempt in range(1000):
            send = SIGNALS[attempt % len(SIGNALS)]
            code = run.start(after=chance.uniform(0.3, 3.0), send=send)
            if code == 0:
                break
            if code == -send or not (run.folder / "err").exists():  # before the program began
                continue
            assert code == 128 + send, run.errors()
            codes.append(code)
            if any("Interrupted in epoch" in line for line in run.errors()):
                saved += 1
                assert RunDirectory(run.path).status() == "interrupted"
                load(run.path / "last.pt")
        assert run.outcome() == whole
    counts = ", ".join(f"{codes.count(128 + number)} {number.name}" for number in SIGNALS)
    print(f"{counts}; {saved} times saved")
    assert len(set(codes)) > 1 and saved


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["no room", "read-only"])
def test_a_full_or_read_only_disk_is_an_error_and_loses_nothing(fault, tmp_path, teacher, whole):
    """At a random byte: an error in two lines at once, and nothing is lost."""
    chance = random.Random(3)
    for number in range(10 if THOROUGH else 3):
        run = Run(tmp_path / str(number), teacher)
        assert run.start(fault, int(10 ** chance.uniform(0, 6.5))) == 1
        cause, hint = run.errors()
        text = {"no room": "No space left on device", "read-only": "Read-only file system"}[fault]
        assert cause.startswith("error: ") and text in cause and "permissions of --out" in hint
        for path in run.folder.glob("runs/digits-*/*.pt"):
            load(path)
        assert_resumes_to(whole, run)


@pytest.mark.slow
def test_a_limit_on_file_size_is_an_error_and_loses_nothing(tmp_path, teacher, whole):
    """The kernel's own refusal, by a limit on the size of files."""
    run = Run(tmp_path / "limited", teacher)
    assert run.start(None, 0, 50_000) == 1
    assert "File too large" in run.errors()[0] and len(run.errors()) == 2
    assert not list(run.folder.glob("runs/digits-*/*.pt"))
    assert_resumes_to(whole, run)


# --- One byte flipped ---


def flips(content, places, chance):
    for place in sorted(chance.sample(range(len(content)), min(places, len(content)))):
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        yield bytes(changed)


def test_a_flipped_bit_of_a_checkpoint_is_found_or_changes_nothing(tmp_path):
    """At 200 places."""
    path, chance, found = tmp_path / "net.pt", random.Random(4), 0
    content = {
        "model": build_model("convnet", 10, "x").state_dict(),
        "progress": {"epoch": 3, "losses": {"loss": 0.5}},
        "classes": list("0123456789"),
    }
    save(content, path)
    good = path.read_bytes()
    for changed in flips(good, 200, chance):
        path.write_bytes(changed)
        try:
            assert content_digest(load(path)) == content_digest(content)
        except CheckpointError:
            found += 1
    print(f"{found} of 200 flips found, the others change nothing")
    assert found > 150


def test_a_flipped_bit_of_a_run_s_settings_is_found_or_changes_nothing(tmp_path):
    path, config, found = tmp_path / "config.toml", resolve({"teacher": "a.pt"}), 0
    good = to_toml(config).encode()
    for changed in flips(good, 200, random.Random(5)):
        path.write_bytes(changed)
        try:
            assert read_run_config(path) == config
        except AbsldError:
            found += 1
    print(f"{found} of 200 flips found, the others change nothing")
    assert found > 100


@pytest.mark.parametrize("name", ["metrics.jsonl", "environment.json"])
def test_damaged_records_of_a_run_raise_no_other_error_than_checkpoint_error(name, tmp_path):
    run = RunDirectory(tmp_path)
    run.append_record({"epoch": 1, "seconds": 2.0})
    run.write("environment.json", json.dumps([{"inputs": {}}]))
    path, chance = tmp_path / name, random.Random(6)
    good = path.read_bytes()
    for changed in flips(good, 50, chance):
        path.write_bytes(changed)
        with contextlib.suppress(CheckpointError):
            run.records()
            read_sessions(tmp_path)


# --- Readers while a run writes ---


@pytest.mark.slow
def test_a_reader_sees_whole_files_while_a_run_writes(tmp_path, teacher):
    run = Run(tmp_path / "written", teacher)
    process = processes.Process(target=program, args=(run.folder, run.flags))
    process.start()
    lengths = set()
    while process.is_alive():
        for path in run.folder.glob("runs/digits-*/[!.]*"):  # hidden files are being written
            if path.suffix == ".pt":
                load(path)
            elif path.name == "metrics.jsonl":
                lengths.add(len(RunDirectory(path.parent).records()))
            elif path.name == "config.toml":
                read_run_config(path)
            elif path.name == "STATUS":
                assert path.read_text() in ("running\n", "finished\n")
        time.sleep(0.001)
    assert process.exitcode == 0 and len(lengths) > 3


# --- Numbers that are not finite ---

BREAKS = """
import torch
from absld.models.architectures import build_model

class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, gradient): return gradient * float("inf")

class Breaks(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.net, self.left = build_model("convnet", classes, WHERE), STEP
    def forward(self, x):
        self.left -= COUNTS
        logits = self.net(x)
        if self.left >= 0 or not COUNTS:
            return logits
        if WHERE == "weights":
            self.net[0].weight.data[0] = float("nan")
        if WHERE == "gradient":
            return Infinite.apply(logits)
        return logits if WHERE == "weights" else logits * float("nan")
"""
# The student does two training forwards a step; the teacher one, after one for each of two checks.
WHERES = {"loss": ("self.training", 2), "gradient": ("self.training", 2),
          "weights": ("self.training", 2), "teacher": ("len(x) == 8", 1)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("where", WHERES)
def test_a_value_that_is_not_finite_stops_the_run_before_the_step(where, tmp_path, teacher):
    """At a random step: exit code 5, the step and what broke; what was saved before is whole."""
    step = random.Random(where).randrange(12, 30)
    counts, times = WHERES[where]
    text = BREAKS.replace("WHERE", repr(where)).replace("COUNTS", counts)
    run = Run(tmp_path / where, teacher)
    (run.folder / "mine.py").write_text(text.replace("STEP", str(times * (step - 1))))
    run.flags += ["--logit-cache-gib", "0"]
    run.flags += (
        ["--teacher", "mine:Breaks"] if where == "teacher" else ["--student", "mine:Breaks"]
    )
    assert run.start() == 5
    cause, hint = run.errors()
    epoch, of_epoch = (step + 1) // 2, 2 - step % 2
    assert cause.startswith(f"error: epoch {epoch}, step {of_epoch}: loss ")
    assert ("gradient inf" in cause or "gradient nan" in cause) and "saved before" in hint
    assert RunDirectory(run.path).status().startswith(f"failed: epoch {epoch}, step {of_epoch}")
    for name in ("best.pt", "last.pt"):
        state = load(run.path / name)["model"]
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert load(run.path / "last.pt")["progress"]["epoch"] == epoch
    assert len(RunDirectory(run.path).records()) == epoch - 1


class Half(torch.nn.Module):
    """Gives NaN for the second of three images."""

    def forward(self, x):
        return x.flatten(1)[:, :10] + torch.tensor([[0.0], [torch.nan], [0.0]])


def test_logits_that_are_not_finite_are_not_cached(tmp_path):
    views = absld.data.augmentation.Views(load_noise().train, 1)
    cache = LogitCache.open(tmp_path, {"of": "half"}, len(views), 10)
    cached = CachedTeacher(Half(), cache)
    index = torch.tensor([4, 5, 6])
    assert cached(views.of_numbers(index), index).isfinite().all(1).tolist() == [True, False, True]
    assert cache.read(index)[1].tolist() == [True, False, True]


@pytest.mark.parametrize(
    "counts", [[30, 30], [20, 20, 20], [3] * 100, [100, 1], [99, 1, 50]], ids=lambda c: str(c[:3])
)
def test_two_to_a_hundred_balanced_and_unbalanced_classes_train(counts):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = (draw.images(0, len(labels), side=8, dtype=torch.float32) * 255).to(torch.uint8)
    data = InMemoryImages(images, labels, tuple(map(str, range(len(counts)))))
    config = resolve({"epochs": 2, "batch_size": 20, "attack_steps": 1}).training()
    student, teacher = (build_model("convnet", len(counts), role) for role in ("ours", "theirs"))
    *_, report = absld.fit(student, teacher, data, data, config)
    for name in ("temperature_adv", "temperature_nat"):
        temperature = report.per_class[name]
        assert temperature.shape == (len(counts),)
        assert ((temperature >= 0.5) & (temperature <= 5)).all() and (temperature != 1).any()
    assert report.loss > 0 and report.accuracies.robust.isfinite().all()


# --- Arbitrary and changed files ---


@settings(max_examples=200)
@given(st.binary(max_size=300))
@example(b"PK\x05\x06" + bytes(18))
def test_any_bytes_are_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert str(caught.value) and caught.value.hint


@settings(max_examples=100)
@given(
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_a_changed_file_of_others_is_refused_or_read(tmp_path_factory, old_format, changes):
    """It has no checksum, so other weights may be read: but no crash, no hang, no other error."""
    path = tmp_path_factory.getbasetemp() / "mutant.pt"
    state = {"weight": torch.ones(3, 4), "bias": torch.zeros(3)}
    torch.save(state, path, _use_new_zipfile_serialization=not old_format)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(bytes(content))
    with contextlib.suppress(CheckpointError):
        load(path)
