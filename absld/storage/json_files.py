"""JSON of runs, which may come from somebody else, read by a JSON Schema."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]

from absld.errors import CheckpointError
from absld.storage.opening import COPY_AGAIN, read_of_run
from absld.text import clip

Schema = Mapping[str, Any]
MOST = 160  # letters of a field and of a message, which may quote the value


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
        value = json.loads(text, parse_int=parse_int)
        # Refuses NaN, infinity and halves of characters, which Python reads but JSON has not.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("too many brackets") from error
    except UnicodeDecodeError as error:
        raise ValueError("not a text, as JSON is") from error
    for fault in Validator(schema).iter_errors(value):
        field = fault.json_path.removeprefix("$").removeprefix(".") or "the document"
        raise ValueError(": ".join(clip(ends(text), MOST) for text in (field, fault.message)))
    return value


def ends(text: str) -> str:
    """Return a text without the middle of one that is much longer than is shown."""
    return text if len(text) < 8 * MOST else text[: 4 * MOST] + text[-4 * MOST :]


def check_items(validator: Any, schema: Schema, value: Any, whole: Schema) -> Iterator[Any]:
    """Check the items of a list; of a list of integers only the least and the greatest.

    A confusion matrix has a million. If these two are in a range, so are all.
    """
    check = STANDARD.VALIDATORS["items"]
    integers = isinstance(value, list) and {*map(type, value)} == {int}
    if not integers or any(check(validator, schema, [min(value), max(value)], whole)):
        yield from check(validator, schema, value, whole)


STANDARD = jsonschema.Draft202012Validator
Validator = jsonschema.validators.extend(STANDARD, {"items": check_items})


def parse_int(text: str) -> int:
    """Parse an integer of 64 bits. Raises ValueError."""
    if len(text) > 18:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)
