"""Fill the reference pages from the program: its commands, its settings and its recipes.

commands.md and settings.md have a comment where the tables come; what follows it is for GitHub.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import Field, fields
from typing import Any, get_type_hints

import typer
from mkdocs.structure.pages import Page
from rich.text import Text

from absld.cli.app import app
from absld.cli.options import format_value
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.fields import GROUPS, group_of
from absld.config.parsing import choices_of, is_union, strip_optional
from absld.config.recipes import METHOD_RECIPES, NORM_RECIPES, RECIPES
from absld.config.settings import Config


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the tables in the place of their comment."""
    makers = {"commands.md": commands, "settings.md": settings}
    if make := makers.get(page.file.src_uri):
        return markdown.split("<!-- below: made by docs/hooks/reference.py -->")[0] + "\n".join(
            make()
        )
    return markdown


def cell(text: str) -> str:
    """Return text that may stand in a cell of a table."""
    return re.sub(r"([\\[\]|*_<])", r"\\\1", text)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a table, with an empty line after it."""
    head = list(head)
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


# --- Commands ---


def commands() -> Iterator[str]:
    """Yield a section for the program, and for every command."""
    yield from command_lines(typer.main.get_command(app), "absld")


def command_lines(command: Any, name: str) -> Iterator[str]:
    """Yield the section of a command: its help, arguments and options; then those below it."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    below = getattr(command, "commands", {})
    usage = [name, *(p.metavar for p in arguments), *(["COMMAND"] if below else []), "[OPTIONS]"]
    yield from [f"## {name}", "", f"    {' '.join(usage)}", ""]
    yield from help_lines(command.help)
    if arguments:
        yield from table(
            ["argument", "meaning"], [[f"`{p.metavar}`", cell(plain(p.help))] for p in arguments]
        )
    groups = list(dict.fromkeys(getattr(p, "rich_help_panel", None) for p in options))
    for group in groups:
        members = [p for p in options if getattr(p, "rich_help_panel", None) == group]
        if members:
            yield from table([f"{group or 'Options'}", "meaning"], map(option_row, members))
    for part, inner in below.items():
        yield from command_lines(inner, f"{name} {part}")


def plain(markup: str | None) -> str:
    """Return a text without rich's markup."""
    return Text.from_markup(markup or "").plain


def help_lines(markup: str | None) -> Iterator[str]:
    """Yield the paragraphs of a help text; examples are a block of code."""
    examples = False
    for paragraph in plain(markup).strip().split("\n\n"):
        lines = paragraph.split("\n")
        if lines == ["Examples"]:
            examples = True
            continue
        if examples:
            yield from ["```text", *lines, "```", ""]
            examples = False
        else:
            yield from [*lines, ""]


def option_row(parameter: Any) -> list[str]:
    """Return the flags of an option with what it takes, and its meaning with its default."""
    flags = ", ".join(f"`{flag}`" for flag in parameter.opts)
    takes = f" {cell(parameter.metavar)}" if parameter.metavar and not parameter.is_flag else ""
    return [flags + takes, cell(plain(parameter.help))]


# --- Settings and recipes ---


def settings() -> Iterator[str]:
    """Yield the settings of trainings and evaluations by group, and the recipes."""
    yield from ["## Settings of a training", ""]
    yield from setting_tables(Config)
    yield from ["## Settings of an evaluation", ""]
    yield from setting_tables(EvaluationConfig)
    for title, recipes in (
        ("data sets", RECIPES), ("methods", METHOD_RECIPES), ("norms", NORM_RECIPES)
    ):  # fmt: skip
        yield from [f"## Recipes of {title}", ""]
        yield from table(
            ["recipe", "setting", "value", "source"],
            (
                [f"`{name}`", f"`{setting}`", f"`{format_value(value)}`", source]
                for name, recipe in recipes.items()
                for setting, (value, source) in recipe.items()
                if setting != "dataset"
            ),
        )


def setting_tables(settings_class: Any) -> Iterator[str]:
    """Yield a table for each group of the fields of a settings class."""
    kinds = get_type_hints(settings_class)
    for group in GROUPS:
        members = [f for f in fields(settings_class) if group_of(f) == group]
        if members:
            rows = ([f"`{f.name}`", *setting_cells(f, kinds[f.name])] for f in members)
            yield from table([group, "default", "meaning", "source"], rows)


def setting_cells(f: "Field[Any]", kind: Any) -> list[str]:
    """Return default, meaning and source of a setting; others may decide what is None."""
    meaning, _, default = f.metadata["meaning"].partition(" [default: ")
    if (choices := choices_of(kind)) and not is_union(strip_optional(kind)):
        meaning += f"; one of {', '.join(choices)}"
    default = default.removesuffix("]") or f"`{format_value(f.default)}`"
    return [cell(default), cell(meaning), cell(f.metadata["source"])]
