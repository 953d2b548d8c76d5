"""What a report card says, in words and in order, whatever draws it (absld.report.html, absld.report.figure).

All functions are pure. `document` is that of an evaluation (docs/evaluation.md); `records` are
those of metrics.jsonl, of the training of the network.
"""

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MANY = 20  # more classes than these are not shown one by one everywhere
STANDING_OUT = 3  # so many worst classes stand out among the lines of all
METRICS = {
    "average": "average",
    "worst": "worst class",
    "worst_tenth": "worst 10\N{NBSP}%",
    "gap": "gap",
    "normalized_std": "NSD",
}
RATIOS = ("normalized_std", "rho")  # all other figures are shown in per cent
LOWER_IS_BETTER = ("gap", "normalized_std")
TRAJECTORIES = {
    "temperature_adv": "Temperature, adversarial images",
    "temperature_nat": "Temperature, clean images",
    "class_risk_adv": "Class risk, adversarial images, in nats",
    "class_risk_nat": "Class risk, clean images, in nats",
}
INTERVALS = (
    "Brackets and whiskers are 95 % intervals: Wilson's for a class, the basic bootstrap for the "
    "metrics."
)
TERMS = (
    "Robust: right when clean and under every attack. Gap: best minus worst class. NSD: standard "
    "deviation of the classes over their mean."
)
NO_CHECKS = "No sanity checks were run: nothing says whether the attacks failed to attack."
NO_TRAJECTORIES = (
    "There are no records of class temperatures or risks from the training of this network."
)
ABSENT = "\N{EN DASH}"  # a figure that is not there


# --- Texts ---


def plain(text: str) -> str:
    """A text as one line, without the control characters that XML cannot hold."""
    kept = "\N{NBSP}\u200c\u200d"  # the last two shape letters in some scripts
    return "".join(
        letter
        if letter.isprintable() or letter in kept
        else (" " if letter.isspace() else "\N{REPLACEMENT CHARACTER}")
        for letter in text
    )


def columns(text: str) -> int:
    """The width of a text in letters of Latin script; letters of some scripts are twice as wide."""
    marks = sum(unicodedata.combining(letter) > 0 for letter in text)
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return len(text) - marks + wide


def clip(text: str, width: int) -> str:
    """A text in so many columns at most, without its middle: names often differ at their ends."""
    text = plain(text)
    if columns(text) <= width:
        return text
    head, tail = text[:width], text[-width:]
    while columns(head) + columns(tail) >= width:
        head, tail = (head[:-1], tail) if len(head) > 2 * len(tail) else (head, tail[1:])
    return f"{head}…{tail}"


def number(value: float | None, name: str = "", sign: str = "") -> str:
    """A figure in per cent, or as it is where `name` is a ratio. sign: "+" for a difference."""
    if value is None:
        return ABSENT
    shown = f"{value:{sign}z.3f}" if name in RATIOS else f"{100 * value:{sign}z.1f}"
    return shown.replace("-", "\N{MINUS SIGN}")  # the minus sign is as wide as the plus


def with_unit(value: float | None, name: str = "") -> str:
    return number(value, name) + ("" if value is None or name in RATIOS else "\N{NBSP}%")


def bracket(each: Mapping[str, Any], name: str = "", sign: str = "") -> str:
    """The interval of a figure; empty for a figure that is not there."""
    if each["value"] is None:
        return ""
    return f"[{number(each['low'], name, sign)}, {number(each['high'], name, sign)}]"


def said(value: object) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return str(value)


# --- What was evaluated ---


def title(document: Mapping[str, Any]) -> str:
    return f"{document['network']['architecture']} on {document['data']['dataset']}"


def facts(document: Mapping[str, Any]) -> dict[str, str]:
    """What was evaluated, on what, by what."""
    network, data = document["network"], document["data"]
    attacks = ", ".join(attack["name"] for attack in document["attacks"][1:])
    return {
        "Network": f"{network['target']}, {network['parameters']:,} parameters",
        "Images": f"{data['images']:,} of {data['of']:,} of the {data['split']} split, "
        f"{len(data['classes'])} classes",
        "Budget": f"epsilon {budget(document['settings']['epsilon'])} in the L-infinity norm",
        "Attacks": attacks or "none, so the robust figures are those of clean images",
    }


def budget(epsilon: float) -> str:
    """8/255 (0.03137), or the number alone where it is no whole number of grey levels."""
    levels = 255 * epsilon
    whole = round(levels)
    return (
        f"{whole}/255 ({epsilon:.4g})" if whole and abs(levels - whole) < 1e-3 else f"{epsilon:g}"
    )


def attack_order(document: Mapping[str, Any]) -> str:
    """How the rows of the attacks relate, in a sentence or two."""
    if document["settings"]["each"]:
        return (
            "Each row is that attack alone. The worst case counts an image only if it is right in "
            "every row."
        )
    return (
        "The rows are cumulative: each is after all attacks above it, so the last attack's row is "
        "the worst case."
    )


def settings(document: Mapping[str, Any]) -> dict[str, str]:
    """The settings of the evaluation and of each attack."""
    shown = {name.replace("_", " "): said(value) for name, value in document["settings"].items()}
    shown["epsilon"] = budget(document["settings"]["epsilon"])
    shown["examples"] = said(document["settings"]["examples"] or "all images")
    for attack in document["attacks"][1:]:
        about = {k: v for k, v in attack.items() if k not in ("name", "classes", "metrics")}
        words = (f"{name.replace('_', ' ')} {said(value)}" for name, value in about.items())
        shown[f"attack {attack['name']}"] = ", ".join(words)
    return shown


def reproduction(document: Mapping[str, Any]) -> dict[str, str]:
    """What made these figures; the command is `document["environment"]["command"]`."""
    environment = document["environment"]
    shown = {k: said(v) for k, v in environment.items() if k != "command" and v is not None}
    return shown | {
        "seconds": f"{document['seconds']:.1f}",
        "weights sha256": document["network"]["weights_sha256"],
        "images sha256": document["data"]["images_sha256"],
    }


# --- The figures ---


class Headline(NamedTuple):
    """A figure that stands out, as texts."""

    label: str
    value: str
    interval: str
    note: str


def headlines(document: Mapping[str, Any]) -> list[Headline]:
    clean, robust = document["attacks"][0]["metrics"], document["robust"]["metrics"]
    names = [clip(document["data"]["classes"][k], 24) for k in worst(document)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    labels = {
        "average": "Robust average",
        "worst": "Robust, worst class",
        "worst_tenth": "Robust, worst 10\N{NBSP}%",
        "gap": "Robust gap",
        "normalized_std": "Robust NSD",
    }
    average = clean["average"]
    found = [Headline("Clean average", with_unit(average["value"]), bracket(average), "no attack")]
    for name, label in labels.items():
        note = f"clean {with_unit(clean[name]['value'], name)}"
        if name == "worst" and names:
            note = f"{'class ' if names[0].isdecimal() else ''}{names[0]}{more}"
        each = robust[name]
        found.append(Headline(label, with_unit(each["value"], name), bracket(each, name), note))
    return found


def order(document: Mapping[str, Any]) -> list[int]:
    """The classes by robust accuracy, the worst first; those without images last."""
    values = [each["value"] for each in document["robust"]["classes"]]
    return sorted(range(len(values)), key=lambda k: (values[k] is None, values[k]))


def worst(document: Mapping[str, Any]) -> list[int]:
    """The class, or classes, of the least robust accuracy."""
    values = [each["value"] for each in document["robust"]["classes"]]
    least = min((value for value in values if value is not None), default=None)
    return [k for k, value in enumerate(values) if value is not None and value == least]


def verdict(each: Mapping[str, Any], name: str) -> str:
    """What an interval of a difference says: it is better or worse if it leaves out zero."""
    low, high = each["low"], each["high"]
    if low is None or high is None:
        return ABSENT
    if low <= 0 <= high:
        return "no clear difference"
    return "better" if (low > 0) != (name in LOWER_IS_BETTER) else "worse"


class Confusion(NamedTuple):
    """Images of the class `true` that were taken for the class `said`."""

    true: int
    said: int
    times: int
    images: int


def confusions(document: Mapping[str, Any], most: int) -> list[Confusion]:
    """The most frequent confusions in the worst case."""
    found = [
        Confusion(true, said, count, sum(row))
        for true, row in enumerate(document["confusion"])
        for said, count in enumerate(row)
        if count and said != true
    ]
    return sorted(found, key=lambda each: (-each.times, each.images))[:most]


# --- The training ---


class Trajectory(NamedTuple):
    """A quantity of every class over the epochs; None where a class had none."""

    key: str
    title: str
    epochs: list[int]
    lines: list[list[float | None]]


def trajectories(records: Sequence[Mapping[str, Any]], num_classes: int) -> list[Trajectory]:
    """What the records tell of so many classes; other methods than absld tell less."""
    found = []
    for key, words in TRAJECTORIES.items():
        told = [record for record in records if len(record.get(key) or ()) == num_classes]
        if told:
            lines = [[finite(record[key][k]) for record in told] for k in range(num_classes)]
            found.append(Trajectory(key, words, [record["epoch"] for record in told], lines))
    return found


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def limits(shown: Sequence[Trajectory], key: str) -> tuple[float, float]:
    """Least and greatest value of all that are of the kind of `key`, which share a scale."""
    kind = key.rpartition("_")[0]
    values = [
        value
        for each in shown
        if each.key.startswith(kind)
        for line in each.lines
        for value in line
        if value is not None
    ]
    return min(values, default=0.0), max(values, default=1.0)


def best_epoch(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The epoch that the run's selection chose."""
    return max((record["epoch"] for record in records if record.get("is_best")), default=None)


def sampled(epochs: Sequence[int], most: int) -> list[int]:
    """Positions of at most `most` + 1 epochs, evenly spaced, with the first and the last."""
    stride = max(1, math.ceil((len(epochs) - 1) / most))
    return sorted({*range(0, len(epochs), stride), len(epochs) - 1})
