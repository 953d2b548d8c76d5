"""The result of an evaluation as plain values: what `--json` prints and a report card shows.

docs/evaluation.md describes it, absld/evaluation/evaluation.schema.json is its JSON Schema.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from absld.errors import CheckpointError
from absld.evaluation.attacks import Attack
from absld.evaluation.evaluate import Differences, Evaluation
from absld.evaluation.intervals import Interval
from absld.models.loading import Network
from absld.storage.files import digest

SCHEMA = "absld-evaluation-1"


def about_network(target: str, network: Network) -> dict[str, Any]:
    """What was asked for, what it is, and what was done to it."""
    return {
        "target": target,
        "architecture": network.architecture,
        "parameters": sum(p.numel() for p in network.model.parameters()),
        "weights_sha256": digest(network.model.state_dict()),
        "notes": list(network.notes),
    }


def results(evaluation: Evaluation, attacks: Sequence[Attack]) -> dict[str, Any]:
    """The figures: per attack, in the worst case, and the confusion of the classes."""
    settings = [{"name": "clean"}, *(as_settings(attack) for attack in attacks)]
    return {
        "attacks": [
            about | figures(evaluation, right)
            for about, right in zip(settings, evaluation.right, strict=True)
        ],
        "robust": figures(evaluation, evaluation.withstood),
        "confusion": evaluation.confusion().tolist(),
    }


def as_settings(attack: Attack) -> dict[str, Any]:
    """An attack's name and settings."""
    settings: dict[str, Any] = asdict(attack)  # type: ignore[call-overload]  # all are dataclasses
    return settings


def figures(evaluation: Evaluation, right: Tensor) -> dict[str, Any]:
    """The classes and the metrics of images that are `right` (n,), with 95 % intervals."""
    images = evaluation.counts(right | ~right).tolist()
    counts = evaluation.counts(right).tolist()
    rows = zip(evaluation.classes, images, counts, evaluation.class_intervals(right), strict=True)
    return {
        "classes": [
            {"class": name, "images": n, "right": k} | interval(share) for name, n, k, share in rows
        ],
        "metrics": intervals(evaluation.metrics(right)),
    }


def differences(found: Differences) -> dict[str, Any]:
    """How a network differs from the one it was set against."""
    return {
        "clean": intervals(found.clean),
        "robust": intervals(found.robust),
        "rho": interval(found.rho),
    }


def intervals(metrics: Mapping[str, Interval]) -> dict[str, Any]:
    return {name: interval(each) for name, each in metrics.items()}


def interval(each: Interval) -> dict[str, float | None]:
    """value, low, high; null for what is no number."""
    return {k: v if math.isfinite(v) else None for k, v in each._asdict().items()}


def to_json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read(path: Path) -> dict[str, Any]:
    """The document in a file. Raises CheckpointError if it is none, or of another version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: {cause}", NEEDED) from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: its schema is {schema!r}, known is {SCHEMA!r}", NEEDED)
    if missing := KEYS - document.keys():
        raise CheckpointError(f"{path}: lacks {', '.join(sorted(missing))}", NEEDED)
    return dict(document)


KEYS = {"environment", "seconds", "network", "data", "settings", "attacks", "robust"}
KEYS |= {"confusion", "checks", "against"}
NEEDED = "needed: an evaluation.json by `absld evaluate`"


def warnings(document: Mapping[str, Any]) -> list[str]:
    """The names of the checks that did not pass."""
    return [check["name"] for check in document["checks"] or () if not check["passed"]]
