"""`absld compare`: methods under the same conditions."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from absld.cli.options import (
    AsJson,
    Estimate,
    RecipeFile,
    Seeds,
    Status,
    explicit,
    seed_list,
    take_settings,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import ComparisonConfig, EvaluationConfig
from absld.config.files import read_whole_recipe
from absld.config.launcher_settings import LauncherSettings, launcher_settings
from absld.config.parsing import parse_all
from absld.config.resolve import SETTING_GROUPS
from absld.config.settings import Config
from absld.errors import UsageError

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
    estimate: Estimate = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Compare methods: same images, same teachers, same schedule, several seeds.

    [bold]Examples[/]

    [cyan]absld compare --methods rslad,absld --seeds 5[/]
    [cyan]absld compare --methods absld,mypackage.methods:Mart,warm.toml[/]
    [cyan]absld compare --methods rslad,absld --launcher local --jobs 2[/]
    [cyan]absld compare --recipe paper-cifar10-resnet18 --teacher FILE --seeds 3[/]
    [cyan]absld compare RUN RUN RUN[/]

    Prints means and standard deviations over the seeds and differences to the
    baseline with confidence intervals. Settings apply to all methods. Finished
    runs are used again; the same command continues after an interruption.
    """
    flags = explicit(settings)
    of_all, of_recipe = read_whole_recipe(recipe, flags) if recipe and not runs else ({}, {})
    if not methods:
        methods = of_recipe.get("methods", "")
        baseline = baseline or of_recipe.get("baseline", "")
    if bool(runs) == bool(methods):
        raise UsageError("compare takes either --methods or finished runs", "see --help")
    own = take_own(flags, of_recipe)
    of_evaluation = take_evaluation(flags, of_recipe, of_methods=bool(methods))
    if runs:
        given_too = {"seeds": seeds, "recipe": recipe, "status": status, "estimate": estimate}
        given_too["schedule"] = own.schedule == "own"
        refuse_settings_of_trainings({*flags, *(name for name in given_too if given_too[name])})
    launcher = launcher_settings(take_settings(flags, LauncherSettings))
    if own.schedule == "own":  # that of the recipe would be one for all
        of_all = {k: value for k, value in of_all.items() if SETTING_GROUPS[k] != "Training"}
    names = [name.strip() for name in methods.split(",") if name.strip()]
    given = names, seed_list(seeds or str(of_recipe.get("seeds", ""))), of_all | flags
    evaluation = with_those_of_both(of_evaluation, given[2])
    if status or estimate:
        look_ahead(given, own, evaluation, launcher, status=status, as_json=as_json)
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
                    *given, evaluation, baseline, observer, launcher, own.schedule
                )
        output.present(result.results, comparison_lines(result))


Given = tuple[list[str], list[int], dict[str, Any]]
"""The methods, the seeds and the settings of all their runs."""


def look_ahead(
    given: Given,
    own: ComparisonConfig,
    evaluation: EvaluationConfig,
    launcher: LauncherSettings,
    *,
    status: bool,
    as_json: bool,
) -> None:
    """Print the state of each training of a comparison, or the time that all take."""
    from absld.cli.comparison_view import ComparisonView
    from absld.cli.status_view import present_estimate, present_states
    from absld.runs.comparison import comparison_estimate, comparison_states

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with ComparisonView(output) as view:
            settings = *given, evaluation, view, launcher, own.schedule
            if status:
                states = comparison_states(*settings)
            else:
                times = comparison_estimate(*settings)
        if status:
            present_states(output, states)
        else:
            present_estimate(output, times)


def take_own(flags: dict[str, Any], of_recipe: Mapping[str, Any]) -> ComparisonConfig:
    """Remove the settings of the comparison itself from `flags`, and return those and a recipe's."""
    flagged = take_settings(flags, ComparisonConfig)
    known = {f.name: of_recipe[f.name] for f in fields(ComparisonConfig) if f.name in of_recipe}
    return ComparisonConfig(**parse_all(known | flagged, ComparisonConfig))


def refuse_settings_of_trainings(given: Collection[str]) -> None:
    """Raise UsageError for settings that finished runs have already."""
    if extra := sorted({*given} - {"out", *OF_BOTH}):
        raise UsageError(
            f"finished runs have their settings: {', '.join(extra)} cannot be set", "omit it"
        )


def take_evaluation(
    flags: dict[str, Any], of_recipe: Mapping[str, Any], *, of_methods: bool
) -> dict[str, Any]:
    """Remove from `flags` the settings of the evaluations alone; return those and a recipe's."""
    if of_methods and "model" in flags:
        raise UsageError("--model is for finished runs", "--student sets the network to train")
    known = {name: of_recipe[name] for name in EVALUATION_OF_COMPARISON if name in of_recipe}
    return known | {name: flags.pop(name) for name in EVALUATION_OF_COMPARISON if name in flags}


def with_those_of_both(
    of_evaluation: Mapping[str, Any], of_trainings: Mapping[str, Any]
) -> EvaluationConfig:
    """Return the settings of the evaluations, also those that they share with the trainings."""
    both = {name: of_trainings[name] for name in OF_BOTH if name in of_trainings}
    return EvaluationConfig(**parse_all({**of_evaluation, **both}, EvaluationConfig))
