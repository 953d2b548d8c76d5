"""The view of `absld recipe show`: every setting with its value, source and meaning."""

import textwrap
from dataclasses import fields

from absld.cli.options import format_value
from absld.config.fields import GROUPS, group_of
from absld.config.resolve import setting_source
from absld.config.settings import Config


def recipe_lines(config: Config) -> list[str]:
    """Return two or more lines of at most 80 columns for each setting, under its group."""
    lines = ["# setting, value, source of the value. decided here: by this project"]
    for group in GROUPS:
        settings = [f for f in fields(Config) if group_of(f) == group]
        lines += [f"# {group}"] if settings else []
        for f in settings:
            value = format_value(getattr(config, f.name))
            lines.append(f"{f.name:20} {value:20} {setting_source(config, f.name)}")
            lines += textwrap.wrap(
                f.metadata["meaning"], 80, initial_indent="    ", subsequent_indent="    ",
                break_on_hyphens=False,
            )  # fmt: skip
    return lines
