"""`absld sweep`: a grid of settings under the same conditions."""

from typing import Annotated, Any

import typer

from absld.cli.compare_command import with_those_of_both
from absld.cli.options import (
    AsJson,
    Command,
    Estimate,
    RecipeFile,
    Seeds,
    Status,
    explicit,
    refuse_both,
    seed_list,
    take_settings,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe
from absld.config.launcher_settings import LauncherSettings, launcher_settings
from absld.config.settings import Config

EVALUATION_OF_SWEEP = ("attacks", "examples", "checks", "split")
SPLIT = (
    "split to evaluate on; figures of a point that is chosen on test are optimistic "
    "[default: validation]"
)


class SweepCommand(Command):
    """A command whose --over takes all words up to the next flag."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[str] = []
        after_over = False
        for word in args:
            if word.startswith("-"):
                after_over = word == "--over" or word.startswith("--over=")
            elif after_over and given[-1] != "--over":
                given.append("--over")
            given.append(word)
        return super().parse_args(ctx, given)


@with_settings(EvaluationConfig, only=EVALUATION_OF_SWEEP, meanings={"split": SPLIT})
@with_settings(Config, without=("seed",))
@with_settings(LauncherSettings)
def sweep(
    *,
    over: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V ...", help="settings to vary, and their values"),
    ] = None,
    seeds: Seeds = "",
    recipe: RecipeFile = None,
    status: Status = False,
    estimate: Estimate = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Vary settings, and find the frontier of average and worst class.

    [bold]Examples[/]

    [cyan]absld sweep --over temperature_rate=0.02,0.1 temperature_lower=0.25,0.5[/]
    [cyan]absld sweep --recipe base.toml --over adv_weight=0.5,5/6 --seeds 3[/]
    [cyan]absld sweep --over method=absld,ard adv_weight=0.5,5/6 --launcher local[/]

    Trains every combination of the values with every seed, and evaluates them
    on the validation images. The base point, which has the recipe's and the
    flags' settings, is trained too. Finished runs are used again; the same
    command continues after an interruption.
    """
    flags = explicit(settings)
    launcher = launcher_settings(take_settings(flags, LauncherSettings))
    refuse_both(status=status, estimate=estimate)
    chosen = {name: flags.pop(name) for name in EVALUATION_OF_SWEEP if name in flags}
    base = (read_recipe(recipe, flags) if recipe else {}) | flags
    evaluation = with_those_of_both({"split": "validation"} | chosen, base)

    from absld.cli.comparison_view import observing
    from absld.cli.status_view import ahead
    from absld.report.sweep_tables import terminal_lines
    from absld.runs.grid import build_points, parse_over
    from absld.runs.sweep import sweep as sweep_grid
    from absld.runs.sweep import with_seeds

    grid = parse_over(over or [])
    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with observing(output, {} if status or estimate else base) as observer:
            if status or estimate:
                runs = with_seeds(build_points(base, grid)[0], seed_list(seeds))
                report = ahead(*runs, evaluation, observer, launcher, status=status)
            else:
                result = sweep_grid(grid, seed_list(seeds), base, evaluation, observer, launcher)
                lines = ["", *terminal_lines(result.results), str(result.folder)]
                report = result.results, lines
        output.present(*report)
