"""The types and shapes of absld's signatures, enforced while the tests run (see conftest.py)."""

import functools
import types
import typing
from typing import Any

import beartype
from torch import fx


def checked(annotated: Any) -> Any:
    """beartype; it can check a protocol only if that is marked as checkable at run time."""
    for hint in getattr(annotated, "__annotations__", {}).values():
        mark(hint)
    strict = beartype.beartype(annotated)
    if not isinstance(annotated, types.FunctionType):
        return strict

    @functools.wraps(annotated)
    def but_for_traces(*args: Any, **kwargs: Any) -> Any:
        """What stands for a tensor while a network is traced is none, and has no shape."""
        traced = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        return (annotated if traced else strict)(*args, **kwargs)

    return but_for_traces


def mark(hint: Any) -> None:
    """Mark a protocol, and those inside `list[...]`, `... | None` and the like."""
    if getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for inner in typing.get_args(hint):
        mark(inner)
