"""Compare RSLAD and both variants of ABSLD on the digits, as Markdown: python docs/results/digits.py"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = {
    "RSLAD": ["--temperature-rate", "0"],
    "ABSLD `paper`": [],
    "ABSLD `released`": ["--fidelity", "released"],
}
SEEDS = range(5)
COLUMNS = [
    "clean average",
    "clean worst",
    "PGD-20 average",
    "PGD-20 worst",
    "PGD-20 NSD",
    "seconds",
]
SCRIPT = Path(__file__).parents[2] / "absld_min.py"


def run_folder(seed: int) -> str:
    return f"runs/seed-{seed}"


def run(flags: list[str], seed: int) -> list[float]:
    """Run absld_min.py in ./runs/seed-N; return the figures of COLUMNS."""
    start = time.perf_counter()
    command = [sys.executable, str(SCRIPT), *flags, "--seed", str(seed), "--out", run_folder(seed)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds = time.perf_counter() - start
    print(seed, flags, printed[printed.index("class ") :], file=sys.stderr, flush=True)
    table = {
        name: [float(number) for number in re.findall(r"([\d.]+)%", values)]
        for name, values in re.findall(r"^(average|worst class|NSD) (.*)$", printed, re.MULTILINE)
    }
    clean, robust = zip(table["average"], table["worst class"], table["NSD"], strict=True)
    return [*clean[:2], *robust, seconds]


def main() -> None:
    for seed in SEEDS:  # the first run of a seed trains the teacher of all others: not timed
        run(METHODS["RSLAD"], seed)
    figures = {
        method: [
            run([*flags, "--teacher", f"{run_folder(seed)}/teacher.pt"], seed) for seed in SEEDS
        ]
        for method, flags in METHODS.items()
    }
    print("| method |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for method, runs in figures.items():
        cells = [
            f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}"
            for column in zip(*runs, strict=True)
        ]
        print("|", method, "|", " | ".join(cells), "|")
    print()
    print("| method | seed |", " | ".join(COLUMNS), "|")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for method, runs in figures.items():
        for seed, row in zip(SEEDS, runs, strict=True):
            print("|", method, "|", seed, "|", " | ".join(f"{value:.1f}" for value in row), "|")


if __name__ == "__main__":
    main()
