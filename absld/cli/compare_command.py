"""`absld compare`: methods under the same conditions."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

import typer

from absld.cli.options import (
    AsJson,
    RecipeFile,
    Seeds,
    Status,
    explicit,
    seed_list,
    take_settings,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import PAPER_ATTACKS, ComparisonConfig, EvaluationConfig
from absld.config.files import read_recipe
from absld.config.launcher_settings import LauncherSettings, launcher_settings
from absld.config.parsing import parse_all
from absld.config.settings import Config
from absld.errors import UsageError

STATUS_SCHEMA = "absld-status-1"
OF_BOTH = ("device", "class_order", "in_memory", "track")  # trainings and evaluations
EVALUATION_OF_COMPARISON = ("attacks", "examples", "checks", "model")
MODEL_OF_COMPARISON = (
    "networks of the finished runs that are factories: package.module:factory, separated by commas"
)


@with_settings(
    EvaluationConfig, only=EVALUATION_OF_COMPARISON, meanings={"model": MODEL_OF_COMPARISON}
)
@with_settings(Config, without=("method", "seed"), schedule_of_method=False)
@with_settings(ComparisonConfig)
@with_settings(LauncherSettings)
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="directories of finished runs")
    ] = None,
    *,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="methods, package.module:Class or recipe files")
    ] = "",
    seeds: Seeds = "",
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help=r"method to compare with \[default: the first]")
    ] = "",
    recipe: RecipeFile = None,
    status: Status = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Compare methods: same images, same teachers, same schedule, several seeds.

    [bold]Examples[/]

    [cyan]absld compare --methods rslad,absld --seeds 5[/]
    [cyan]absld compare --methods absld,mypackage.methods:Mart,warm.toml[/]
    [cyan]absld compare --methods rslad,absld --launcher local --jobs 2[/]
    [cyan]absld compare --methods sat,rslad,absld --seeds 3 --table paper[/]
    [cyan]absld compare RUN RUN RUN[/]

    Prints means and standard deviations over the seeds and differences to the
    baseline with confidence intervals. Settings apply to all methods. Finished
    runs are used again; the same command continues after an interruption.
    """
    if bool(runs) == bool(methods):
        raise UsageError("compare takes either --methods or finished runs", "see --help")
    flags = explicit(settings)
    table = ComparisonConfig(**take_settings(flags, ComparisonConfig)).table
    of_evaluation = take_evaluation(flags, table, of_methods=bool(methods))
    if runs:
        own = {"seeds": seeds, "recipe": recipe, "status": status}
        refuse_settings_of_trainings({*flags, *(name for name in own if own[name])})
    launcher = launcher_settings(take_settings(flags, LauncherSettings))
    given = take_methods(methods, seeds, recipe, flags)
    evaluation = with_those_of_both(of_evaluation, given[2])
    if status:
        print_status(given, evaluation, launcher, as_json=as_json)
        return

    from absld.cli.comparison_view import comparison_lines, observing
    from absld.runs import comparison

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with observing(output, given[2], runs or ()) as observer:
            if runs:
                folder = flags.get("out", "")
                result = comparison.compare_runs(runs, evaluation, baseline, folder, observer)
            else:
                result = comparison.compare_methods(
                    *given, evaluation, baseline, observer, launcher
                )
        output.present(result.results, comparison_lines(result, table, output))


def print_status(
    given: tuple[list[str], list[int], dict[str, Any]],
    evaluation: EvaluationConfig,
    launcher: LauncherSettings,
    *,
    as_json: bool,
) -> None:
    """Print the state of each training of a comparison, for --status."""
    from absld.cli.comparison_view import ComparisonView
    from absld.cli.status_view import status_lines
    from absld.runs.comparison import comparison_states

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with ComparisonView(output) as view:
            states = comparison_states(*given, evaluation, view, launcher)
        output.present({"schema": STATUS_SCHEMA, "trainings": states}, status_lines(states))


def take_methods(
    methods: str, seeds: str, recipe: str | None, flags: dict[str, Any]
) -> tuple[list[str], list[int], dict[str, Any]]:
    """Return the methods, the seeds and the settings of all their runs."""
    of_all = (read_recipe(recipe, flags) if recipe else {}) | flags
    names = [name.strip() for name in methods.split(",") if name.strip()]
    return names, seed_list(seeds), of_all


def refuse_settings_of_trainings(given: Collection[str]) -> None:
    """Raise UsageError for settings that finished runs have already."""
    if extra := sorted({*given} - {"out", *OF_BOTH}):
        raise UsageError(
            f"finished runs have their settings: {', '.join(extra)} cannot be set", "omit it"
        )


def take_evaluation(flags: dict[str, Any], table: str, *, of_methods: bool) -> dict[str, Any]:
    """Remove from `flags` the settings of the evaluations alone, and return what a table needs."""
    if of_methods and "model" in flags:
        raise UsageError("--model is for finished runs", "--student sets the network to train")
    given = {name: flags.pop(name) for name in EVALUATION_OF_COMPARISON if name in flags}
    return {"attacks": PAPER_ATTACKS} | given | {"each": True} if table == "paper" else given


def with_those_of_both(
    of_evaluation: Mapping[str, Any], of_trainings: Mapping[str, Any]
) -> EvaluationConfig:
    """Return the settings of the evaluations, also those that they share with the trainings."""
    both = {name: of_trainings[name] for name in OF_BOTH if name in of_trainings}
    return EvaluationConfig(**parse_all({**of_evaluation, **both}, EvaluationConfig))
