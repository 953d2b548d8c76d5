"""Settings as TOML files: recipes, and the sealed config.toml of a run.

A recipe may have a table [compare], what `absld compare` needs beside settings. Those in
`recipe_files` come with the package, and have names.
"""

import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from absld.config.imports import HUB, names_code
from absld.config.parsing import did_you_mean, parse_all
from absld.config.recipes import RECIPES
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError
from absld.storage.opening import read_bytes, read_of_run

RECIPE_FILES = {path.stem: path for path in Path(__file__).parent.glob("recipe_files/*.toml")}
TECHNIQUES, COMPARISON = "techniques", "compare"
OF_COMPARISON = ("methods", "seeds", "baseline", "schedule", "attacks", "examples", "checks")
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


def read_recipe(name: str, flags: Collection[str] = ()) -> dict[str, Any]:
    """Read the settings of a recipe; see `read_whole_recipe`."""
    return read_whole_recipe(name, flags)[0]


def read_whole_recipe(
    name: str, flags: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the settings of a recipe, lines `name = value`, and its table [compare].

    Args:
        name: one of RECIPE_FILES, whatever files there are, or the path of a file.
        flags: names of the settings that flags override.

    Raises:
        UsageError: it does not hold settings, or it is a run's and names code.
        CheckpointError: it is a run's, and not as the run wrote it.
    """
    path = RECIPE_FILES.get(name, Path(name))
    try:
        text = read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror or error}", hint_for(name)) from error
    except CheckpointError as error:
        raise UsageError(str(error), error.hint) from error
    if of_run := is_of_run(path) or SEAL.encode() in text:  # perhaps under another name
        check_seal(text, name)
    values = parse_toml(text, name)
    # No run has written a comparison: there it is refused as a setting that does not exist.
    comparison = {} if of_run else values.pop(COMPARISON, {})
    settings = to_settings(values)
    if of_run:
        refuse_code(name, {name: value for name, value in settings.items() if name not in flags})
    return settings, parse_comparison(comparison, name)


def hint_for(name: str) -> str:
    """Return a hint for a recipe that cannot be read: a name like it, else what is needed."""
    if name in RECIPES:
        return f"--dataset {name} has its recipe"
    return did_you_mean(name, RECIPE_FILES, NEEDED)


def parse_comparison(values: Any, path: str) -> dict[str, Any]:
    """Return what a recipe says to `absld compare`, a list as flags have it. Raises UsageError."""
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {COMPARISON} is a table", f"[{COMPARISON}], and lines below it")
    if unknown := next((name for name in values if name not in OF_COMPARISON), None):
        raise UsageError(
            f"{path}: there is no {unknown!r} in [{COMPARISON}]",
            f"there are: {', '.join(OF_COMPARISON)}",
        )
    flags = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    if isinstance(values.get("seeds"), list):
        flags["seeds"] += ","  # a list of one seed is that one, the number 3 is three of them
    for name in ("methods", "baseline"):  # no settings, whose types are checked with the flags
        if not isinstance(flags.get(name, ""), str):
            raise UsageError(
                f"{path}: {name} in [{COMPARISON}] takes a text, not {flags[name]!r}",
                f'{name} = "rslad"',
            )
    return flags


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


def to_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse the values of a file, without a run's techniques. Raises UsageError."""
    if isinstance(values.get(TECHNIQUES), dict):  # of a run, perhaps on another device
        values = {name: value for name, value in values.items() if name != TECHNIQUES}
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
        return resolve(to_settings(parse_toml(text, str(path))))
    except UsageError as error:  # such as a setting of another version
        raise CheckpointError(f"{path}: {error}", HINT) from error
