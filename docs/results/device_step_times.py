"""Time a training step with each engine, and with its techniques one by one, beside absld_min.py.

    python docs/results/device_step_times.py --student resnet18 --json steps-resnet18.json

`absld bench` adds techniques that help here, one to another; this measures a fixed list, which is
the same on every device. Each contender takes --steps steps in a row, in turns, in each of --rounds
rounds: within such a row the host may run ahead of the device, as in a training. Ratios are taken
round by round. What a device cannot do is named and left out.
"""

import copy
import json
import statistics
import tempfile
import time
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from absld.bench.contenders import BenchConfig, Contender, EngineStep, FileStep
from absld.config.settings import TrainConfig
from absld.engine.techniques import choose_techniques
from absld.models.architectures import build_model
from absld.storage.environment import environment

WARM_UP = 3  # steps
SINGLE_FILE, CACHED = "absld_min.py", "fast, logits cached"
TF32: dict[str, Any] = {"engine": "plain", "precision": "tf32"}
FOLDED: dict[str, Any] = {"fold_batch_norm": True, "channels_last": True}
SETTINGS: dict[str, dict[str, Any]] = {
    SINGLE_FILE: {},
    "plain": {"engine": "plain"},
    "plain, TF32": TF32,
    "plain, TF32, channels last": TF32 | {"channels_last": True},
    "auto": {"engine": "auto"},
    "plain, bf16, channels last, folded": {"engine": "plain", "precision": "bf16"} | FOLDED,
    "fast": {"engine": "fast"},
    CACHED: {"engine": "fast"},
    "fast, compiled": {"engine": "fast", "compile": True},
}


@cache
def network(name: str, classes: int, role: str, device: torch.device) -> nn.Module:
    return build_model(name, classes, "bench", role).to(device)


class Bench(BenchConfig):
    """Settings of a bench that builds each network once."""

    def network(self, role: str) -> nn.Module:
        name = self.teacher_model if role == "teacher" else self.student
        return copy.deepcopy(network(name, self.classes, role, self.resolved_device))


@dataclass
class Row:
    """A contender and what was measured of it, a value a round.

    memory: bytes of the device in use at its peak, beyond those in use before it was made.
    """

    name: str
    contender: Contender
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)

    def take(self, steps: int) -> tuple[float, float]:
        """Take steps; return the seconds of one, and those until the host had launched it."""
        start = time.perf_counter()
        for _ in range(steps):
            self.contender.step()
        host = time.perf_counter() - start
        return sum(self.contender.timer.spans()) / steps, host / steps

    def figures(self, bench: BenchConfig, first: "Row") -> dict[str, Any]:
        """Return the figures; ratios are to the first row."""
        seconds = statistics.median(self.seconds)
        ratios = [a / b for a, b in zip(first.seconds, self.seconds, strict=True)]
        return {
            "name": self.name,
            "techniques": asdict(self.contender.techniques),
            "milliseconds": 1000 * seconds,
            "host_milliseconds": 1000 * statistics.median(self.host_seconds),
            "images_per_second": bench.batch_size / seconds,
            "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
            "memory_bytes": self.memory,
            "seconds": self.seconds,
        }


def make(name: str, bench: BenchConfig, folder: Path) -> Row | None:
    """Make a contender and take its first steps; None, and a line, if the device cannot."""
    device, start, before = bench.resolved_device, time.perf_counter(), 0
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    try:
        techniques = choose_techniques(TrainConfig(**SETTINGS[name]), device)
        cache_folder = folder if name == CACHED else None
        row = Row(
            name,
            FileStep(bench) if name == SINGLE_FILE else EngineStep(bench, techniques, cache_folder),
        )
        row.take(WARM_UP)
    except Exception as error:
        cause = (str(error).splitlines() or [""])[0]
        print(f"{name}: left out, {type(error).__name__}: {cause}", flush=True)
        return None
    if on_cuda:
        row.memory = torch.cuda.max_memory_allocated(device) - before
    print(f"{name}: ready after {time.perf_counter() - start:.1f} s", flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        f"| step | ms | host, ms | images/s | speed over {rows[0]['name']} | memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        median, least, greatest = row["ratio"]
        memory = "" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 2**20:,.0f}"
        lines.append(
            f"| {row['name']} | {row['milliseconds']:.1f} | {row['host_milliseconds']:.1f} | "
            f"{row['images_per_second']:,.0f} | {median:.2f} ({least:.2f} to {greatest:.2f}) | "
            f"{memory} |"
        )
    return "\n".join(lines)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__)
    for name in ("student", "teacher_model", "batch_size", "images", "device"):
        default = getattr(BenchConfig, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--skip", nargs="*", choices=SETTINGS, default=[])
    parser.add_argument("--seconds", type=float, default=600, help="make no contender after these")
    parser.add_argument("--json", type=Path, default="steps.json", help="file of all figures")
    return parser.parse_args()


def main() -> None:
    options, start = parse(), time.perf_counter()
    bench = Bench(
        student=options.student,
        teacher_model=options.teacher_model,
        batch_size=options.batch_size,
        images=options.images,
        device=options.device,
    )
    document = {"environment": environment(bench.resolved_device), "settings": asdict(bench)}
    with tempfile.TemporaryDirectory() as folder:
        rows: list[Row] = []
        for name in SETTINGS:
            if name in options.skip or time.perf_counter() - start > options.seconds:
                print(f"{name}: left out")
            elif row := make(name, bench, Path(folder)):
                rows.append(row)
        for number in range(options.rounds):
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                seconds, host = row.take(options.steps)
                row.seconds.append(seconds)
                row.host_seconds.append(host)
        figures = [row.figures(bench, rows[0]) for row in rows]
    options.json.write_text(json.dumps(document | {"rows": figures}, indent=1) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
