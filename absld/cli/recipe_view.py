"""The views of `absld recipe`: the recipes, and every setting with its value, source and meaning."""

import re
from collections.abc import Mapping
from dataclasses import fields

from absld.cli.options import format_value
from absld.config.fields import GROUPS, group_of
from absld.config.files import RECIPE_FILES
from absld.config.recipes import RECIPES
from absld.config.resolve import setting_source
from absld.config.settings import Config
from absld.text import wrap


def list_lines() -> list[str]:
    """Return a line for each recipe of a data set, and for each that is a file: its first line."""
    lines = [f"{name:40} --dataset {name}" for name in RECIPES]
    for name in sorted(RECIPE_FILES):
        first = RECIPE_FILES[name].read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"{name:40} {first.removeprefix('# ')}")
    return lines


def file_parts(name: str) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the parts of a recipe's file: what it begins with, sources by setting, its table.

    The comment after a value is its source.
    """
    text = RECIPE_FILES[name].read_text(encoding="utf-8")
    head, _, rest = text.partition("\n\n")
    settings, _, table = rest.partition("[compare]\n")
    sources = dict(re.findall(r"^(\w+) = .* # (.*)$", settings, re.MULTILINE))
    return head.splitlines(), sources, [f"# {line}" for line in ("[compare]", *table.splitlines())]


def recipe_lines(config: Config, sources: Mapping[str, str] | None = None) -> list[str]:
    """Return two or more lines of at most 80 columns for each setting, under its group.

    sources: of the values that a file sets.
    """
    sources = sources or {}
    lines = ["# setting, value, source of the value. decided here: by this project"]
    for group in GROUPS:
        settings = [f for f in fields(Config) if group_of(f) == group]
        lines += [f"# {group}"] if settings else []
        for f in settings:
            value = format_value(getattr(config, f.name))
            source = sources.get(f.name) or setting_source(config, f.name)
            lines.append(f"{f.name:20} {value:20} {source}")
            lines += wrap(f.metadata["meaning"], 80, "    ", "    ")
    return lines
