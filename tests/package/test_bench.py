"""The bench: its rows are what they say, and its figures follow from the times."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import absld.bench.bench
import absld_min
from absld.bench.bench import Bench, take_turns, totals
from absld.bench.contenders import (
    PARTS,
    BenchConfig,
    EngineStep,
    PlainStep,
    combine,
    techniques,
)
from absld.bench.operations import count_operations
from absld.bench.peak_throughput import PeakThroughput
from absld.bench.timing import Timer, peak_memory
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


@pytest.fixture
def small(monkeypatch):
    """Small sizes for growth, and short measurements of the peak throughput."""
    monkeypatch.setattr(absld.bench.bench, "SIZES", ((20, 3), (40, 3), (20, 5)))
    monkeypatch.setitem(absld.bench.peak_throughput.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setattr(absld.bench.peak_throughput, "MIN_SECONDS", 0.0001)


# --- What takes a step ---


def test_the_plain_step_is_that_of_the_single_file(monkeypatch):
    """And the engine's is that of the trainer: each from the same weights."""
    calls = []
    step = absld_min.absld_step
    monkeypatch.setattr(absld_min, "absld_step", lambda *given: calls.append(1) or step(*given))
    plain = PlainStep(CONFIG)
    initial = absld.digest(plain.student.state_dict())
    plain.step()
    assert calls == [1] and absld.digest(plain.student.state_dict()) != initial
    engine = EngineStep(CONFIG, {}, "")
    assert absld.digest(engine.stepper.student.state_dict()) == initial
    engine.prepare()
    engine.step()
    assert engine.metrics.sums["loss"] > 0
    assert absld.digest(engine.stepper.student.state_dict()) != initial


@pytest.mark.parametrize("kind", [PlainStep, lambda config: EngineStep(config, {}, "")])
def test_the_parts_of_a_step_are_timed(kind):
    """By a clock that ticks once for a mark, once for a forward of the student under attack, and a
    hundred times for one of its training."""
    contender = kind(CONFIG)
    student = getattr(contender, "stepper", contender).student
    clock = iter(range(1000))

    def ticks(module, _):
        for _ in range(100 if module.training else 1):
            next(clock)

    student.register_forward_pre_hook(ticks)
    contender.prepare()
    contender.timer.now = lambda: float(next(clock))
    contender.step()
    teacher, attack, training = contender.timer.spans()
    # The mark before the training comes before or after the tick of its first forward.
    assert teacher == 1 and attack in (11, 111) and attack + training == 212


def test_the_logit_cache_has_a_batch_before_the_step(tmp_path):
    engine = EngineStep(CONFIG, {"logit_cache": True}, str(tmp_path))
    evaluations = []
    engine.stepper.teacher.teacher.register_forward_hook(lambda *_: evaluations.append(1))
    for _ in range(12):  # more than an epoch
        engine.prepare()
        evaluations.clear()
        engine.step()
        assert not evaluations


def test_epochs_follow_each_other():
    engine = EngineStep(CONFIG, {}, "")
    for _ in range(12):
        engine.prepare()
        engine.step()
    assert (engine.epoch, engine.number) == (2, 1)


def test_a_batch_larger_than_the_images_is_an_epoch():
    large = replace(CONFIG, batch_size=50)
    assert len(large.image_set()) == 50
    PlainStep(large).step()


def test_operations_are_counted():
    """A convnet by hand: two for each multiplication and addition."""
    forward = 2 * 4 * (64 * 27 * 16 + 16 * 144 * 32 + 4 * 288 * 64 + 64 * 10)
    first = 2 * 4 * 64 * 27 * 16  # whose input needs no gradient in training
    operations = count_operations(PlainStep(CONFIG))
    assert operations["teacher"] == forward
    assert operations["attack"] == 10 * 2 * forward
    assert operations["training"] == 2 * (3 * forward - first)


# --- Turns ---


class Fake:
    """Takes the seconds it is given."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log, self.timer = name, seconds, log, self

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
    assert [*map(totals, times)] == [[2.0, 2.0], [0.75, 0.75]]


# --- Techniques ---


def test_precisions_that_are_kept_stay():
    one = combine({}, {"teacher_precision": "bf16"})
    both = combine(one, {"precision": "bf16"})
    assert both == {"teacher_precision": "bf16", "precision": "bf16", "attack_precision": "tf32"}
    assert combine({}, {"precision": "bf16"}) == {
        "precision": "bf16", "teacher_precision": "tf32", "attack_precision": "tf32",
    }  # fmt: skip


def test_techniques_of_cuda_are_tried_on_cuda_only():
    on_cpu, on_cuda = (techniques(device, compile=True) for device in (CPU, CUDA))
    assert set(on_cuda) - set(on_cpu) == {"cuda-graph", "check-every 100"}
    assert "compile" in on_cpu and "compile" not in techniques(CPU, compile=False)


def test_a_technique_that_does_not_pay_is_left_out_of_later_rows(small, monkeypatch):
    """The seconds of a step are decided here: folding pays, channels-last does not."""
    monkeypatch.setattr(
        absld.bench.bench,
        "EngineStep",
        lambda config, settings, folder: SimpleNamespace(
            settings=settings, timer=Timer(CPU), prepare=print, step=print
        ),
    )
    seconds = {"fold_batch_norm": -2.0, "channels_last": 0.5, "logit_cache": -1.0}

    def turns(contenders, rounds, after_round):
        after_round()
        steps = [
            6.0 + sum(seconds.get(name, 0.0) for name in contender.settings)
            if isinstance(contender, SimpleNamespace)
            else 10.0
            for contender in contenders
        ]
        return [[[step / 4, step / 2, step / 4]] * 3 for step in steps]

    monkeypatch.setattr(absld.bench.bench, "take_turns", turns)
    bench = Bench(CONFIG)
    rows = {row["name"]: row for row in bench.rows()}
    assert rows["absld, nothing on"]["ratio_to_plain"]["median"] == pytest.approx(10 / 6)
    fold, channels_last = rows["+ fold-batch-norm"], rows["+ channels-last"]
    assert fold["kept"] and fold["gain"]["median"] == pytest.approx(1.5)
    assert not channels_last["kept"]
    assert channels_last["gain"]["median"] == pytest.approx(4 / 4.5)
    cache = rows["+ a filled logit cache"]
    assert cache["settings"] == {"fold_batch_norm": True, "logit_cache": True} and cache["kept"]
    assert cache["ratio_to_plain"]["median"] == pytest.approx(10 / 3)
    assert flags_that_pay(bench.kept) == "--fold-batch-norm"
    operations, of_teacher = sum(bench.operations.values()), bench.operations["teacher"]
    assert fold["operations_per_second"] == pytest.approx(operations / 4.0)
    assert cache["operations_per_second"] == pytest.approx((operations - of_teacher) / 3.0)
    assert fold["shares"]["matmul"] == pytest.approx(
        operations / 4.0 / fold["peak_throughput"]["matmul"]
    )


def test_flags_name_a_precision_once():
    parts = {"teacher_precision": "bf16", "attack_precision": "bf16"}
    assert flags_that_pay(parts | {"precision": "bf16"}) == "--precision bf16"
    assert flags_that_pay(parts) == "--teacher-precision bf16 --attack-precision bf16"
    assert flags_that_pay({"logit_cache": True}) == ""


# --- All of it ---


def test_the_command_prints_every_row_and_writes_them_as_json(small, capfd, monkeypatch):
    """From the command line, with real steps of small networks."""
    flags = ["bench", "--student", "convnet", "--teacher-model", "convnet", "--batch-size", "4"]
    flags += ["--image-size", "8", "--rounds", "2", "--no-compile", "--device", "cpu", "--json"]
    monkeypatch.setattr("sys.argv", ["absld", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    out, err = capfd.readouterr()
    results = json.loads(out)
    rows = results["rows"]
    assert [row["name"] for row in rows] == [
        "absld_min.py",
        "absld, nothing on",
        *(f"+ {name}" for name in techniques(CPU, compile=False)),
    ]
    assert rows[0]["ratio_to_plain"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    for row in rows:
        rate = row["images_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
        assert set(row["seconds"]) == set(PARTS) and min(row["seconds"].values()) >= 0
        assert row["objective"]["share"] == pytest.approx(1, abs=0.05)
    # In full precision the attack is the plain one, to the sign.
    assert [row["objective"]["share"] for row in rows[:3]] == pytest.approx([1, 1, 1], abs=1e-5)
    small, many, wide = results["growth"]
    assert many["cache_bytes"] == 2 * small["cache_bytes"]
    assert wide["cache_bytes"] == small["cache_bytes"] * 6 // 4
    assert results["settings"]["rounds"] == 2 and results["environment"]["torch"]
    lines = err.splitlines()
    assert lines[0].startswith("step ") and lines[1].startswith("absld_min.py ")
    assert re.search(
        r"^(recommended: absld train --|no flag makes a step faster)", err, re.MULTILINE
    )
    # The command that pays is one line to copy, however many flags it has.
    assert all(len(line) <= 100 for line in lines if not line.startswith("recommended: "))
    assert len(lines[1]) <= 80


def test_a_logit_cache_on_the_disk_has_the_size_that_was_computed(small):
    bench = Bench(CONFIG)
    bench.kept = {"logit_cache": True}
    assert all(row["cache_on_disk"] for row in bench.growth())


def test_a_network_that_does_not_exist_is_refused(capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["absld", "bench", "--student", "vgg", "--device", "cpu"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "there is no network 'vgg'\nthere are: convnet" in capfd.readouterr().err


# --- Time, memory, peak throughput ---


def test_peak_throughput_is_the_best_of_all_runs(small, monkeypatch):
    monkeypatch.setattr(absld.bench.peak_throughput, "MIN_SECONDS", 0.03)
    peak_throughput = PeakThroughput(CPU, "fp32", 4)
    seconds = iter([0.01, 0.02, 0.01, 0.5])
    peak_throughput.timer.time = lambda work: next(seconds)
    peak_throughput.measure()
    assert peak_throughput.best["matmul"] == pytest.approx(2 * 64**3 / 0.01)
    assert peak_throughput.best["conv3x3"] == pytest.approx(2 * 4 * 16**2 * 9 * 256**2 / 0.01)


def test_peak_memory_is_what_the_work_takes():
    """64 MiB at once, and half of that again."""
    if peak_memory(CPU, lambda: None) is None:
        pytest.skip("this system does not report memory")
    taken = peak_memory(CPU, lambda: torch.ones(2**24).sum())
    assert 60 * 2**20 < taken < 100 * 2**20


def test_peak_memory_is_none_where_the_system_does_not_report_it(monkeypatch):
    done = []
    monkeypatch.setattr("absld.bench.timing.status_bytes", lambda name: {}[name])
    assert peak_memory(CPU, lambda: done.append(1)) is None and done == [1]


def test_a_timer_gives_the_spans_between_its_marks_once():
    timer = Timer(CPU)
    assert timer.time(lambda: None) >= 0 and timer.marks == []
    timer.marks = [1.0, 1.5, 4.0]
    assert timer.spans() == [0.5, 2.5] and timer.spans() == []


def test_a_row_shows_that_memory_was_not_measured(small):
    row = next(Bench(CONFIG).rows())
    assert cost_line(row | {"memory_bytes": None}).endswith("  -")
