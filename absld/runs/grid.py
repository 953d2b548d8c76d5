"""The grid of a sweep: points from texts such as "temperature_rate=0.05,0.1", and the frontier."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_origin

from absld.config.parsing import parse, types_of
from absld.config.resolve import SETTING_GROUPS, resolve
from absld.config.settings import Config
from absld.engine.techniques import NEUTRAL
from absld.errors import UsageError
from absld.methods.registry import method_class
from absld.text import page_of

BASE = "base"
EXAMPLE = "such as temperature_rate=0.05,0.1"
Over = dict[str, dict[str, Any]]  # the values of each setting, by their texts


class Point(NamedTuple):
    """A point of a sweep: its label, the swept settings it has, and its configuration."""

    label: str
    settings: dict[str, Any]
    config: Config


def parse_over(texts: Sequence[str]) -> Over:
    """Parse texts NAME=V1,V2, in the order given.

    Raises UsageError for an unknown name, a wrong value, or a setting that cannot be swept.
    """
    over: Over = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        parts = [part.strip() for part in values.split(",") if part.strip()]
        if not (equals and name and parts):
            raise UsageError(f"--over takes NAME=VALUE,VALUE, not {text!r}", EXAMPLE)
        booleans = {"true": True, "false": False}  # as in a recipe
        parsed = {part: parse(name, booleans.get(part, part), Config) for part in parts}
        refuse_unswept(name)
        if name in over:
            raise UsageError(f"--over has {name} twice", "give all its values at once")
        if len(set(parsed.values())) < len(parts):
            raise UsageError(f"--over has a value of {name} twice", "give it once")
        over[name] = parsed
    if not over:
        raise UsageError("a sweep needs settings to vary", f"--over NAME=VALUE,VALUE, {EXAMPLE}")
    return over


def refuse_unswept(name: str) -> None:
    """Raise UsageError for a setting whose values cannot be the points of a sweep."""
    no_effect = {"out", "device", "allow_weak_teacher", "logit_cache_gib", *NEUTRAL}
    flag = f"--{name.replace('_', '-')}"
    if name == "seed":
        raise UsageError("seed is not swept: every point is trained with all seeds", "--seeds N")
    if SETTING_GROUPS[name] == "Data":
        reason, hint = "all points need the same images", f"give it to all: {flag}"
    elif name in no_effect:
        reason, hint = "it does not change what is trained", f"give it to all: {flag}"
    elif name in ("norm", "epsilon"):
        reason, hint = "all points are evaluated within one budget", f"a sweep for each {flag}"
    elif get_origin(types_of(Config)[name]) is tuple:
        reason, hint = "it is a list itself", f"a sweep for each {flag}"
    else:
        return
    raise UsageError(f"{name} cannot be swept: {reason}", hint)


def build_points(settings: Mapping[str, Any], over: Over) -> tuple[list[Point], str]:
    """Build the points of a grid, and return the label of the base point, which is `settings` alone.

    The base point is added, as the first, if it is not on the grid. A point has the swept settings
    that its method uses, and no two points are alike. Where methods are swept, all train with one
    schedule, as in a comparison.

    Raises UsageError if a setting is used by none, or there is nothing to compare.
    """

    def configure(chosen: Mapping[str, Any]) -> Config:
        return resolve({**settings, **chosen}, schedule_of_method="method" not in over)

    base = configure({})
    points: dict[str, Point] = {}
    for texts in itertools.product(*over.values()):
        chosen = {name: over[name][text] for name, text in zip(over, texts, strict=True)}
        config = configure(chosen)
        used = {name: value for name, value in chosen.items() if uses(config, name)}
        named = zip(over, texts, strict=True)
        label = " ".join(f"{name}={text}" for name, text in named if name in used)
        points.setdefault(label, Point(label, used, configure(used)))
    found = list(points.values())
    for name in over:
        if not any(name in point.settings for point in found):
            methods = ", ".join(sorted({point.config.method for point in found}))
            raise UsageError(
                f"{name} changes nothing for {methods}",
                "a method of your own names those it uses in `settings`, see "
                f"{page_of('contributing')}",
            )
    label = next((point.label for point in found if point.config == base), BASE)
    if label == BASE:
        own = {name: getattr(base, name) for name in over if uses(base, name)}
        found.insert(0, Point(BASE, own, base))
    if len(found) < 2:
        raise UsageError("the only point is the base point", "--over needs other values")
    return found, label


def uses(config: Config, name: str) -> bool:
    """Return whether the setting `name` changes what a configuration trains."""
    if name == "start_noise":
        return config.start == "normal"
    if name == "averaging_start":
        return config.weight_averaging > 0
    if SETTING_GROUPS[name] == "Method" and name != "method":
        return name in method_class(config.method).settings
    return True


def frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which points are on the Pareto frontier: no other one is as good in both and unlike it.

    points: two figures each, of which more is better; one with NaN is not on the frontier.
    """

    def dominated(point: tuple[float, float]) -> bool:
        return any(o[0] >= point[0] and o[1] >= point[1] for o in points if o != point)

    return [not any(map(math.isnan, point)) and not dominated(point) for point in points]
