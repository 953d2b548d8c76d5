"""The content of a report: figures as texts, and what is shown in which order.

All functions are pure. `results` are those of an evaluation (docs/evaluation.md); `records` are
those of metrics.jsonl, from the training of the network.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absld.evaluation.results import warnings
from absld.norms import NORM_NAMES
from absld.text import clip

MANY = 20  # with more classes than these, some parts show only the worst
HIGHLIGHTED = 3  # classes that stand out in a trajectory: those of least robust accuracy
METRICS = {
    "average": "average",
    "worst": "worst class",
    "worst_tenth": "worst 10\N{NBSP}%",
    "gap": "gap",
    "normalized_std": "NSD",
}
LOWER_IS_BETTER = ("gap", "normalized_std")
TRAJECTORIES = {
    "temperature_adv": "Temperature, adversarial images",
    "temperature_nat": "Temperature, clean images",
    "class_risk_adv": "Class risk, adversarial images, in nats",
    "class_risk_nat": "Class risk, clean images, in nats",
}
INTERVALS = (
    "Brackets and whiskers are 95 % intervals: Wilson for a class (also the worst, if it is all right "
    "or all wrong), basic bootstrap for the metrics."
)
TERMS = (
    "Robust: correct when clean and under every attack. Gap: best minus worst class. NSD: standard "
    "deviation of the class accuracies over their mean."
)
NO_CHECKS = "No sanity checks were run: gradient masking would not be detected."
NO_TRAJECTORIES = "No class temperatures or risks were recorded in the training of this network."
ABSENT = "\N{EN DASH}"  # for a missing figure


# --- Texts ---


def number(value: float | None, name: str = "", sign: str = "") -> str:
    """Return a figure as text: in per cent; rho and seconds as they are. sign: maybe "+"."""
    if value is None:
        return ABSENT
    if name == "rho":
        text = f"{value:{sign}z.3f}"
    else:
        text = f"{value if name == 'seconds' else 100 * value:{sign}z.1f}"
    return text.replace("-", "\N{MINUS SIGN}")  # as wide as the plus


def with_unit(value: float | None, name: str = "") -> str:
    """Return a figure as text with its unit."""
    return number(value, name) + ("" if value is None or name == "rho" else "\N{NBSP}%")


def bracket(ends: Sequence[float | None], name: str = "", sign: str = "") -> str:
    """Return an interval as text; empty if it is missing."""
    texts = ", ".join(number(end, name, sign) for end in ends)
    return "" if set(ends) == {None} else f"[{texts}]"


def estimate(interval: Mapping[str, Any], name: str = "", sign: str = "") -> tuple[str, str]:
    """Return the figure `name` and its interval as texts."""
    ends = interval["low"], interval["high"]
    return number(interval["value"], name, sign), bracket(ends, name, sign)


def shown_interval(part: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the interval of a metric, or another one where it has no width.

    Resampling cannot vary a class that is all right or all wrong. If it is the worst class, its own
    interval, Wilson's, holds for it; other metrics of no width have no interval.

    part: accuracies of an evaluation, with `classes` and `metrics`.
    """
    interval: Mapping[str, Any] = part["metrics"][name]
    if interval["low"] != interval["high"]:
        return interval
    classes: list[Mapping[str, Any]] = [c for c in part["classes"] if c["value"] is not None]
    worst = [c for c in classes if c["value"] == interval["value"]]
    if worst and (name == "worst" or (name == "worst_tenth" and len(classes) < MANY)):
        return worst[0]  # the worst 10 % of fewer classes than MANY are one class
    return {**interval, "low": None, "high": None}


def verdict(name: str, *intervals: Sequence[float | None]) -> str:
    """Return whether a difference of the figure `name` is better or worse.

    It counts only if all its intervals, pairs of ends, exclude zero on the same side.
    """
    signs = set()
    for low, high in intervals:
        if low is None or high is None:
            return "unknown"
        signs.add((low > 0) - (high < 0))
    if signs not in ({1}, {-1}):
        return "no clear difference"
    lower_is_better = name.removeprefix("robust_") in LOWER_IS_BETTER
    return "better" if (signs == {1}) != lower_is_better else "worse"


def setting_text(value: object) -> str:
    """Return the value of a setting as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


# --- What was evaluated ---


def title(results: Mapping[str, Any]) -> str:
    """Return the heading of a report."""
    network, data = results["network"], results["data"]
    return f"{network['architecture']} on {data['dataset']}: robustness of every class"


def facts(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the network, the images and the attacks."""
    network, data = results["network"], results["data"]
    attacks = ", ".join(attack["name"] for attack in results["attacks"][1:])
    return {
        "Network": f"{network['target']}, {network['parameters']:,} parameters",
        "Images": f"{data['images']:,} of {data['of']:,} of the {data['split']} split, "
        f"{len(data['classes'])} classes",
        "Budget": f"epsilon {budget(results['settings'])}",
        "Attacks": attacks or "none, so the robust figures are those of clean images",
    }


def budget(settings: Mapping[str, Any]) -> str:
    """Return the epsilon and the norm of an attack, as "8/255 (0.03137) in the L-infinity norm"."""
    return f"{radius(settings['epsilon'])} in the {NORM_NAMES[settings['norm']]} norm"


def radius(epsilon: float) -> str:
    """Return 8/255 (0.03137), or the number alone if it is not a whole number of grey levels."""
    levels = 255 * epsilon
    whole = round(levels)
    return (
        f"{whole}/255 ({epsilon:.4g})" if whole and abs(levels - whole) < 1e-3 else f"{epsilon:g}"
    )


def check_warning(results: Mapping[str, Any]) -> str:
    """Return the sentence about sanity checks that warn; empty if none does."""
    failed, checks = warnings(results), results["checks"] or ()
    verb = "warns" if len(failed) == 1 else "warn"
    text = f"{len(failed)} of {len(checks)} sanity checks {verb}"
    return f"{text}: robust accuracy may be overestimated" if failed else ""


def settings(results: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of the evaluation and of each attack."""
    texts = {name.replace("_", " "): setting_text(v) for name, v in results["settings"].items()}
    texts["norm"] = NORM_NAMES[results["settings"]["norm"]]
    texts["epsilon"] = radius(results["settings"]["epsilon"])
    texts["examples"] = setting_text(results["settings"]["examples"] or "all images")
    for attack in results["attacks"][1:]:
        options = {k: v for k, v in attack.items() if k not in ("name", "classes", "metrics")}
        words = (f"{name.replace('_', ' ')} {setting_text(v)}" for name, v in options.items())
        texts[f"attack {attack['name']}"] = ", ".join(words)
    return texts


def reproduction(results: Mapping[str, Any]) -> dict[str, str]:
    """Return versions, machine and digests; the command is `results["environment"]["command"]`."""
    environment = results["environment"]
    texts = {
        name: setting_text(value)
        for name, value in environment.items()
        if name != "command" and value is not None
    }
    return texts | {
        "seconds": f"{results['seconds']:.1f}",
        "weights sha256": results["network"]["weights_sha256"],
        "images sha256": results["data"]["images_sha256"],
    }


# --- Figures of the classes ---


def headlines(results: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return label, value, interval and a note of the clean average and the robust metrics."""
    clean, robust = results["attacks"][0], results["robust"]
    names = [clip(results["data"]["classes"][k], 24) for k in worst_classes(results)]
    average = shown_interval(clean, "average")
    value, interval = with_unit(average["value"]), estimate(average)[1]
    tiles = [("Clean average", value, interval, "no attack")]
    for name, label in METRICS.items():
        note = f"clean {with_unit(clean['metrics'][name]['value'], name)}"
        if name == "worst" and names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            note = f"{'class ' if names[0].isdecimal() else ''}{names[0]}{more}"
        label = f"Robust, {label}" if name.startswith("worst") else f"Robust {label}"
        shown = shown_interval(robust, name)
        value, interval = with_unit(shown["value"], name), estimate(shown, name)[1]
        tiles.append((label, value, interval, note))
    return tiles


def worst_first(results: Mapping[str, Any]) -> list[int]:
    """Return the classes by robust accuracy, the worst first; those without images last."""
    values = [interval["value"] for interval in results["robust"]["classes"]]
    return sorted(range(len(values)), key=lambda k: (values[k] is None, values[k]))


def worst_classes(results: Mapping[str, Any]) -> list[int]:
    """Return the classes, usually one, of the least robust accuracy."""
    values = [interval["value"] for interval in results["robust"]["classes"]]
    least = min((value for value in values if value is not None), default=None)
    return [k for k, value in enumerate(values) if value is not None and value == least]


def frequent_confusions(results: Mapping[str, Any], most: int) -> list[tuple[int, int, int, int]]:
    """Return at most `most` confusions in the worst case, the most frequent first.

    Each is true class, predicted class, images with this prediction, images of the true class.
    """
    confusions = [
        (true, predicted, images, sum(row))
        for true, row in enumerate(results["confusion"])
        for predicted, images in enumerate(row)
        if images and predicted != true
    ]
    return sorted(confusions, key=lambda confusion: (-confusion[2], confusion[3]))[:most]


# --- The training ---


class Trajectory(NamedTuple):
    """A quantity of every class over the epochs; None where a class had none.

    limits: least and greatest value of all trajectories with the same unit, which share a scale.
    best: the epoch whose network was selected, if it is among these.
    """

    title: str
    epochs: list[int]
    lines: list[list[float | None]]
    limits: tuple[float, float]
    best: int | None

    def thinned(self, most: int) -> "Trajectory":
        """Return at most `most` + 1 of the epochs, evenly spaced, with the first and the last."""
        last = len(self.epochs) - 1
        kept = sorted({*range(0, last, max(1, math.ceil(last / most))), last})
        lines = [[line[at] for at in kept] for line in self.lines]
        return self._replace(epochs=[self.epochs[at] for at in kept], lines=lines)


def trajectories(records: Sequence[Mapping[str, Any]], num_classes: int) -> list[Trajectory]:
    """Return the trajectories in the records; some methods record fewer, or none."""
    best = max((record["epoch"] for record in records if record.get("is_best")), default=None)
    found: list[Trajectory] = []
    for kind in (("temperature_adv", "temperature_nat"), ("class_risk_adv", "class_risk_nat")):
        kept = {key: [r for r in records if len(r.get(key) or ()) == num_classes] for key in kind}
        values = [finite(value) for key in kind for record in kept[key] for value in record[key]]
        known = [value for value in values if value is not None]
        limits = min(known, default=0.0), max(known, default=1.0)
        for key in filter(kept.get, kind):
            epochs = [record["epoch"] for record in kept[key]]
            lines = [[finite(record[key][k]) for record in kept[key]] for k in range(num_classes)]
            selected = best if best in epochs else None
            found.append(Trajectory(TRAJECTORIES[key], epochs, lines, limits, selected))
    return found


def finite(value: float | None) -> float | None:
    """Return None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
