"""Settings as command-line options."""

import contextlib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from absld.config.fields import GROUPS, Settings, group_of
from absld.config.files import RECIPE_FILES
from absld.config.parsing import choices_of, is_union, strip_optional
from absld.config.recipes import METHOD_RECIPES, NORM_RECIPES, RECIPES
from absld.errors import UsageError

AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON document on stdout, progress on stderr")
]
Seeds = Annotated[
    str, typer.Option(metavar="N", help=r"number of seeds, or a list such as 0,3,7 \[default: 1]")
]
Status = Annotated[
    bool, typer.Option("--status", help="print the state of each training, and train nothing")
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET", help="a run directory, a file, hf:owner/name or package.module:factory"
    ),
]
RecipeFile = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="FILE|NAME",
        help="TOML file of settings, one `name = value` per line, or a name of `absld recipe list`",
        autocompletion=lambda incomplete: [n for n in RECIPE_FILES if n.startswith(incomplete)],
    ),
]
Estimate = Annotated[
    bool,
    typer.Option("--estimate", help="measure a few steps, print the time of all, train nothing"),
]
ALIASES = {"epsilon": ["--eps"]}
COMPLETED = {"dataset": RECIPES, "method": METHOD_RECIPES}  # settings with other values, too
MAX_METAVAR = 16  # columns; longer lists of choices are in the help text


class ShortHelp:
    """Help of 80 columns: a switch has no type there, and not the form that switches it off."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments of the usage line, TARGET instead of {TARGET}."""
        pieces = super().collect_usage_pieces(ctx)  # type: ignore[misc]  # of the other base
        return [piece.strip("{}") for piece in pieces]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with contextlib.ExitStack() as stack:  # the command is also parsed, maybe after its help
            for parameter in self.get_params(ctx):  # type: ignore[attr-defined]  # of the other base
                if getattr(parameter, "is_flag", False):
                    stack.callback(vars(parameter).update, dict(vars(parameter)))
                    parameter.metavar, parameter.secondary_opts = "", []
            super().format_help(ctx, formatter)  # type: ignore[misc]


class Command(ShortHelp, TyperCommand):
    """A command with short help."""


class CommandGroup(ShortHelp, TyperGroup):
    """A group of commands with short help."""


def with_settings(
    settings_class: type[Settings],
    *,
    only: Collection[str] = (),
    without: Collection[str] = (),
    meanings: Mapping[str, str] | None = None,
    schedule_of_method: bool = True,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the settings of a class to a command, as options that its `**settings` receives.

    Args:
        only: names of the settings to add; empty: all.
        without: names of settings to leave out.
        meanings: texts that replace those of the settings, by name.
        schedule_of_method: False leaves the recipes of methods out of the defaults of the group
            Training, for a command that does not use them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
        kinds = get_type_hints(settings_class)
        options = [
            option(
                f,
                kinds[f.name],
                (meanings or {}).get(f.name, f.metadata["meaning"]),
                method_recipes=schedule_of_method or group_of(f) != "Training",
            )
            for f in fields(settings_class)
            if f.name not in without and (not only or f.name in only)
        ]
        parameters = sorted([*own, *options], key=rank)
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
        command.__annotations__.pop("settings", None)
        command.__annotations__ |= {p.name: p.annotation for p in options}
        return command

    return decorate


def rank(parameter: inspect.Parameter) -> tuple[int, bool]:
    """Return the place of an option in the help: own options first, then groups, rare ones last."""
    group = getattr(parameter.annotation.__metadata__[0], "rich_help_panel", None)
    return GROUPS.index(group) if group in GROUPS else -1, parameter.name.endswith("_column")


def option(f: "Field[Any]", kind: Any, meaning: str, *, method_recipes: bool) -> inspect.Parameter:
    """Make the option of a setting: its flag, meaning, choices and defaults."""
    kind, choices = strip_optional(kind), choices_of(kind)
    words = choices or COMPLETED.get(f.name, ())
    flag = "--" + f.name.replace("_", "-")
    metavar = {str: "TEXT", float: "X", int: "N"}.get(kind, "X,X,...")
    meaning, _, default = meaning.partition(" [default: ")
    default = default.removesuffix("]") or describe_defaults(f, method_recipes=method_recipes)
    if choices:
        metavar = "|".join(("X", *choices) if is_union(kind) else choices)
        if len(metavar) > MAX_METAVAR:
            metavar, meaning = "NAME", f"{meaning}; one of {', '.join(choices)}"
    help_text = escape(meaning)
    if default:
        help_text += f" [dim]{escape(f'[default: {default}]')}[/]"
    parameter = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        *ALIASES.get(f.name, []),
        help=help_text,
        metavar=None if kind is bool else metavar,
        rich_help_panel=group_of(f),
        show_default=False,
        autocompletion=lambda incomplete: [c for c in words if c.startswith(incomplete)],
    )
    # The text is parsed by absld.config, as in a recipe file: one place knows what is allowed.
    value: Any = bool if kind is bool else str
    annotation = Annotated[value | None, parameter]
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def describe_defaults(f: "Field[Any]", *, method_recipes: bool = True) -> str:
    """Return the default of a setting, and those of recipes; empty if it is off or not set."""
    if f.default is True:
        return f"on; --no-{f.name.replace('_', '-')} switches it off"
    unset = f.default is None or f.default is False or f.default == ""
    texts = [] if unset else [format_value(f.default)]
    recipes = RECIPES | (METHOD_RECIPES if method_recipes else {}) | dict(NORM_RECIPES.items())
    for name, recipe in recipes.items():
        if f.name in recipe and f.name != "dataset":
            texts.append(f"{name}: {format_value(recipe[f.name][0])}")
    return "; ".join(texts)


def format_value(value: Any) -> str:
    """Return a setting's value as a person writes it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


def explicit(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given as flags."""
    return {name: value for name, value in settings.items() if value is not None}


def take_settings(flags: dict[str, Any], settings_class: type[Settings]) -> dict[str, Any]:
    """Return the flags of a settings class, and remove them from `flags`."""
    return {f.name: flags.pop(f.name) for f in fields(settings_class) if f.name in flags}


def refuse_both(*, status: bool, estimate: bool) -> None:
    """Raise UsageError where --status and --estimate are both given."""
    if status and estimate:
        raise UsageError("--status and --estimate print different things", "give one of them")


def seed_list(text: str) -> list[int]:
    """Return the seeds 0 to 4 for "5", the listed seeds for "0,3,7", and seed 0 for "".

    Raises UsageError.
    """
    hint = "5, or 0,3,7"
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()] or [1]
    except ValueError:
        raise UsageError(f"seeds takes whole numbers, not {text!r}", hint) from None
    seeds = numbers if "," in text else list(range(numbers[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds takes different numbers, not {text!r}", hint)
    return seeds
