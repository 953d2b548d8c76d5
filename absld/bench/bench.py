"""The bench: the speed of a training step by each engine, and the gain of each technique.

In one run, on one machine: the step of absld_min.py, the engines, and techniques added one by one.
Each is compared with the fastest step so far; the two take turns, so that each step has a neighbour
in time. What does not speed up a step is left out of the rows that follow. Networks are untrained
and images noise: neither changes the arithmetic.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absld.bench.contenders import PARTS, BenchConfig, Contender, EngineStep, FileStep, take_step
from absld.bench.fidelity import Fidelity
from absld.bench.operations import count_operations
from absld.bench.peak_throughput import PeakThroughput
from absld.bench.timing import peak_memory, ratios, spread
from absld.bench.trials import recommended_command, trials
from absld.config.settings import TrainConfig
from absld.engine.techniques import choose_techniques
from absld.errors import UsageError
from absld.storage.environment import environment

SCHEMA = "absld-bench-2"
MIN_GAIN = 1.02  # a technique stays if it makes the median step faster by this factor
MAX_SLOWDOWN = 3.0  # of a first step; a slower one ends the trial
MIN_ROUNDS = 3  # a row with fewer would tell little

Row = dict[str, Any]
"""Name, "kept" and "note"; if it was measured, the figures too."""

StepTimes = list[list[float]]
"""Seconds of the PARTS of each step."""


class Measured(NamedTuple):
    """A contender and its row."""

    contender: Contender
    row: Row

    @property
    def seconds(self) -> float:
        return float(sum(self.row["seconds"].values()))


class Progress(NamedTuple):
    """`done` of `total` rounds of a row; seconds_left: an estimate for all rows."""

    row: str
    done: int
    total: int
    seconds_left: float


class Bench:
    """Measures row by row; `results` holds all rows, and at the end the recommended command."""

    def __init__(
        self, config: BenchConfig, on_progress: Callable[[Progress], None] = lambda progress: None
    ) -> None:
        self.config, self.device, self.on_progress = config, config.resolved_device, on_progress
        self.deadline = time.perf_counter() + 60 * config.minutes
        self.peaks: dict[str, PeakThroughput] = {}  # by precision
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": asdict(config),
            "environment": environment(self.device),
            "rows": [],
        }

    def rows(self) -> Iterator[Row]:
        """Measure the step of absld_min.py, the engines, and the techniques."""
        tried = trials(self.device)
        self.rows_left = sum(not trial.missing for trial in tried) + 3
        file, auto = self.measure_auto()
        yield file.row
        yield auto.row
        self.kept = auto
        for name, changes, missing in tried:
            self.rows_left -= not missing
            kept = self.kept.contender.techniques
            techniques = replace(kept, **changes)
            if techniques == kept:
                missing = missing or f"the same as {self.kept.row['name']}"
            build = partial(EngineStep, self.config, techniques)
            yield self.compete(name, self.kept, build, missing)
        kept = self.kept.contender.techniques
        self.results["recommended"] = recommended_command(kept, self.device)
        with tempfile.TemporaryDirectory() as folder:
            self.rows_left -= 1
            build = partial(EngineStep, self.config, kept, Path(folder))
            yield self.compete("+ a full logit cache", self.kept, build)
            if self.kept is not auto:
                self.rows_left -= 1
                fastest = self.kept.contender
                yield self.compete("all that is kept", file, lambda: fastest)

    def measure_auto(self) -> tuple[Measured, Measured]:
        """Compare `--engine auto` with absld_min.py, whose arithmetic is the same."""
        name, techniques = "--engine auto", choose_techniques(TrainConfig(), self.device)
        self.rows_left -= 1
        self.report(f"{name}, first step", 0, self.config.rounds, math.inf)
        file = FileStep(self.config)
        self.operations = count_operations(file)  # of its first step
        seconds = sum(take_step(file))
        self.fidelity = Fidelity(self.config, file.student.state_dict())
        self.results["plain_attack"] = self.fidelity.plain_range()
        auto = EngineStep(self.config, techniques)
        self.warm_up(name, auto, seconds)
        rounds = self.rounds_that_fit(seconds) or min(MIN_ROUNDS, self.config.rounds)
        file_times, times = self.take_turns(name, (file, auto), rounds, seconds)
        measured = self.measured("absld_min.py", file, file_times)
        return measured, self.measured(name, auto, times, measured, file_times)

    def compete(
        self, name: str, base: Measured, build: Callable[[], Contender], missing: str = ""
    ) -> Row:
        """Compare a contender with `base`, unless something is missing, and keep it if it gains."""
        rounds = self.rounds_that_fit(base.seconds)
        if not rounds:
            missing = missing or f"no time left (--minutes {self.config.minutes:g})"
        if missing:
            return self.unmeasured(name, f"left out: {missing}")
        try:
            contender = build()
            slowdown = self.warm_up(name, contender, base.seconds) / base.seconds
            if slowdown > MAX_SLOWDOWN:
                note = f"stopped: its first step took {slowdown:.1f} times as long"
                return self.unmeasured(name, note)
            pair = base.contender, contender
            base_times, times = self.take_turns(name, pair, rounds, base.seconds)
        except UsageError as error:
            return self.unmeasured(name, f"left out: {error}")
        measured = self.measured(name, contender, times, base, base_times)
        if measured.row["kept"]:
            self.kept = measured
        return measured.row

    def rounds_that_fit(self, seconds: float) -> int:
        """Return the rounds of a row, so that the rows after it can have as many.

        seconds: of a step. It is 0 where the time left is too short for MIN_ROUNDS.
        """
        left, pair = self.deadline - time.perf_counter(), 2 * seconds
        fair = int(left / (self.rows_left + 1) / pair) - 2  # two pairs: what is not a round
        rounds = min(max(fair, MIN_ROUNDS), self.config.rounds)
        return rounds if (rounds + 2) * pair <= left else 0

    def warm_up(self, name: str, contender: Contender, seconds: float) -> float:
        """Return the seconds of a contender's first step.

        One that takes too long may have compiled, captured a graph or loaded kernels: it is
        repeated. seconds: of a step of the contender that this one is compared with.
        """
        self.report(f"{name}, first step", 0, self.config.rounds, seconds)
        taken = sum(take_step(contender))
        return taken if taken <= MAX_SLOWDOWN * seconds else sum(take_step(contender))

    def take_turns(
        self, name: str, pair: tuple[Contender, Contender], rounds: int, seconds: float
    ) -> tuple[StepTimes, StepTimes]:
        """Let both contenders take a step in each round, and return their times.

        The one that begins alternates. The peak throughput is measured after each round, in the
        precision of the second.
        """
        precision = pair[1].techniques.attack_precision
        if precision not in self.peaks:
            peak = PeakThroughput(self.device, precision, self.config.batch_size)
            self.peaks[precision] = peak
        times: tuple[StepTimes, StepTimes] = [], []
        for number in range(rounds):
            for turn in (0, 1) if number % 2 == 0 else (1, 0):
                times[turn].append(take_step(pair[turn]))
            self.peaks[precision].measure()
            self.report(name, number + 1, rounds, seconds)
        return times

    def report(self, name: str, done: int, rounds: int, seconds: float) -> None:
        """Report that rounds of a row are done. seconds: of a step."""
        left = rounds - done + self.rows_left * (self.config.rounds + 2)
        until_deadline = max(self.deadline - time.perf_counter(), 0.0)
        self.on_progress(Progress(name, done, rounds, min(2 * seconds * left, until_deadline)))

    def unmeasured(self, name: str, note: str) -> Row:
        return self.add({"name": name, "kept": False, "note": note})

    def measured(
        self,
        name: str,
        contender: Contender,
        times: StepTimes,
        base: Measured | None = None,
        base_times: StepTimes | None = None,
    ) -> Measured:
        """Add the row of a contender, with its gain over the one that it is compared with."""
        seconds = [sum(parts) for parts in times]
        gain = ratios([sum(parts) for parts in base_times or times], seconds)
        # Against absld_min.py nothing is chosen: its step is not one of `absld train`.
        no_choice = base is None or isinstance(base.contender, FileStep)
        operations = sum(self.operations.values())
        if contender.cached:
            operations -= self.operations["teacher"]
        throughput = operations / statistics.median(seconds)
        peak = self.peaks[contender.techniques.attack_precision]
        memory = peak_memory(self.device, contender.step)
        contender.timer.spans()  # removes the marks of this step
        engine = contender.stepper if isinstance(contender, EngineStep) else None
        row = {
            "name": name,
            "kept": no_choice or gain["median"] >= MIN_GAIN,
            "note": "",
            "techniques": asdict(contender.techniques),
            "logit_cache": contender.cached,
            "compared_with": base.row["name"] if base else None,
            "gain": gain,
            "times_file": gain["median"] * (base.row["times_file"] if base else 1.0),
            "images_per_second": spread([self.config.batch_size / s for s in seconds]),
            "seconds": dict(
                zip(PARTS, map(statistics.median, zip(*times, strict=True)), strict=True)
            ),
            "operations_per_second": throughput,
            "peak_throughput": {"precision": peak.precision, **peak.best},
            "shares": {kernel: throughput / best for kernel, best in peak.best.items()},
            "memory_bytes": memory,
            "objective": self.fidelity.compare(engine) if engine else None,
        }
        return Measured(contender, self.add(row))

    def add(self, row: Row) -> Row:
        self.results["rows"].append(row)
        return row
