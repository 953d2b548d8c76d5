"""Measure the coverage of the 95 % intervals of an evaluation.

    python docs/results/intervals.py

Draws evaluations of networks whose class accuracies are known, and counts. Prints the table of
intervals.md: the intervals of `absld.evaluation.intervals.bootstrap`, and plain percentile intervals.
"""

import torch

from absld.evaluation.intervals import bootstrap, resample
from absld.metrics import METRICS

TRIALS, REPLICATES = 400, 1000
SPREAD = [0.524, 0.678, 0.311, 0.318, 0.339, 0.369, 0.376, 0.468, 0.592, 0.576]
DIGITS = [0.95, 0.60, 0.80, 0.75, 0.85, 0.80, 0.90, 0.85, 0.60, 0.70]
CASES = {
    "10 unequal classes, 1,000 images each": (SPREAD, 1000),
    "10 unequal classes, 60 images each": (SPREAD, 60),
    "as on the digits, 60 images each": (DIGITS, 60),
    "10 equal classes, 1,000 images each": ([0.5] * 10, 1000),
    "100 unequal classes, 100 images each": ([0.1 + 0.006 * k for k in range(100)], 100),
}


def coverage(accuracy: list[float], images: int, random: torch.Generator) -> dict[str, list[float]]:
    """Return per metric the coverage of our intervals, and of percentile intervals."""
    truth = torch.tensor(accuracy, dtype=torch.double)
    labels = torch.arange(len(truth)).repeat_interleave(images)
    covered = {name: [0, 0] for name in METRICS}
    for _ in range(TRIALS):
        correct = torch.rand(len(labels), generator=random) < truth[labels]
        observed = correct.view(len(truth), images).double().mean(1)
        replicates = resample(correct[None], labels, random, REPLICATES)[:, 0]
        for name, metric in METRICS.items():
            true, values = metric(truth).item(), metric(replicates)
            ours = bootstrap(metric(observed).item(), values)
            low, high = torch.quantile(values, torch.tensor([0.025, 0.975]).double()).tolist()
            covered[name][0] += ours.low - 1e-9 <= true <= ours.high + 1e-9
            covered[name][1] += low - 1e-9 <= true <= high + 1e-9
    return {name: [count / TRIALS for count in counts] for name, counts in covered.items()}


def main() -> None:
    random = torch.Generator().manual_seed(0)
    print(f"| |{'|'.join(METRICS)}|\n|---|{'---|' * len(METRICS)}")
    for case, (accuracy, images) in CASES.items():
        shares = coverage(accuracy, images, random)
        cells = (f"{ours:.0%} ({percentiles:.0%})" for ours, percentiles in shares.values())
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
