"""What an epoch costs: absld train beside absld_min.py, on the digits, in pairs within one run.

Both commands print a line an epoch; the time between two lines is a whole epoch: its steps, its
validation, its saving and its printing. Usage: python docs/results/epoch_cost.py [PAIRS]
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
FLAGS = ["--seed", "0", "--device", "cpu", "--teacher-epochs", "1", "--allow-weak-teacher"]
FLAGS += ["--epochs", "25"]
EPOCH = re.compile(r" *\d+ \d\.\d{4} ")  # its number and learning rate


def seconds_per_epoch(command: list[str]) -> list[float]:
    """The times between the lines of the student's epochs."""
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
    epochs = times[1:]  # the first line is the teacher's only epoch
    return [later - earlier for earlier, later in itertools.pairwise(epochs)]


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    ratios = []
    for pair in range(pairs):
        commands = {"single file": ["absld_min.py"], "package": ["-m", "absld", "train"]}
        order = list(commands) if pair % 2 else list(reversed(commands))
        cost = {name: statistics.median(seconds_per_epoch(commands[name])) for name in order}
        ratios.append(cost["package"] / cost["single file"])
        print(
            f"single file {cost['single file']:.4f} s, package {cost['package']:.4f} s, "
            f"ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(
        f"{pairs} pairs: median ratio {statistics.median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}"
    )


if __name__ == "__main__":
    main()
