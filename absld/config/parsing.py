"""Values of settings from flags and recipe files."""

import difflib
import types
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from absld.errors import UsageError

SEE_HELP = "--help, or `absld recipe show digits`, lists every setting"


def parse(name: str, value: Any, of: type) -> Any:
    """The value of a setting from a flag or a recipe file, both of which may write 8/255.

    Raises UsageError with the nearest known name, or with what the setting takes.
    """
    types_of = get_type_hints(of)
    if name not in types_of:
        raise UsageError(f"there is no setting {name!r}", did_you_mean(name, types_of))
    kind = types_of[name]
    try:
        return convert(kind, value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UsageError(
            f"{name} takes {described(kind)}, not {value!r}",
            did_you_mean(str(value), get_args(bare(kind)) if is_choice(kind) else ()),
        ) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else SEE_HELP


def bare(kind: Any) -> Any:
    """A type without its `| None`."""
    return get_args(kind)[0] if get_origin(kind) in (types.UnionType, Union) else kind


def is_choice(kind: Any) -> bool:
    """Does a setting of this type take one of a few words?"""
    return get_origin(bare(kind)) is Literal


def convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, or ValueError."""
    if bare(kind) is not kind:
        return None if value is None else convert(bare(kind), value)
    if is_choice(kind):
        if value not in get_args(kind):
            raise ValueError(value)
        return value
    if get_origin(kind) is tuple:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return tuple(convert(float, part) for part in parts)
    if kind is float and isinstance(value, str):
        return float(Fraction(value)) if "/" in value else float(value)
    if kind is int and isinstance(value, str):
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def described(kind: Any) -> str:
    """What a setting takes, in words."""
    kind = bare(kind)
    if is_choice(kind):
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "numbers"
    return {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "a text")
