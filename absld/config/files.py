"""Settings as TOML files: recipes, and the sealed config.toml of a run."""

import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from absld.config.imports import HUB, names_code
from absld.config.parsing import parse_all
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError
from absld.storage.opening import read_bytes, read_of_run

TECHNIQUES = "techniques"
SEAL = "# SHA-256 of the lines above, which a run is read with: "
MOST_BYTES = 2**20
NEEDED = "needed: lines of name = value"
HINT = "copy it again; a recipe with other settings needs another place and no such last line"
RUN_FILES = ("STATUS", "environment.json")
MAY_NAME_CODE = ("method", "student", "teacher", "teacher_model")


def to_toml(config: Config, techniques: Mapping[str, Any] | None = None) -> str:
    """Return the settings as the text of a recipe file, with a seal as its last line.

    techniques: those in use; they are no settings of a recipe, but a run is resumed with them.
    """
    text = toml_lines({f.name: getattr(config, f.name) for f in fields(Config)})
    if techniques:
        text += f"\n[{TECHNIQUES}]\n{toml_lines(techniques)}"
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def toml_lines(values: Mapping[str, Any]) -> str:
    """Return lines `name = value`, without those whose value is None."""
    return "".join(f"{name} = {toml_value(v)}\n" for name, v in values.items() if v is not None)


def toml_value(value: Any) -> str:
    """Return a value of a setting in TOML's notation."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower()  # True is true


def read_recipe(path: str, flags: Collection[str] = ()) -> dict[str, Any]:
    """Read the settings of a recipe file, lines `name = value`.

    flags: names of the settings that flags override.

    Raises:
        UsageError: it does not hold settings, or it is a run's and names code.
        CheckpointError: it is a run's, and not as the run wrote it.
    """
    try:
        text = read_bytes(Path(path), MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", NEEDED) from error
    except CheckpointError as error:
        raise UsageError(str(error), error.hint) from error
    if of_run := is_of_run(Path(path)) or SEAL.encode() in text:  # perhaps under another name
        check_seal(text, path)
    values = parse_settings(text, path)
    if of_run:
        refuse_code(path, {name: value for name, value in values.items() if name not in flags})
    return values


def is_of_run(path: Path) -> bool:
    """Return whether a file has the name or the place of a run's settings."""
    return path.name == "config.toml" or any(path.with_name(name).exists() for name in RUN_FILES)


def check_seal(content: bytes, path: str) -> None:
    """Raise CheckpointError if settings of a run are not as the run wrote them."""
    text, seal, digest = content.rpartition(SEAL.encode())
    if not seal:
        raise CheckpointError(f"{path}: cut short, its last line with its SHA-256 is missing", HINT)
    if digest.strip() != hashlib.sha256(text).hexdigest().encode():
        raise CheckpointError(f"{path}: has changed since the run wrote it", HINT)


def refuse_code(path: str, values: Mapping[str, Any]) -> None:
    """Raise UsageError if settings of a run, perhaps somebody else's, name code, a hub or trackers."""
    for name in MAY_NAME_CODE:
        value = values.get(name, "")
        flag = f"--{name.replace('_', '-')} {value}"
        if names_code(value):
            raise UsageError(
                f"{path}: {name} is {value!r}, and no name in a run's file is imported",
                f"if you trust that code, type {flag}",
            )
        if value.startswith(HUB):
            raise UsageError(
                f"{path}: {name} is {value!r}, and nothing that a run's file names is fetched",
                f"to fetch it, type {flag}",
            )
    if trackers := values.get("track"):
        raise UsageError(
            f"{path}: track is {trackers!r}, and nothing is sent because a run's file says so",
            f"--track {trackers} sends it; --track '' does not",
        )
    if (dataset := str(values.get("dataset", ""))).startswith(HUB):
        raise UsageError(
            f"{path}: its data set is {dataset!r}, and nothing that a run's file names is fetched",
            f"to fetch it, type --dataset {dataset}",
        )


def parse_settings(text: bytes, path: str) -> dict[str, Any]:
    """Parse lines `name = value` of the file `path`, without a run's techniques. Raises UsageError."""
    values = parse_toml(text, path)
    if isinstance(values.get(TECHNIQUES), dict):
        del values[TECHNIQUES]  # of a run, perhaps on another device
    return parse_all(values, Config)


def parse_toml(text: bytes, path: str) -> dict[str, Any]:
    """Parse the text of the TOML file `path`. Raises UsageError."""
    try:
        return tomllib.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", NEEDED) from error


def read_techniques(path: Path) -> dict[str, Any]:
    """Read the techniques that a run began with from its config.toml.

    Raises CheckpointError if it is not as the run wrote it.
    """
    read_run_config(path)  # which checks the seal
    values = parse_toml(read_of_run(path, MOST_BYTES), str(path))
    return parse_all(values.get(TECHNIQUES, {}), Config)


def read_run_config(path: Path) -> Config:
    """Read the settings of a run from its config.toml.

    Raises CheckpointError if it is not as the run wrote it.
    """
    text = read_of_run(path, MOST_BYTES)
    check_seal(text, str(path))
    try:
        return resolve(parse_settings(text, str(path)))
    except UsageError as error:  # such as a setting of another version
        raise CheckpointError(f"{path}: {error}", HINT) from error
