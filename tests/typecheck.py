"""The types and shapes of absld's signatures, enforced while the tests run (see conftest.py)."""

import typing
from typing import Any

import beartype


def checked(annotated: Any) -> Any:
    """beartype; it can check a protocol only if that is marked as checkable at run time."""
    for hint in getattr(annotated, "__annotations__", {}).values():
        mark(hint)
    return beartype.beartype(annotated)


def mark(hint: Any) -> None:
    """Mark a protocol, and those inside `list[...]`, `... | None` and the like."""
    if getattr(hint, "_is_protocol", False):
        typing.runtime_checkable(hint)
    for inner in typing.get_args(hint):
        mark(inner)
