"""The bench: its rows are what they say, and its figures follow from the times."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import absld.bench.bench
import absld_min
from absld.bench.bench import (
    PARTS,
    Bench,
    BenchConfig,
    EngineStep,
    PlainStep,
    Setting,
    Times,
    added,
    operations,
    take_turns,
    techniques,
)
from absld.bench.peak_throughput import Ceilings
from absld.bench.timing import Stopwatch, memory_taken
from absld.cli.app import main
from absld.cli.bench_view import cost_line, flags_that_pay

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = BenchConfig(
    student="convnet",
    teacher_model="convnet",
    batch_size=4,
    image_size=8,
    images=40,
    rounds=2,
    compile=False,
    device="cpu",
)
SETTING = Setting(CONFIG, CPU)


@pytest.fixture
def small(monkeypatch):
    """Growth by a factor, but of little."""
    monkeypatch.setattr(absld.bench.bench, "SIZES", ((20, 3), (40, 3), (20, 5)))
    monkeypatch.setitem(absld.bench.peak_throughput.SIZE, "cpu", 64)
    monkeypatch.setattr(absld.bench.peak_throughput, "LEAST", 0.0001)


# --- What takes a step ---


def test_the_plain_step_is_that_of_the_single_file(monkeypatch):
    """And the engine's is that of the trainer: each from the same weights."""
    seen = []
    step = absld_min.absld_step
    monkeypatch.setattr(absld_min, "absld_step", lambda *given: seen.append(1) or step(*given))
    plain = PlainStep(SETTING)
    first = absld.digest(plain.student.state_dict())
    plain.step()
    assert seen == [1] and absld.digest(plain.student.state_dict()) != first
    engine = EngineStep(SETTING, {}, "")
    assert absld.digest(engine.training.student.state_dict()) == first
    engine.prepare()
    engine.step()
    assert engine.training.progress.step == 1


@pytest.mark.parametrize("kind", [PlainStep, lambda setting: EngineStep(setting, {}, "")])
def test_the_parts_of_a_step_are_told_apart(kind):
    """By a clock that ticks once for a mark, once for a forward of the student under attack, and a
    hundred times for one of its training."""
    contender = kind(SETTING)
    student = getattr(contender, "training", contender).student
    clock = iter(range(1000))

    def ticks(module, _):
        for _ in range(100 if module.training else 1):
            next(clock)

    student.register_forward_pre_hook(ticks)
    contender.prepare()
    contender.watch.mark = lambda: contender.watch.marks.append(float(next(clock)))
    contender.step()
    teacher, attack, training = contender.watch.spans()
    # The mark before the training comes before or after the tick of its first forward.
    assert teacher == 1 and attack in (11, 111) and attack + training == 212


def test_a_bank_is_filled_before_the_step(tmp_path):
    engine = EngineStep(SETTING, {"bank": True}, str(tmp_path))
    asked = []
    engine.training.teacher.teacher.register_forward_hook(lambda *_: asked.append(1))
    for _ in range(12):  # more than an epoch
        engine.prepare()
        asked.clear()
        engine.step()
        assert not asked


def test_epochs_follow_each_other():
    engine = EngineStep(SETTING, {}, "")
    for _ in range(12):
        engine.prepare()
        engine.step()
    assert engine.training.progress.epoch == 2


def test_a_batch_larger_than_the_images_is_an_epoch():
    large = Setting(replace(CONFIG, batch_size=50), CPU)
    assert len(large.images()) == 50
    PlainStep(large).step()


def test_operations_are_counted():
    """A convnet by hand: two for each multiplication and addition."""
    forward = 2 * 4 * (64 * 27 * 16 + 16 * 144 * 32 + 4 * 288 * 64 + 64 * 10)
    first = 2 * 4 * 64 * 27 * 16  # whose input needs no gradient in training
    found = operations(PlainStep(SETTING))
    assert found["teacher"] == forward
    assert found["attack"] == 10 * 2 * forward
    assert found["training"] == 2 * (3 * forward - first)


# --- Turns ---


class Fake:
    """Takes the seconds it is given."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log, self.watch = name, seconds, log, self

    def prepare(self):
        self.log.append(f"prepare {self.name}")

    def step(self):
        self.log.append(self.name)

    def spans(self):
        return list(self.seconds)


def test_steps_take_turns_and_the_first_round_does_not_count():
    log, rounds = [], []
    fakes = [Fake("a", (1.0, 1.0), log), Fake("b", (0.5, 0.25), log)]
    times = take_turns(fakes, 2, lambda: rounds.append(1))
    assert [entry for entry in log if " " not in entry] == ["a", "b", "b", "a", "a", "b"]
    assert log[:2] == ["prepare a", "a"] and len(rounds) == 3
    assert [each.totals() for each in times] == [[2.0, 2.0], [0.75, 0.75]]


# --- Techniques ---


def test_precisions_that_are_kept_stay():
    one = added({}, {"teacher_precision": "bf16"})
    both = added(one, {"precision": "bf16"})
    assert both == {"teacher_precision": "bf16", "precision": "bf16", "attack_precision": "tf32"}
    assert added({}, {"precision": "bf16"}) == {
        "precision": "bf16", "teacher_precision": "tf32", "attack_precision": "tf32",
    }  # fmt: skip


def test_what_only_cuda_has_is_tried_there():
    on_cpu, on_cuda = ([t.name for t in techniques(d, compile=True)] for d in (CPU, CUDA))
    assert set(on_cuda) - set(on_cpu) == {"cuda-graph", "check-every 100"}
    assert "compile" in on_cpu and "compile" not in [t.name for t in techniques(CPU, compile=False)]


def test_what_does_not_pay_is_left_out_of_what_follows(small, monkeypatch):
    """The seconds of a step are decided here: folding pays, channels-last does not."""
    monkeypatch.setattr(
        absld.bench.bench,
        "EngineStep",
        lambda setting, settings, folder: SimpleNamespace(
            settings=settings, watch=Stopwatch(CPU), prepare=print, step=print
        ),
    )
    seconds = {"fold_batch_norm": -2.0, "channels_last": 0.5, "bank": -1.0}

    def turns(contenders, rounds, between):
        between()
        took = [
            6.0 + sum(seconds.get(name, 0.0) for name in each.settings)
            if isinstance(each, SimpleNamespace)
            else 10.0
            for each in contenders
        ]
        return [Times([[each / 4, each / 2, each / 4]] * 3) for each in took]

    monkeypatch.setattr(absld.bench.bench, "take_turns", turns)
    monkeypatch.setattr(Bench, "memory", lambda *given: None)
    bench = Bench(CONFIG)
    rows = {row["name"]: row for row in bench.rows()}
    assert rows["absld, nothing on"]["ratio_to_plain"]["median"] == pytest.approx(10 / 6)
    fold, last = rows["+ fold-batch-norm"], rows["+ channels-last"]
    assert fold["kept"] and fold["gain"]["median"] == pytest.approx(1.5)
    assert not last["kept"] and last["gain"]["median"] == pytest.approx(4 / 4.5)
    bank = rows["+ a filled bank"]
    assert bank["settings"] == {"fold_batch_norm": True, "bank": True} and bank["kept"]
    assert bank["ratio_to_plain"]["median"] == pytest.approx(10 / 3)
    assert flags_that_pay(bench.kept) == "--fold-batch-norm"
    done = sum(bench.operations.values())
    assert fold["operations_per_second"] == pytest.approx(done / 4.0)
    assert bank["operations_per_second"] == pytest.approx(
        (done - bench.operations["teacher"]) / 3.0
    )
    assert fold["shares"]["matmul"] == pytest.approx(done / 4.0 / fold["ceilings"]["matmul"])


def test_flags_say_a_precision_once():
    parts = {"teacher_precision": "bf16", "attack_precision": "bf16"}
    assert flags_that_pay(parts | {"precision": "bf16"}) == "--precision bf16"
    assert flags_that_pay(parts) == "--teacher-precision bf16 --attack-precision bf16"
    assert flags_that_pay({"bank": True}) == ""


# --- All of it ---


def test_a_bench(small, capfd, monkeypatch):
    """From the command line, with real steps of small networks."""
    flags = ["bench", "--student", "convnet", "--teacher-model", "convnet", "--batch-size", "4"]
    flags += ["--image-size", "8", "--rounds", "2", "--no-compile", "--device", "cpu", "--json"]
    monkeypatch.setattr("sys.argv", ["absld", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    out, err = capfd.readouterr()
    document = json.loads(out)
    rows = document["rows"]
    assert [row["name"] for row in rows] == [
        "absld_min.py",
        "absld, nothing on",
        *(f"+ {technique.name}" for technique in techniques(CPU, compile=False)),
    ]
    assert rows[0]["ratio_to_plain"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    for row in rows:
        rate = row["images_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
        assert set(row["seconds"]) == set(PARTS) and min(row["seconds"].values()) >= 0
        assert row["objective"]["share"] == pytest.approx(1, abs=0.05)
    # In full precision the attack is the plain one, to the sign.
    assert [row["objective"]["share"] for row in rows[:3]] == pytest.approx([1, 1, 1], abs=1e-5)
    small, many, wide = document["growth"]
    assert many["bank_bytes"] == 2 * small["bank_bytes"]
    assert wide["bank_bytes"] == small["bank_bytes"] * 6 // 4
    assert document["settings"]["rounds"] == 2 and document["environment"]["torch"]
    lines = err.splitlines()
    assert lines[0].startswith("step ") and lines[1].startswith("absld_min.py ")
    assert re.search(r"^here: (absld train --|no flag pays)", err, re.MULTILINE)
    # The command that pays is one line to copy, however many flags it has.
    assert all(len(line) <= 100 for line in lines if not line.startswith("here: "))
    assert len(lines[1]) <= 80


def test_a_bank_on_the_disk_has_the_size_that_was_computed(small):
    bench = Bench(CONFIG)
    bench.kept = {"bank": True}
    assert all(row["bank_on_disk"] for row in bench.growth())


def test_names_that_do_not_exist(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["absld", "bench", "--student", "vgg", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "there is no network 'vgg'\nthere are: convnet" in capfd.readouterr().err


# --- Time, memory, ceilings ---


def test_ceilings_keep_the_best(small, monkeypatch):
    monkeypatch.setattr(absld.bench.peak_throughput, "LEAST", 0.03)
    ceilings = Ceilings(CPU, "fp32", 4)
    seconds = iter([0.01, 0.02, 0.01, 0.5])
    ceilings.watch.time = lambda work: next(seconds)
    ceilings.measure()
    assert ceilings.best["matmul"] == pytest.approx(2 * 64**3 / 0.01)
    assert ceilings.best["conv3x3"] == pytest.approx(2 * 4 * 16**2 * 9 * 256**2 / 0.01)


def test_memory_of_work_is_what_it_takes():
    """64 MiB at once, and half of that again."""
    if memory_taken(CPU, lambda: None) is None:
        pytest.skip("this system does not tell")
    taken = memory_taken(CPU, lambda: torch.ones(2**24).sum())
    assert 60 * 2**20 < taken < 100 * 2**20


def test_a_system_that_does_not_tell_of_memory(monkeypatch):
    done = []
    monkeypatch.setattr("absld.bench.timing.status_bytes", lambda name: {}[name])
    assert memory_taken(CPU, lambda: done.append(1)) is None and done == [1]


def test_a_stopwatch():
    watch = Stopwatch(CPU)
    assert watch.time(lambda: None) >= 0 and watch.marks == []
    watch.marks = [1.0, 1.5, 4.0]
    assert watch.spans() == [0.5, 2.5] and watch.spans() == []


def test_a_row_shows_what_was_not_measured(small):
    row = next(Bench(CONFIG).rows())
    assert cost_line(row | {"memory_bytes": None}).endswith("  -")
