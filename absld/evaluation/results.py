"""Results of an evaluation as plain values: the JSON that is printed, stored and reported.

docs/evaluation.md describes them, absld/evaluation/evaluation.schema.json is their JSON Schema.
"""

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from absld.errors import CheckpointError
from absld.evaluation.attacks import Attack
from absld.evaluation.differences import Differences
from absld.evaluation.evaluate import Evaluation
from absld.evaluation.intervals import Interval
from absld.models.loading import Network
from absld.storage.files import digest
from absld.storage.json_files import read_json
from absld.text import printable

SCHEMA = "absld-evaluation-1"
HINT = "needed: an evaluation.json by `absld evaluate`"


def describe_network(target: str, network: Network) -> dict[str, Any]:
    """Return target, architecture, size, digest, notes and origin of a network."""
    return {
        "target": target,
        "architecture": network.architecture,
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "weights_sha256": digest(network.model.state_dict()),
        "notes": list(network.notes),
        **({"hub": dict(network.hub)} if network.hub else {}),
    }


def evaluation_results(evaluation: Evaluation, attacks: Sequence[Attack]) -> dict[str, Any]:
    """Return the figures of each attack and of the worst case, and the confusion matrix."""
    # All attacks that have a name on the command line are dataclasses.
    settings = [{"name": "clean"}, *(asdict(attack) for attack in attacks)]  # type: ignore[call-overload]
    return {
        "attacks": [
            attack_settings | accuracy_results(evaluation, correct)
            for attack_settings, correct in zip(settings, evaluation.correct, strict=True)
        ],
        "robust": accuracy_results(evaluation, evaluation.robust),
        "confusion": evaluation.confusion().tolist(),
    }


def accuracy_results(evaluation: Evaluation, correct: Tensor) -> dict[str, Any]:
    """Return accuracies by class and metrics of the images that are `correct` (n,)."""
    images = evaluation.counts(correct | ~correct).tolist()
    counts = evaluation.counts(correct).tolist()
    rows = zip(evaluation.classes, images, counts, evaluation.class_intervals(correct), strict=True)
    return {
        "classes": [
            {"class": name, "images": n, "right": k} | interval_results(share)
            for name, n, k, share in rows
        ],
        "metrics": metric_results(evaluation.metrics(correct)),
    }


def difference_results(differences: Differences) -> dict[str, Any]:
    """Return the differences between two networks."""
    return {
        "clean": metric_results(differences.clean),
        "robust": metric_results(differences.robust),
        "rho": interval_results(differences.rho),
    }


def metric_results(metrics: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval_results(interval) for name, interval in metrics.items()}


def interval_results(interval: Interval) -> dict[str, float | None]:
    """Return value, low and high; null for NaN and infinity."""
    return {k: v if math.isfinite(v) else None for k, v in interval._asdict().items()}


def to_json(results: Mapping[str, Any]) -> str:
    """Return results as JSON; bytes of a path that are not UTF-8 are escaped, as they are shown."""
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return re.sub("[\ud800-\udfff]", lambda half: f"\\{printable(half[0])}", text)


def read_results(path: Path) -> dict[str, Any]:
    """Read the results of an evaluation.

    Raises CheckpointError, with the field, if the file is not one of this version.
    """
    results: dict[str, Any] = read_json(path, schema(), HINT)
    parts = [results["robust"], *results["attacks"]]
    lists = [results["confusion"], *results["confusion"], *(part["classes"] for part in parts)]
    count = len(results["data"]["classes"])
    if any(len(each) != count for each in lists):
        raise CheckpointError(f"{path}: its lists are not all of {count} classes", HINT)
    return results


def read_evaluations(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read the results of all evaluations in a run's directory. Raises CheckpointError."""
    return [
        (path, read_results(path)) for path in sorted(run.glob("evaluations/*/evaluation.json"))
    ]


@functools.cache
def schema() -> Mapping[str, Any]:
    """Return the JSON Schema of the results."""
    text = Path(__file__).with_name("evaluation.schema.json").read_bytes()
    return cast(dict[str, Any], json.loads(text))


def warnings(results: Mapping[str, Any]) -> list[str]:
    """Return the names of the checks that did not pass."""
    return [check["name"] for check in results["checks"] or () if not check["passed"]]
