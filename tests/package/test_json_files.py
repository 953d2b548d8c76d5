"""JSON from somebody else: read by its schema, or refused with the field that is wrong."""

import copy
import json

import jsonschema
import pytest
from helpers.program import refused

from absld.errors import CheckpointError
from absld.evaluation.results import read_results, schema
from absld.storage.json_files import faults, parse_json


def figure(**more):
    return {"value": 0.5, "low": None, "high": 0.75, **more}


def part(**more):
    metrics = ("average", "worst", "worst_tenth", "gap", "normalized_std")
    rows = [figure(**{"class": name, "images": 2, "right": 1}) for name in ("cat", "dog")]
    return {"classes": rows, "metrics": {name: figure() for name in metrics}, **more}


NETWORK = {
    "target": "net.pt",
    "architecture": "convnet",
    "parameters": 3,
    "weights_sha256": "0" * 64,
    "notes": ["a"],
}
CHECKS = [{"name": "a check", "passed": True, "numbers": "1 of 2"}]
RESULTS = {
    "schema": "absld-evaluation-1",
    "environment": dict.fromkeys(("command", "started", "absld", "torch", "device"), "x"),
    "seconds": 0.5,
    "network": NETWORK,
    "data": {
        "dataset": "digits",
        "split": "test",
        "images": 4,
        "of": 4,
        "images_sha256": "1" * 64,
        "classes": ["cat", "dog"],
    },
    "settings": {
        "epsilon": 0.1,
        "restarts": 1,
        "each": False,
        "examples": None,
        "seed": 0,
        "precision": "fp32",
        "attacks": ["fgsm"],
    },
    "attacks": [part(name="clean"), part(name="fgsm")],
    "robust": part(),
    "confusion": [[1, 1], [1, 1]],
    "checks": CHECKS,
    "against": {
        "network": NETWORK,
        "checks": None,
        "clean": part()["metrics"],
        "robust": part()["metrics"],
        "rho": figure(),
    },
}


def fields(value, path=()):
    """Yield the path of every value in a document."""
    yield path
    items = enumerate(value) if isinstance(value, list) else ()
    for name, item in value.items() if isinstance(value, dict) else items:
        yield from fields(item, (*path, name))


def changed(path, value):
    """Return the results with another value at a path."""
    document = copy.deepcopy(RESULTS)
    *above, last = path
    place = document
    for name in above:
        place = place[name]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return document


PATHS = [path for path in fields(RESULTS) if path]
VALUES = ["0.5", -1, 2, 0.5, None, True, [], {}, ["x"], {"x": 1}, KeyError]


def test_every_change_is_judged_as_by_the_library_for_json_schema():
    validator = jsonschema.Draft202012Validator(schema())
    assert parse_json(json.dumps(RESULTS).encode(), schema()) == RESULTS
    for number, path in enumerate(PATHS):
        for value in (VALUES[(number + k) % len(VALUES)] for k in (0, 3, 7)):
            document = changed(path, value)
            ours = next(faults(document, schema(), schema(), ""), None)
            assert (ours is None) == validator.is_valid(document), (path, value, ours)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("robust", "classes", 1, "right"), "1", 'robust.classes[1].right is "1", needed: integer'),
        (("robust", "metrics", "gap", "low"), float("nan"), "robust.metrics.gap.low is NaN"),
        (("network", "parameters"), 10**400, "network.parameters is 1000"),
        (("network", "notes", 0), "\ud800", "network.notes[0] is "),
        (("schema",), "absld-evaluation-0", 'schema is "absld-evaluation-0", needed: "absld-eva'),
        (("seconds",), KeyError, "it lacks seconds"),
        (("data", "classes"), ["cat", "dog", "cow"], "not all of 3 classes"),
        (("confusion", 1), [1], "not all of 2 classes"),
        (("attacks", 1, "classes"), [], "not all of 2 classes"),
        (("settings", "epsilon"), 1.5, "settings.epsilon is 1.5, which is out of range"),
        (("warp",), 1, "warp is unknown"),
    ],
)
def test_results_edited_by_hand_are_refused_with_the_field(path, value, message, tmp_path, capfd):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(RESULTS))
    assert read_results(file) == RESULTS
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(CheckpointError):
        read_results(file)
    refused(capfd, 4, message, "by `absld evaluate`", "report", file)
