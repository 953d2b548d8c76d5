"""Values of settings, from flags and from recipe files."""

import difflib
import functools
import numbers
import types
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from absld.errors import UsageError

NUMBERS = {int: numbers.Integral, float: numbers.Real}  # also numpy's
SEE_HELP = "--help, or `absld recipe show digits`, lists every setting"


def parse_all(values: Mapping[str, Any], settings_class: type) -> dict[str, Any]:
    """Parse settings by name; see `parse`."""
    return {name: parse(name, value, settings_class) for name, value in values.items()}


def parse(name: str, value: Any, settings_class: type) -> Any:
    """Convert a value to the type of a setting; flags and recipe files may both write 8/255.

    Raises:
        UsageError: with the nearest known name, or with the values that the setting takes.
    """
    type_hints = types_of(settings_class)
    if name not in type_hints:
        raise UsageError(f"there is no setting {name!r}", did_you_mean(name, type_hints))
    kind = type_hints[name]
    try:
        return convert_to(kind, value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UsageError(
            f"{name} takes {describe_type(kind)}, not {value!r}",
            did_you_mean(str(value), choices_of(kind)),
        ) from None


@functools.cache
def types_of(settings_class: type) -> dict[str, Any]:
    """Return the types of the settings of a class, by name; Python evaluates them anew each time."""
    return get_type_hints(settings_class)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = SEE_HELP) -> str:
    """Return a hint: the nearest known word, or `otherwise` if none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def is_union(kind: Any) -> bool:
    return get_origin(kind) in (types.UnionType, Union)


def strip_optional(kind: Any) -> Any:
    """Return a type without its `| None`."""
    return get_args(kind)[0] if is_union(kind) and types.NoneType in get_args(kind) else kind


def choices_of(kind: Any) -> tuple[str, ...]:
    """Return the words that a setting of this type takes, alone or beside a number."""
    kind = strip_optional(kind)
    if is_union(kind):  # a number, or a word
        kind = get_args(kind)[1]
    return tuple(map(str, get_args(kind))) if get_origin(kind) is Literal else ()


def convert_to(kind: Any, value: Any) -> Any:
    """Convert a value to a type. Raises ValueError, TypeError or an ArithmeticError."""
    if strip_optional(kind) is not kind:
        return None if value is None else convert_to(strip_optional(kind), value)
    choices = choices_of(kind)
    if is_union(kind):
        return value if value in choices else convert_to(get_args(kind)[0], value)
    if choices:
        return get_args(kind)[choices.index(str(value))]
    if get_origin(kind) is tuple:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return tuple(convert_to(float, part) for part in parts)
    if kind is float and isinstance(value, str):
        return float(Fraction(value)) if "/" in value else float(value)
    if kind is int and isinstance(value, str):
        return int(value)
    if isinstance(value, NUMBERS.get(kind, ())) and not isinstance(value, bool):
        return kind(value)
    if type(value) is not kind:
        raise ValueError(value)
    if isinstance(value, str):
        value.encode()  # a path may hold other bytes, which a recipe file cannot
        if "\0" in value:  # which no path has
            raise ValueError(value)
    return value


def describe_type(kind: Any) -> str:
    """Describe the values of a type in words."""
    kind = strip_optional(kind)
    words = ", ".join(choices_of(kind))
    if is_union(kind):
        return f"{describe_type(get_args(kind)[0])}, or {words}"
    if words:
        return f"one of {words}"
    if get_origin(kind) is tuple:
        return "numbers"
    return {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "a text")
