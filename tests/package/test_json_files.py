"""JSON from somebody else: read by its schema, or refused with the field that is wrong."""

import copy
import json

import pytest
from helpers.program import refused

from absld.errors import CheckpointError
from absld.evaluation.results import read_results


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
        "notes": [],
    },
    "settings": {
        "norm": "linf",
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


HUGE = "n\n" * 500_000


@pytest.mark.parametrize("value", [HUGE, [HUGE], {HUGE: HUGE}, [1] * 10**5, 2**62, -1e300, None],
                         ids=lambda value: type(value).__name__)  # fmt: skip
@pytest.mark.parametrize("path", [("settings", "epsilon"), ("settings", HUGE)], ids=["a", "b"])
def test_an_error_is_one_short_line_whatever_the_value(path, value, tmp_path, capfd):
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(changed(path, value)))
    refused(capfd, 4, str(file), "by `absld evaluate`", "report", file)
    with pytest.raises(CheckpointError) as caught:
        read_results(file)
    assert len(str(caught.value)) < len(str(file)) + 400


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ("robust", "classes", 1, "right"),
            "1",
            "robust.classes[1].right: '1' is not of type 'integer'",
        ),
        (("robust", "metrics", "gap", "low"), float("nan"), "Out of range float values"),
        (("network", "parameters"), 10**400, "the number 1000"),
        (("network", "notes", 0), "\ud800", "surrogates not allowed"),
        (("schema",), "absld-evaluation-0", "schema: 'absld-evaluation-1' was expected"),
        (("seconds",), KeyError, "the document: 'seconds' is a required property"),
        (("data", "classes"), ["cat", "dog", "cow"], "not all of 3 classes"),
        (("confusion", 1), [1], "not all of 2 classes"),
        (("confusion", 1), [9, 9, 0, -1, -2], "confusion[1][3]: -1 is less than the minimum of 0"),
        (("confusion", 1), [1, True], "confusion[1][1]: True is not of type 'integer'"),
        (("attacks", 1, "classes"), [], "not all of 2 classes"),
        (("settings", "epsilon"), -0.5, "settings.epsilon: -0.5 is less than the minimum of 0"),
        (("settings", "norm"), "l1", "settings.norm: 'l1' is not one of ['linf', 'l2']"),
        (("warp",), 1, "'warp' was unexpected"),
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
