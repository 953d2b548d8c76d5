"""Settings as TOML files: recipes, and the sealed config.toml of a run."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from absld.config.parsing import parse_all
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError

TECHNIQUES = "techniques"
SEAL = "# SHA-256 of the lines above, which a run is read with: "


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


def read_recipe(path: str) -> dict[str, Any]:
    """Read the settings of a recipe file, lines `name = value`. Raises UsageError."""
    values = read_toml(path)
    if isinstance(values.get(TECHNIQUES), dict):
        del values[TECHNIQUES]  # of a run, perhaps on another device
    return parse_all(values, Config)


def read_toml(path: str) -> dict[str, Any]:
    """Read a TOML file. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", "needed: lines of name = value") from error


def read_techniques(path: Path) -> dict[str, Any]:
    """Read the techniques that a run began with from its config.toml.

    Raises as `read_run_config` does.
    """
    read_run_config(path)  # a file that has changed is refused
    return parse_all(read_toml(str(path)).get(TECHNIQUES, {}), Config)


def read_run_config(path: Path) -> Config:
    """Read the settings of a run from its config.toml.

    Raises:
        CheckpointError: if the file has changed since the run wrote it.
        UsageError: if it does not hold settings.
    """
    values = read_recipe(str(path))
    text, seal, digest = path.read_bytes().partition(SEAL.encode())
    if seal and digest.strip() != hashlib.sha256(text).hexdigest().encode():
        raise CheckpointError(
            f"{path}: has changed since the run wrote it",
            "copy it again; to train with other settings give it as --recipe",
        )
    return resolve(values)
