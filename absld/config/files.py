"""Settings as TOML files: recipes, and the sealed config.toml of a run."""

import hashlib
import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from absld.config.parsing import parse_all
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError

SEAL = "# SHA-256 of the lines above, which a run is read with: "


def to_toml(config: Config) -> str:
    """Return the settings as the text of a recipe file, with a seal as its last line."""
    values = {f.name: getattr(config, f.name) for f in fields(Config)}
    lines = (f"{name} = {toml_value(v)}" for name, v in values.items() if v is not None)
    text = "\n".join(lines) + "\n"
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


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
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", "needed: lines of name = value") from error
    return parse_all(values, Config)


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
