"""`absld recipe`: list the recipes, and show all settings of one."""

import sys
from typing import Annotated

import typer

from absld.cli.options import Command, CommandGroup
from absld.cli.printing import say
from absld.cli.recipe_view import file_parts, list_lines, recipe_lines
from absld.config.files import RECIPE_FILES, read_recipe
from absld.config.parsing import did_you_mean
from absld.config.recipes import METHOD_RECIPES, RECIPES
from absld.config.resolve import resolve
from absld.errors import UsageError

recipe_app = typer.Typer(
    cls=CommandGroup, no_args_is_help=True, help="List recipes, or show all settings of one."
)
RECIPE_NAMES = (*RECIPES, *sorted(RECIPE_FILES))


@recipe_app.command("list", cls=Command)
def list_recipes() -> None:
    """List the recipes: those of data sets, and those for --recipe NAME.

    [bold]Example[/]

    [cyan]absld recipe list[/]
    """
    for line in list_lines():
        say(line, sys.stdout)


@recipe_app.command(cls=Command)
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="one of `absld recipe list`",
            autocompletion=lambda incomplete: [n for n in RECIPE_NAMES if n.startswith(incomplete)],
        ),
    ],
    *,
    method: Annotated[
        str, typer.Option(metavar="NAME", help=f"one of {', '.join(METHOD_RECIPES)}")
    ] = "absld",
    norm: Annotated[str, typer.Option(metavar="NAME", help="linf or l2")] = "linf",
) -> None:
    """Show every setting of a recipe, a method and a norm, with its value and source.

    [bold]Examples[/]

    [cyan]absld recipe show digits[/]
    [cyan]absld recipe show cifar10 --method ard[/]
    [cyan]absld recipe show paper-cifar10-resnet18[/]
    """
    if name not in RECIPE_NAMES:
        hint = did_you_mean(name, RECIPE_NAMES, f"there are: {', '.join(RECIPE_NAMES)}")
        raise UsageError(f"there is no recipe {name!r}", hint)
    given = {"method": method, "norm": norm}
    if name in RECIPES:
        lines = recipe_lines(resolve({"dataset": name, **given}))
    else:
        head, sources, table = file_parts(name)
        lines = [*head, *recipe_lines(resolve(read_recipe(name) | given), sources), *table]
    for line in lines:
        say(line, sys.stdout)
