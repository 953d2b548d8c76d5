"""Time an epoch of absld_min.py and of absld train on the digits, without and with engine flags.

Each command prints a line an epoch; the time between two lines is a whole epoch: its steps, its
validation, its saving and its printing. The commands alternate within one run.
Usage: python docs/results/epoch_cost.py [ROUNDS]
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FLAGS = ["--seed", "0", "--device", "cpu", "--teacher-epochs", "5", "--epochs", "25"]
EPOCH = re.compile(r" *\d+ +\d+\.\d{4} ")  # its number, and its learning rate or loss


def seconds_per_epoch(command: list[str]) -> list[float]:
    """Return the times between the lines of the student's epochs."""
    with tempfile.TemporaryDirectory() as out:
        process = subprocess.Popen(
            [sys.executable, *command, *FLAGS, "--out", out],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout
        times = [time.perf_counter() for line in process.stdout if EPOCH.match(line)]
        if process.wait():
            raise SystemExit(f"{command} ended with {process.returncode}")
    epochs = times[5:]  # the first lines are the teacher's
    return [later - earlier for earlier, later in itertools.pairwise(epochs)]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    package = ["-m", "absld", "train"]
    commands = {
        "single file": ["absld_min.py"],
        "package": package,
        "both flags": [*package, "--fold-batch-norm", "--channels-last"],
    }
    ratios: dict[str, list[float]] = {"package / single file": [], "both flags / package": []}
    for number in range(rounds):
        order = list(commands)[number % 3 :] + list(commands)[: number % 3]
        cost = {name: statistics.median(seconds_per_epoch(commands[name])) for name in order}
        for pair, values in ratios.items():
            numerator, denominator = pair.split(" / ")
            values.append(cost[numerator] / cost[denominator])
        print(
            ", ".join(f"{name} {cost[name]:.4f} s" for name in commands)
            + "".join(f", {pair} {values[-1]:.3f}" for pair, values in ratios.items()),
            flush=True,
        )
    for pair, values in ratios.items():
        print(
            f"{pair}: median {statistics.median(values):.3f}, "
            f"{min(values):.3f} to {max(values):.3f} in {rounds} rounds"
        )


if __name__ == "__main__":
    main()
