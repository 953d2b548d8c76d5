"""The bench: its rows are what they say, and its figures follow from the times."""

import contextlib
import json
import math
import platform
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

import absld
import absld.bench.bench as bench_module
import absld_min
from absld.bench import peak_throughput, trials
from absld.bench.bench import Bench, Measured
from absld.bench.contenders import PARTS, BenchConfig, EngineStep, FileStep, take_step
from absld.bench.operations import count_operations
from absld.bench.peak_throughput import PeakThroughput
from absld.bench.timing import Timer, peak_memory
from absld.bench.trials import recommended_command
from absld.cli.app import main
from absld.cli.bench_view import cost_line, row_line
from absld.config.settings import TrainConfig
from absld.engine import techniques as techniques_module
from absld.engine.techniques import Techniques, choose_techniques
from absld.errors import UsageError

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
CONFIG = BenchConfig(
    student="convnet",
    teacher_model="convnet",
    batch_size=4,
    image_size=8,
    images=40,
    rounds=2,
    device="cpu",
)
PLAIN = Techniques()
KEPT = "absld_min.py", "--engine auto"


def hardware(monkeypatch, *, bf16, compiler, capability=(9, 0)):
    """Give the device bfloat16 instructions and a compiler, or neither."""
    for module in (trials, techniques_module):
        monkeypatch.setattr(module, "computes_bf16", lambda device: bf16)
        monkeypatch.setattr(module, "can_compile", lambda device: compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def shorten(monkeypatch):
    """Make measurements short; no step is stopped for being slow, and nothing is compiled."""
    monkeypatch.setitem(peak_throughput.MATRIX_SIZE, "cpu", 64)
    monkeypatch.setattr(peak_throughput, "MIN_SECONDS", 0.0001)
    monkeypatch.setattr(bench_module, "MAX_SLOWDOWN", math.inf)
    hardware(monkeypatch, bf16=False, compiler=False)


@pytest.fixture
def small(monkeypatch):
    shorten(monkeypatch)


@pytest.fixture(scope="module")
def whole():
    """A bench that keeps all it tries: its rows, its reports, and what took a step."""
    run = SimpleNamespace(reports=[], tried=[])

    class Recorded(EngineStep):
        def step(self):
            run.tried.append(self.techniques)
            super().step()

    with pytest.MonkeyPatch.context() as monkeypatch:
        shorten(monkeypatch)
        monkeypatch.setattr(bench_module, "MIN_GAIN", 0.0)
        monkeypatch.setattr(bench_module, "EngineStep", Recorded)
        bench = Bench(CONFIG, run.reports.append)
        run.rows = {row["name"]: row for row in bench.rows()}
    assert [*run.rows.values()] == bench.results["rows"]
    run.recommended = bench.results["recommended"]
    return run


# --- What takes a step ---


def test_one_step_is_that_of_the_single_file_and_the_other_that_of_the_trainer(monkeypatch):
    """Each from the same weights."""
    calls = []
    step = absld_min.absld_step
    monkeypatch.setattr(absld_min, "absld_step", lambda *given: calls.append(1) or step(*given))
    file = FileStep(CONFIG)
    initial = absld.digest(file.student.state_dict())
    file.step()
    assert calls == [1] and absld.digest(file.student.state_dict()) != initial
    engine = EngineStep(CONFIG, PLAIN)
    assert absld.digest(engine.stepper.student.state_dict()) == initial
    engine.step()
    assert engine.metrics.sums["loss"] > 0
    assert absld.digest(engine.stepper.student.state_dict()) != initial


def test_the_first_engine_computes_in_the_precision_of_the_single_file():
    file, auto = FileStep(CONFIG), choose_techniques(TrainConfig(), CPU)
    assert file.techniques == auto == PLAIN


@pytest.mark.parametrize("kind", [FileStep, lambda config: EngineStep(config, PLAIN)])
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
    contender.timer.now = lambda: float(next(clock))
    teacher, attack, training = take_step(contender)
    # The mark before the training comes before or after the tick of its first forward.
    assert teacher == 1 and attack in (11, 111) and attack + training == 212


def test_with_a_full_logit_cache_no_step_evaluates_the_teacher(tmp_path):
    engine = EngineStep(CONFIG, PLAIN, tmp_path)
    evaluations = []
    engine.stepper.teacher.teacher.register_forward_hook(lambda *_: evaluations.append(1))
    for _ in range(12):  # more than an epoch
        take_step(engine)
    assert engine.cached and not evaluations and not EngineStep(CONFIG, PLAIN).cached


def test_epochs_follow_each_other():
    engine = EngineStep(CONFIG, PLAIN)
    places = [next(engine.draws)[1:] for _ in range(12)]
    assert places == [*((1, step) for step in range(10)), (2, 0), (2, 1)]


def test_a_batch_larger_than_the_images_is_an_epoch():
    large = replace(CONFIG, batch_size=50)
    assert len(large.image_set()) == 50
    FileStep(large).step()


def test_operations_are_counted():
    """A convnet by hand: two for each multiplication and addition."""
    forward = 2 * 4 * (64 * 27 * 16 + 16 * 144 * 32 + 4 * 288 * 64 + 64 * 10)
    first = 2 * 4 * 64 * 27 * 16  # whose input needs no gradient in training
    operations = count_operations(FileStep(CONFIG))
    assert operations["teacher"] == forward
    assert operations["attack"] == 10 * 2 * forward
    assert operations["training"] == 2 * (3 * forward - first)


# --- Turns, slow steps, time ---


class Fake:
    """Takes the seconds it is given, one entry a step."""

    techniques, cached = PLAIN, False

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log, self.timer = name, iter(seconds), log, self

    def step(self):
        self.log.append(self.name)

    def spans(self):
        return [next(self.seconds)]


class Scripted:
    """Takes the seconds it is given by a clock of its own, one entry a step."""

    techniques, cached = PLAIN, False

    def __init__(self, *seconds):
        self.seconds, self.timer, self.steps, self.clock = seconds, Timer(CPU), 0, 0.0
        self.timer.now = lambda: self.clock

    def step(self):
        self.timer.mark()
        self.clock += self.seconds[self.steps]
        self.steps += 1
        self.timer.mark()


def started(config=CONFIG, rows_left=0):
    bench = Bench(config)
    bench.rows_left = rows_left
    return bench


def test_two_steps_take_turns(small):
    log = []
    fakes = Fake("a", [1.0, 2.0, 3.0], log), Fake("b", [4.0, 5.0, 6.0], log)
    bench = started()
    times = bench.take_turns("b", fakes, 3, 1.0)
    assert log == ["a", "b", "b", "a", "a", "b"]
    assert times == ([[1.0], [2.0], [3.0]], [[4.0], [5.0], [6.0]])
    assert set(bench.peaks) == {"fp32"} and min(bench.peaks["fp32"].best.values()) > 0


def test_a_trial_ends_when_its_first_step_is_three_times_slower():
    """The slow first step is repeated once, because it may compile; no round follows."""
    base = Measured(Scripted(), {"name": "base", "seconds": {"all": 1.0}})
    slow = Scripted(4.0, 4.0)
    bench = started()
    row = bench.compete("slow", base, lambda: slow)
    assert row["note"] == "stopped: its first step took 4.0 times as long" and not row["kept"]
    assert slow.steps == 2 and bench.results["rows"] == [row]


@pytest.mark.parametrize(("seconds", "steps"), [((3.5, 0.5), 2), ((3.0, 0.5), 1)])
def test_a_first_step_that_compiles_does_not_end_a_trial(seconds, steps):
    contender = Scripted(*seconds)
    assert started().warm_up("compiles", contender, 1.0) == seconds[steps - 1]
    assert contender.steps == steps


def test_a_technique_that_fails_is_left_out_with_the_cause():
    base = Measured(Scripted(), {"name": "base", "seconds": {"all": 0.05}})

    def fail():
        raise UsageError("the student cannot be compiled: no", "--no-compile")

    row = started().compete("compile", base, fail)
    assert row["note"] == "left out: the student cannot be compiled: no" and not row["kept"]


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.1, 5), (1.0, 5), (1.25, 5), (1.5, 4), (2.0, 3), (9.9, 3), (10.1, 0)],
)
def test_rounds_fit_into_the_time_left(monkeypatch, seconds, rounds):
    """100 seconds for five rows; two steps a round, and about two rounds that do not count."""
    monkeypatch.setattr(bench_module.time, "perf_counter", lambda: 50.0)
    bench = started(replace(CONFIG, rounds=5), rows_left=4)
    bench.deadline = 150.0
    assert bench.rounds_that_fit(seconds) == rounds


def test_without_time_left_two_rows_are_measured_and_the_others_named(small):
    rows = list(Bench(replace(CONFIG, minutes=0)).rows())
    assert [row["name"] for row in rows if not row["note"]] == ["absld_min.py", "--engine auto"]
    notes = {row["note"] for row in rows[3:] if "bf16" not in row["name"]}
    assert notes == {
        "left out: no time left (--minutes 0)",
        "left out: torch.compile finds no compiler",
    }


def test_progress_says_the_time_left(whole):
    assert all(0 <= report.done <= report.total == 2 for report in whole.reports)
    left = [report.seconds_left for report in whole.reports]
    assert 500 < left[0] <= 600 and min(left) == left[-1] == 0
    measured = [row["name"] for row in whole.rows.values() if not row["note"]][1:]
    names = [report.row.removesuffix(", first step") for report in whole.reports]
    assert list(dict.fromkeys(names)) == measured


# --- What is tried, and what is kept ---


def names_and_reasons(device):
    return {trial.name: trial.missing for trial in trials.trials(device) if trial.missing}


def test_what_a_device_lacks_is_left_out_by_name(monkeypatch):
    hardware(monkeypatch, bf16=False, compiler=False, capability=(7, 5))
    lacking = {
        "+ --teacher-precision bf16": "no bfloat16 instructions",
        "+ --attack-precision bf16": "no bfloat16 instructions",
        "+ --precision bf16": "no bfloat16 instructions",
        "+ --compile": "torch.compile finds no compiler",
    }
    assert names_and_reasons(CUDA) == lacking
    # On a CPU, the plain engine is the automatic one.
    assert names_and_reasons(CPU) == {"--engine plain": "the same as --engine auto"} | lacking
    hardware(monkeypatch, bf16=True, compiler=True)
    assert not names_and_reasons(CUDA)


def test_no_step_is_taken_of_what_is_left_out(whole):
    assert any(techniques.fold_batch_norm for techniques in whole.tried)
    assert not any("bf16" in asdict(t).values() or t.compile for t in whole.tried)


def test_what_does_not_pay_is_left_out_of_later_rows(small, monkeypatch):
    """The seconds of a step are decided here: folding pays, channels-last does not, bfloat16 is
    far too slow."""
    hardware(monkeypatch, bf16=True, compiler=False)
    monkeypatch.setattr(bench_module, "MAX_SLOWDOWN", 3.0)
    costs = {"fold_batch_norm": -2.0, "channels_last": 0.5, "attack_precision": 30.0}

    def seconds_of_a_step(contender):
        if isinstance(contender, FileStep):
            seconds = 10.0
        else:
            plain, own = asdict(PLAIN), asdict(contender.techniques)
            seconds = 6.0 - contender.cached
            seconds += sum(cost for name, cost in costs.items() if own[name] != plain[name])
        return [seconds / 4, seconds / 2, seconds / 4]

    monkeypatch.setattr(bench_module, "take_step", seconds_of_a_step)
    bench = Bench(replace(CONFIG, minutes=100))
    rows = {row["name"]: row for row in bench.rows()}
    auto, fold, last = (
        rows[n] for n in ("--engine auto", "+ --fold-batch-norm", "+ --channels-last")
    )
    assert auto["gain"]["median"] == pytest.approx(10 / 6) == auto["times_file"]
    assert fold["kept"] and fold["gain"]["median"] == pytest.approx(6 / 4)
    assert not last["kept"] and last["gain"]["median"] == pytest.approx(4 / 4.5)
    assert last["compared_with"] == fold["name"] and last["times_file"] == pytest.approx(10 / 4.5)
    assert rows["+ --attack-precision bf16"]["note"].startswith("stopped: its first step took 8.5")
    assert rows["--engine fast"]["note"].startswith("stopped: ")
    cache, everything = rows["+ a full logit cache"], rows["all that is kept"]
    assert cache["kept"] and cache["logit_cache"] and cache["techniques"] == fold["techniques"]
    assert cache["gain"]["median"] == pytest.approx(4 / 3)
    assert everything["compared_with"] == "absld_min.py"
    assert everything["gain"]["median"] == pytest.approx(10 / 3) == cache["times_file"]
    assert bench.results["recommended"] == "absld train --engine auto --fold-batch-norm"
    operations, of_teacher = sum(bench.operations.values()), bench.operations["teacher"]
    assert fold["operations_per_second"] == pytest.approx(operations / 4.0)
    assert cache["operations_per_second"] == pytest.approx((operations - of_teacher) / 3.0)
    assert fold["shares"]["matmul"] == pytest.approx(
        operations / 4.0 / fold["peak_throughput"]["matmul"]
    )


def test_an_engine_that_is_the_same_as_what_is_kept_is_not_measured_again(whole):
    """Without bfloat16 and compiler, fast is folding and channels-last."""
    assert whole.rows["--engine fast"]["note"] == "left out: the same as + --channels-last"
    assert whole.recommended == "absld train --engine fast"


BF16 = {"precision": "bf16", "attack_precision": "bf16", "teacher_precision": "bf16"}
FAST = BF16 | {"fold_batch_norm": True, "channels_last": True, "compile": True}


@pytest.mark.parametrize(
    ("techniques", "flags"),
    [
        ({}, "--engine auto"),
        ({"fold_batch_norm": True}, "--engine auto --fold-batch-norm"),
        (BF16, "--engine auto --precision bf16"),
        ({"precision": "bf16", "teacher_precision": "bf16"},
         "--engine auto --precision bf16 --attack-precision fp32"),
        (FAST, "--engine fast"),
        (FAST | {"compile": False}, "--engine fast --no-compile"),
    ],
)  # fmt: skip
def test_the_recommended_command_has_the_fewest_flags(monkeypatch, techniques, flags):
    hardware(monkeypatch, bf16=True, compiler=True)
    assert recommended_command(Techniques(**techniques), CPU) == f"absld train {flags}"


def test_the_plain_engine_is_recommended_on_cuda_for_what_it_is(monkeypatch):
    hardware(monkeypatch, bf16=True, compiler=True)
    assert recommended_command(PLAIN, CUDA) == "absld train --engine plain"
    auto = choose_techniques(TrainConfig(), CUDA)
    assert recommended_command(auto, CUDA) == "absld train --engine auto"


# --- All of it ---


def run_command(monkeypatch, capfd, *arguments):
    """Return the exit code and both outputs of `absld bench` with small networks."""
    flags = ["--teacher-model", "convnet", "--image-size", "8", "--device", "cpu", *arguments]
    monkeypatch.setattr("sys.argv", ["absld", "bench", *flags])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, *capfd.readouterr()


def test_the_command_prints_every_row_and_writes_them_as_json(small, capfd, monkeypatch):
    """From the command line, with real steps of small networks."""
    monkeypatch.setattr("absld.cli.view.LINE_EVERY", 0.0)
    code, out, err = run_command(
        monkeypatch, capfd, "--student", "convnet", "--rounds", "2", "--json"
    )
    assert not code
    results = json.loads(out)
    rows = results["rows"]
    names = [*KEPT, *(trial.name for trial in trials.trials(CPU)), "+ a full logit cache"]
    assert [row["name"] for row in rows][: len(names)] == names
    measured = [row for row in rows if not row["note"]]
    assert measured[0]["gain"] == {"median": 1.0, "least": 1.0, "greatest": 1.0}
    for row in measured:
        rate = row["images_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
        assert set(row["seconds"]) == set(PARTS) and min(row["seconds"].values()) >= 0
        # In float32 each attack is the plain one, up to rounding.
        assert row["objective"] is None or row["objective"] == pytest.approx(1, abs=1e-4)
        assert row["peak_throughput"]["precision"] == "fp32"
    assert results["settings"]["batch_size"] == 16 and results["environment"]["torch"]
    lines = err.splitlines()
    assert lines[:2] == ["convnet, teacher convnet", "16 images of 8x8 a step"]
    assert lines[2] == f"cpu ({platform.machine()}) {torch.backends.cpu.get_cpu_capability()}"
    assert [line for line in lines[:-1] if len(line) > 80] == []
    assert lines[-1] == f"recommended: {results['recommended']}"
    assert "--engine auto 1/2, " in err and " left\n" in err
    for row in rows:
        assert row_line(row) in lines
    for row in measured:
        assert cost_line(row) in lines


def test_a_network_that_does_not_exist_is_refused(capfd, monkeypatch):
    code, _, err = run_command(monkeypatch, capfd, "--student", "vgg")
    assert code == 2 and "there is no network 'vgg'\nthere are: convnet" in err


# --- Time, memory, peak throughput ---


def test_peak_throughput_is_the_best_of_all_runs(small, monkeypatch):
    monkeypatch.setattr(peak_throughput, "MIN_SECONDS", 0.03)
    peak = PeakThroughput(CPU, "fp32", 4)
    seconds = iter([0.01, 0.02, 0.01, 0.5])
    peak.timer.time = lambda work: next(seconds)
    peak.measure()
    assert peak.best["matmul"] == pytest.approx(2 * 64**3 / 0.01)
    assert peak.best["conv3x3"] == pytest.approx(2 * 4 * 16**2 * 9 * 256**2 / 0.01)


@pytest.fixture
def second_gpu(monkeypatch):
    """Stands for the events and the memory of CUDA devices; the current device is 0."""
    gpu = SimpleNamespace(current=torch.device("cuda:0"), recorded=[], in_use=100)

    @contextlib.contextmanager
    def device(wanted):
        before, gpu.current = gpu.current, wanted
        yield
        gpu.current = before

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.place = len(gpu.recorded)
            gpu.recorded.append(gpu.current)

        def elapsed_time(self, end):
            return 1000.0 * (end.place - self.place)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    in_use = lambda device: gpu.in_use if device == CUDA else 0  # noqa: E731
    monkeypatch.setattr(torch.cuda, "memory_allocated", in_use)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", in_use)
    return gpu


def test_a_timer_records_on_the_device_that_it_measures(second_gpu):
    assert Timer(CUDA).time(lambda: None) == 1.0
    assert second_gpu.recorded == [CUDA, CUDA] and second_gpu.current == torch.device("cuda:0")


def test_peak_memory_is_that_of_the_device(second_gpu):
    assert peak_memory(CUDA, lambda: setattr(second_gpu, "in_use", 164)) == 64
    assert peak_memory(CPU, lambda: pytest.fail("a step for nothing")) is None


def test_a_timer_gives_the_spans_between_its_marks_once():
    timer = Timer(CPU)
    assert timer.time(lambda: None) >= 0 and timer.marks == []
    timer.marks = [1.0, 1.5, 4.0]
    assert timer.spans() == [0.5, 2.5] and timer.spans() == []


def test_a_row_shows_memory_where_it_was_measured(small):
    row = next(Bench(CONFIG).rows())
    assert cost_line(row).endswith("  -")
    assert cost_line(row | {"memory_bytes": 3 * 2**20}).endswith("  3")
