"""Settings as command-line options."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, get_args, get_type_hints

import typer

from absld.config.parsing import bare, is_choice
from absld.config.recipes import METHOD_RECIPES, RECIPES
from absld.config.settings import Settings, group
from absld.errors import UsageError


def shown(value: Any) -> str:
    """A setting's value as a person writes it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower()


ALIASES = {"epsilon": ["--eps"]}


def with_settings(
    of: type[Settings], without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every setting of a class, but those `without`, as an option, in place of its
    `**settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
        kinds = get_type_hints(of)
        options = [option(f, kinds[f.name]) for f in fields(of) if f.name not in without]
        command.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]  # inspect reads it
        del command.__annotations__["settings"]
        command.__annotations__ |= {p.name: p.annotation for p in options}
        return command

    return decorate


def option(f: "Field[Any]", kind: Any) -> inspect.Parameter:
    """A setting as a command line option: its name, its meaning and its defaults."""
    defaults = [shown(f.default)] + [
        f"{name}: {shown(recipe[f.name][0])}"
        for name, recipe in (RECIPES | METHOD_RECIPES).items()
        if f.name in recipe and f.name != "dataset"
    ]
    kind = bare(kind)
    metavar = "|".join(get_args(kind)) if is_choice(kind) else {str: "TEXT", float: "X"}.get(kind)
    flag = "--" + f.name.replace("_", "-")
    about = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        *ALIASES.get(f.name, []),
        help=f"{f.metadata['meaning']} [dim]({'; '.join(defaults)})[/]",
        metavar=None if kind is bool else metavar or "N",
        rich_help_panel=group(f),
        show_default=False,
    )
    # The text is read by absld.config.settings, as in a recipe file: one place knows what is allowed.
    value: Any = bool if kind is bool else str
    return inspect.Parameter(
        f.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, about],
    )


def given(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given as flags."""
    return {name: value for name, value in settings.items() if value is not None}


def seed_list(text: str) -> list[int]:
    """5 as the seeds 0 to 4, or the numbers that are listed; one seed where nothing is said."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()] or [1]
    except ValueError:
        raise UsageError(f"seeds takes whole numbers, not {text!r}", "5, or 0,3,7") from None
    seeds = numbers if "," in text else list(range(numbers[0]))
    if not seeds or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds takes different numbers, not {text!r}", "5, or 0,3,7")
    return seeds
