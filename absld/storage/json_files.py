"""JSON of runs, which may come from somebody else, read by a JSON Schema."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absld.errors import CheckpointError
from absld.storage.opening import COPY_AGAIN, read_of_run

Schema = Mapping[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def read_json(path: Path, schema: Schema, hint: str = COPY_AGAIN) -> Any:
    """Read a JSON document. Raises CheckpointError that names the field which is wrong."""
    try:
        return parse_json(read_of_run(path), schema)
    except CheckpointError as error:
        raise CheckpointError(str(error), hint) from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", hint) from error


def parse_json(text: bytes, schema: Schema) -> Any:
    """Parse a JSON document. Raises ValueError that names the field which is wrong."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("too many brackets") from error
    for fault in faults(value, schema, schema, ""):
        raise ValueError(fault)
    return value


def faults(value: Any, schema: Schema, root: Schema, field: str) -> Iterator[str]:
    """Yield what is wrong with a value, by the keywords of JSON Schema that we use.

    root: the whole schema, whose definitions are referred to. Integers are those of 64 bits, and
    numbers finite: JSON allows others.
    """
    if reference := schema.get("$ref"):
        schema = root["$defs"][reference.removeprefix("#/$defs/")]
    names = schema.get("type", list(TYPES))
    names = [names] if isinstance(names, str) else names
    if not any(is_of_type(value, name) for name in names):
        yield f"{field or 'it'} is {json.dumps(value)[:40]}, needed: {' or '.join(names)}"
    elif value not in (allowed := schema.get("enum", [schema.get("const", value)])):
        needed = " or ".join(map(json.dumps, allowed))
        yield f"{field} is {json.dumps(value)[:40]}, needed: {needed}"
    elif isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            yield f"{field} is {value[:40]!r}, which it cannot be"
    elif isinstance(value, dict):
        yield from object_faults(value, schema, root, field)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            yield f"{field} has {len(value)} items"
        items = schema.get("items", {})
        any_number = items.keys() == {"type"} and "number" in items["type"]
        for number, item in enumerate(value):
            if not (any_number and type(item) is float and abs(item) < 2.0**63):  # most are
                yield from faults(item, items, root, f"{field}[{number}]")
    elif value is not None and not (
        schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
    ):
        yield f"{field} is {value}, which is out of range"


def is_of_type(value: Any, name: str) -> bool:
    """Return whether a value is of a type of JSON Schema, a number in the range that we compute in."""
    if not isinstance(value, TYPES[name]) or (isinstance(value, bool) and name != "boolean"):
        return False
    if isinstance(value, str):
        return value.isascii() or not re.search("[\ud800-\udfff]", value)  # halves of characters
    return not isinstance(value, (int, float)) or -(2.0**63) < value < 2.0**63


def object_faults(value: dict[str, Any], schema: Schema, root: Schema, field: str) -> Iterator[str]:
    """Yield what is wrong with the fields of an object."""
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    for name, item in value.items():
        path = f"{field}.{name}" if field else name
        if name in known:
            yield from faults(item, known[name], root, path)
        elif others is False:
            yield f"{path} is unknown"
        else:
            yield from faults(item, others, root, path)
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{field or 'it'} lacks {name}"
