"""Settings as TOML files: recipes, and the sealed config.toml of a run."""

import hashlib
import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

from absld.config.parsing import parse
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError

SEAL = "# SHA-256 of the lines above, which a run is read with: "


def to_toml(config: Config) -> str:
    """The settings as a recipe file, which `--recipe` reads back, sealed."""
    values = {f.name: getattr(config, f.name) for f in fields(Config)}
    lines = (f"{name} = {toml(value)}" for name, value in values.items() if value is not None)
    text = "\n".join(lines) + "\n"
    return f"{text}{SEAL}{sha256(text.encode())}\n"


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def of_run(path: Path) -> Config:
    """The settings of a run, from its config.toml. Raises CheckpointError if they have changed
    since the run wrote them, UsageError if they are no settings."""
    values = from_toml(str(path))
    text, seal, sealed = path.read_bytes().partition(SEAL.encode())
    if seal and sealed.strip() != sha256(text).encode():
        raise CheckpointError(
            f"{path}: has changed since the run wrote it",
            "copy it again; to train with other settings give it as --recipe",
        )
    return resolve(values)


def toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower()  # True is true


def from_toml(path: str) -> dict[str, Any]:
    """The settings in a recipe file of lines `name = value`. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", "needed: lines of name = value") from error
    return {name: parse(name, value, Config) for name, value in values.items()}
