"""The bench: the speed of a training step, and the gain of each technique of the engine.

In one run, on one machine: the plain step of absld_min.py, then the package's engine with each
technique added in turn. Steps take turns, so that each is compared with its neighbours in time; a
technique that does not speed up a step is left out of what follows. Networks are untrained and images noise:
neither changes the arithmetic.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from absld.bench.contenders import (
    PARTS,
    BenchConfig,
    Contender,
    EngineStep,
    PlainStep,
    combine,
    techniques,
    train_config,
)
from absld.bench.fidelity import Fidelity
from absld.bench.operations import count_operations
from absld.bench.peak_throughput import PeakThroughput
from absld.bench.timing import peak_memory, ratios, spread
from absld.config.settings import TrainConfig
from absld.engine.logit_cache import cache_bytes, cache_rows
from absld.storage.environment import environment

SCHEMA = "absld-bench-1"
MIN_GAIN = 1.02  # a technique stays if it makes the median step faster by this factor
SIZES = ((1_000, 10), (50_000, 10), (1_000, 200))  # images and classes, for growth

StepTimes = list[list[float]]
"""Seconds of the PARTS of each step."""


def totals(times: StepTimes) -> list[float]:
    return [sum(parts) for parts in times]


def take_turns(
    contenders: list[Contender], rounds: int, after_round: Callable[[], None]
) -> list[StepTimes]:
    """Let all contenders take a step in each round, and return their times.

    Each round begins with another contender; the first round warms up and does not count.
    """
    times: list[StepTimes] = [[] for _ in contenders]
    for number in range(rounds + 1):
        first = number % len(contenders)
        turns = list(zip(contenders, times, strict=True))
        for contender, own_times in turns[first:] + turns[:first]:
            contender.prepare()
            contender.step()
            parts = contender.timer.spans()
            if number:
                own_times.append(parts)
        after_round()
    return times


class Bench:
    """Measures row by row; `results` holds all rows."""

    def __init__(self, config: BenchConfig) -> None:
        self.config, self.device = config, config.resolved_device
        self.kept: dict[str, Any] = {}  # settings of the techniques that speed up a step
        self.results: dict[str, Any] = {
            "schema": SCHEMA,
            "settings": asdict(config),
            "environment": environment(self.device),
            "rows": [],
            "growth": [],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """Measure the plain step, the engine, and the engine with each technique."""
        with tempfile.TemporaryDirectory() as folder:
            plain = PlainStep(self.config)
            self.operations = count_operations(plain)
            self.fidelity = Fidelity(self.config, plain)
            engine = EngineStep(self.config, {}, folder)
            plain_times, times = self.compare([plain, engine], plain.config.precision)
            yield self.row("absld_min.py", {}, plain, plain_times, plain_times)
            yield self.row("absld, nothing on", {}, engine, times, plain_times)
            tried = techniques(self.device, compile=self.config.compile)
            for name, technique in tried.items():
                settings = combine(self.kept, technique)
                candidate = EngineStep(self.config, settings, folder)
                precision = settings.get("precision", TrainConfig.precision)
                precision = settings.get("attack_precision", precision)
                plain_times, before, times = self.compare([plain, engine, candidate], precision)
                row = self.row(f"+ {name}", settings, candidate, times, plain_times, before)
                if row["kept"]:
                    self.kept, engine = settings, candidate
                yield row

    def compare(self, contenders: list[Contender], precision: str) -> list[StepTimes]:
        """Return the times of the contenders, and measure the peak throughput after each round."""
        self.peak = PeakThroughput(self.device, precision, self.config.batch_size)
        return take_turns(contenders, self.config.rounds, self.peak.measure)

    def row(
        self,
        name: str,
        settings: Mapping[str, Any],
        contender: Contender,
        times: StepTimes,
        plain: StepTimes,
        before: StepTimes | None = None,
    ) -> dict[str, Any]:
        """Return the figures of a contender, beside the times of the plain step and of the engine
        before a technique was added."""
        seconds = totals(times)
        gain = ratios(totals(before), seconds) if before else None
        operations = sum(self.operations.values())
        if settings.get("logit_cache"):
            operations -= self.operations["teacher"]
        throughput = operations / statistics.median(seconds)
        contender.prepare()
        memory = peak_memory(self.device, contender.step)
        contender.timer.spans()  # removes the marks of this step
        figures = {
            "name": name,
            "settings": dict(settings),
            "kept": gain is None or gain["median"] >= MIN_GAIN,
            "images_per_second": spread([self.config.batch_size / s for s in seconds]),
            "ratio_to_plain": ratios(totals(plain), seconds),
            "gain": gain,
            "seconds": dict(
                zip(PARTS, map(statistics.median, zip(*times, strict=True)), strict=True)
            ),
            "operations_per_second": throughput,
            "peak_throughput": {"precision": self.peak.precision, **self.peak.best},
            "shares": {kernel: throughput / best for kernel, best in self.peak.best.items()},
            "memory_bytes": memory,
            "objective": self.fidelity.compare(train_config(settings)),
        }
        self.results["rows"].append(figures)
        return figures

    def growth(self) -> Iterator[dict[str, Any]]:
        """Measure the engine, with the techniques that help, for more images and more classes."""
        configs = [
            replace(self.config, images=images, classes=classes) for images, classes in SIZES
        ]
        with tempfile.TemporaryDirectory() as folder:
            contenders = [EngineStep(config, self.kept, folder) for config in configs]
            all_times = take_turns([*contenders], self.config.rounds, lambda: None)
            on_disk = {path.stat().st_size for path in Path(folder).glob("*.cache")}
        for (images, classes), times, contender in zip(SIZES, all_times, contenders, strict=True):
            settings, data = contender.config, contender.stepper.views.data
            rows = cache_rows(len(data), settings.padding, settings.flip)
            size = cache_bytes(rows, classes)
            figures = {
                "name": f"{images:,} images, {classes} classes",
                "images": images,
                "classes": classes,
                "images_per_second": spread([self.config.batch_size / s for s in totals(times)]),
                "ratio_to_first": ratios(totals(all_times[0]), totals(times)),
                "cache_bytes": size,
                "cache_on_disk": size in on_disk if on_disk else None,
            }
            self.results["growth"].append(figures)
            yield figures
