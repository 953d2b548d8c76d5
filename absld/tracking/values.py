"""The figures of trainings and evaluations as named numbers, for trackers. All functions are pure.

A name is GROUP/FIGURE or GROUP/CLASS. Trackers make a section of each group.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from absld.metrics import METRICS, ClassAccuracies
from absld.progress import plain
from absld.text import clip

MOST_NAMED = 20  # with more classes than these, a value per class becomes its quantiles over them
QUANTILES = {"lowest": 0.0, "10_percent": 0.1, "median": 0.5, "90_percent": 0.9, "highest": 1.0}
FIGURES = {"average": "average", "worst": "worst", "normalized_std": "nsd"}
NOT_TRACKED = ("epoch", "is_best", "score")
Values = dict[str, float]


def epoch_values(record: Mapping[str, Any], classes: Sequence[str]) -> Values:
    """Return the values of an epoch, of its record in metrics.jsonl, with its number as `epoch`."""
    values: Values = {"epoch": record["epoch"]}
    for name, value in record.items():
        if name in ("clean", "robust"):
            values |= accuracy_values("validation", name, value, classes)
        elif isinstance(value, Sequence):
            values |= class_values(in_a_name(name), value, classes)
        elif name not in NOT_TRACKED:
            values |= finite({f"training/{in_a_name(name)}": value})
    return values


def values_on_test(accuracies: ClassAccuracies, classes: Sequence[str]) -> Values:
    """Return the values of the accuracies on the test images."""
    values: Values = {}
    for name, accuracy in accuracies._asdict().items():
        values |= accuracy_values("test", name, plain(accuracy), classes)
    return values


def evaluation_values(results: Mapping[str, Any]) -> Values:
    """Return the values of an evaluation: clean, and robust under every attack."""
    values: Values = {}
    for name, part in (("clean", results["attacks"][0]), ("robust", results["robust"])):
        of_classes = [share["value"] for share in part["classes"]]
        values |= accuracy_values("evaluation", name, of_classes, results["data"]["classes"])
    return values


def accuracy_values(
    where: str, kind: str, accuracies: Sequence[float | None], classes: Sequence[str]
) -> Values:
    """Return average, worst class and NSD of class accuracies, and those of the classes."""
    known = torch.tensor(list(present(accuracies)), dtype=torch.float64)
    metrics = {
        f"{where}/{kind}_{short}": METRICS[name](known).item()
        for name, short in FIGURES.items()
        if len(known)
    }
    return metrics | class_values(f"{where}_{kind}", accuracies, classes)


def class_values(group: str, values: Sequence[float | None], classes: Sequence[str]) -> Values:
    """Return a value per class by the class's name; of many classes, the quantiles over them.

    What is missing or not finite is left out.
    """
    if len(values) <= MOST_NAMED and len(values) == len(classes):
        names = class_names(classes)
        return finite({f"{group}/{name}": v for name, v in zip(names, values, strict=True)})
    known = torch.tensor(list(present(values)), dtype=torch.float64)
    if not len(known):
        return {}
    found = known.quantile(torch.tensor(list(QUANTILES.values()), dtype=torch.float64)).tolist()
    return {f"{group}/{name}": value for name, value in zip(QUANTILES, found, strict=True)}


def present(values: Sequence[float | None]) -> Iterator[float]:
    """Yield the values that are finite numbers."""
    return (value for value in values if value is not None and math.isfinite(value))


def finite(values: Mapping[str, Any]) -> Values:
    """Return the values that are finite numbers."""
    numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def class_names(classes: Sequence[str]) -> list[str]:
    """Return a name of each class that every tracker takes, unlike those of all other classes."""
    names = [in_a_name(name) for name in classes]
    if len({name.casefold() for name in names}) < len(names):
        names = [f"{k}_{name}" for k, name in enumerate(names)]
    return names


def in_a_name(text: str) -> str:
    """Return a text without what some tracker does not take in a name: spaces, slashes, marks."""
    return re.sub(r"[^\w-]+", "_", clip(text, 40)).strip("_") or "_"


def setting_values(settings: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Return settings as numbers and texts; those that are not set are left out."""
    given = {name: value for name, value in settings.items() if value not in (None, "")}
    return {
        name: value if isinstance(value, (bool, int, float)) else text_of(value)
        for name, value in given.items()
    }


def text_of(value: Any) -> str:
    """Return a setting's value as a text; several numbers with commas."""
    return ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
