"""Check the types and shapes of absld's signatures while the tests run (see conftest.py)."""

import functools
import types
import typing
from typing import Any

import beartype
from torch import fx

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))  # int passes as float


def checked(annotated: Any) -> Any:
    """Wrap a function or class by beartype, which checks only protocols marked for run time."""
    for hint in getattr(annotated, "__annotations__", {}).values():
        mark(hint)
    strict = check(annotated)
    if not isinstance(annotated, types.FunctionType):
        return strict

    @functools.wraps(annotated)
    def unless_traced(*args: Any, **kwargs: Any) -> Any:
        """Call unchecked with a proxy: while a network is traced, it stands for a tensor."""
        traced = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        return (annotated if traced else strict)(*args, **kwargs)

    return unless_traced


def mark(hint: Any) -> None:
    """Mark a protocol, also inside `list[...]`, `... | None` and the like, for checks at run time."""
    if getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for inner in typing.get_args(hint):
        mark(inner)
