"""The evaluation of a network on corrupted images: each corruption alone, and their mean."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absld.config.evaluation_settings import EvaluationConfig
from absld.data.corrupted import list_corruptions
from absld.evaluation.results import to_json
from absld.evaluation.runner import EvaluationRun, run_evaluation
from absld.evaluation.targets import complete_config
from absld.progress import Observer
from absld.storage.files import key_of, write_text

SCHEMA = "absld-corruptions-1"


@dataclass(frozen=True, eq=False)
class CorruptionRun:
    """Finished evaluations on several corruptions; their results as in the file `path`."""

    path: Path
    results: dict[str, Any]
    warnings: list[str]


def run_corruptions(
    target: str, config: EvaluationConfig, observer: Observer
) -> EvaluationRun | CorruptionRun:
    """Evaluate a network on each of the chosen corruptions.

    One alone is an evaluation like any other. Raises AbsldError.
    """
    config = complete_config(config, target)
    names = list_corruptions(str(config.dataset), config.data, config.corruption)
    runs = []
    for name in names:
        runs.append(run_evaluation(target, replace(config, corruption=name), observer))
    return runs[0] if len(runs) == 1 else summarise(names, config, runs)


def summarise(
    names: Sequence[str], config: EvaluationConfig, runs: Sequence[EvaluationRun]
) -> CorruptionRun:
    """Put the results of all corruptions together, and write them beside those of each."""
    all_results = [run.results for run in runs]
    first = all_results[0]
    of_class = [
        {"class": row["class"], "value": mean(r["robust"]["classes"][k] for r in all_results)}
        for k, row in enumerate(first["robust"]["classes"])
    ]
    results = {
        "schema": SCHEMA,
        "environment": first["environment"],
        "network": first["network"],
        "dataset": config.dataset,
        "severity": config.severity,
        "settings": first["settings"],
        "corruptions": [
            {"corruption": name, "file": str(run.path), **run.results["robust"]}
            for name, run in zip(names, runs, strict=True)
        ],
        "mean": {
            "classes": of_class,
            "average": mean(r["robust"]["metrics"]["average"] for r in all_results),
            "worst": min((c["value"] for c in of_class if c["value"] is not None), default=None),
        },
    }
    folder = runs[0].path.parent.parent
    parts = {run.path.parent.name: name for name, run in zip(names, runs, strict=True)}
    path = folder / f"corruptions-{key_of(parts)}.json"
    write_text(path, to_json(results))
    warnings = [f"{name}: {w}" for name, run in zip(names, runs, strict=True) for w in run.warnings]
    return CorruptionRun(path, results, warnings)


def mean(intervals: Iterable[Mapping[str, Any]]) -> float | None:
    """Compute the mean of the values that are there; None if there is none."""
    values = [interval["value"] for interval in intervals if interval["value"] is not None]
    return sum(values) / len(values) if values else None
