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
    refuse_both,
    seed_list,
    take_settings,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import PAPER_ATTACKS, ComparisonConfig, EvaluationConfig
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
    [cyan]absld compare --methods sat,rslad,absld --seeds 3 --table paper[/]
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
    of_evaluation = take_evaluation(flags, of_recipe, own.table, of_methods=bool(methods))
    if runs:
        beside = {"seeds": seeds, "recipe": recipe, "status": status, "estimate": estimate}
        refuse_settings_of_trainings(flags, beside | {"schedule": own.schedule == "own"})
    launcher = launcher_settings(take_settings(flags, LauncherSettings))
    refuse_both(status=status, estimate=estimate)
    seeds = seeds or str(of_recipe.get("seeds", ""))
    given = take_methods(methods, seeds, without_schedule(of_all, own) | flags)
    evaluation = with_those_of_both(of_evaluation, given[2])
    if runs:
        out = flags.get("out", "")
        present_runs(runs, evaluation, baseline, out, own.table, as_json=as_json)
    elif status or estimate:
        present_ahead(given, own, evaluation, baseline, launcher, status=status, as_json=as_json)
    else:
        present_methods(given, own, evaluation, baseline, launcher, as_json=as_json)


Given = tuple[list[str], list[int], dict[str, Any]]
"""The methods, the seeds and the settings of all their runs."""


def present_runs(
    runs: list[str],
    evaluation: EvaluationConfig,
    baseline: str,
    out: str,
    table: str,
    *,
    as_json: bool,
) -> None:
    """Compare finished runs, and print the results."""
    from absld.cli.comparison_view import comparison_lines, observing
    from absld.runs import comparison

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with observing(output, {"track": evaluation.track}, runs) as observer:
            result = comparison.compare_runs(runs, evaluation, baseline, out, observer)
        output.present(result.results, comparison_lines(result, table, output))


def present_methods(
    given: Given,
    own: ComparisonConfig,
    evaluation: EvaluationConfig,
    baseline: str,
    launcher: LauncherSettings,
    *,
    as_json: bool,
) -> None:
    """Train and compare methods, and print the results."""
    from absld.cli.comparison_view import comparison_lines, observing
    from absld.runs import comparison

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with observing(output, given[2]) as observer:
            result = comparison.compare_methods(
                *given, evaluation, baseline, observer, launcher, own.schedule
            )
        output.present(result.results, comparison_lines(result, own.table, output))


def present_ahead(
    given: Given,
    own: ComparisonConfig,
    evaluation: EvaluationConfig,
    baseline: str,
    launcher: LauncherSettings,
    *,
    status: bool,
    as_json: bool,
) -> None:
    """Print the state of each training of a comparison, or the time that all take."""
    from absld.cli.comparison_view import ComparisonView
    from absld.cli.status_view import ahead
    from absld.runs.comparison import planned_runs

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with ComparisonView(output) as view:
            labels, configs, *_ = planned_runs(*given, baseline, own.schedule)
            report = ahead(labels, configs, evaluation, view, launcher, status=status)
        output.present(*report)


def without_schedule(of_recipe: dict[str, Any], own: ComparisonConfig) -> dict[str, Any]:
    """Return the settings of a recipe; its schedule, one for all, only if the methods share it."""
    if own.schedule == "same":
        return of_recipe
    return {k: value for k, value in of_recipe.items() if SETTING_GROUPS[k] != "Training"}


def take_methods(methods: str, seeds: str, of_all: dict[str, Any]) -> Given:
    """Return the methods, the seeds and the settings of all their runs."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    return names, seed_list(seeds), of_all


def take_own(flags: dict[str, Any], of_recipe: Mapping[str, Any]) -> ComparisonConfig:
    """Remove the settings of the comparison itself from `flags`, and return those and a recipe's."""
    flagged = take_settings(flags, ComparisonConfig)
    known = {f.name: of_recipe[f.name] for f in fields(ComparisonConfig) if f.name in of_recipe}
    return ComparisonConfig(**parse_all(known | flagged, ComparisonConfig))


def refuse_settings_of_trainings(flags: Collection[str], beside: Mapping[str, Any]) -> None:
    """Raise UsageError for settings that finished runs have already.

    beside: options of trainings that are not settings; those that are empty were not given.
    """
    given = {*flags, *(name for name, value in beside.items() if value)}
    if extra := sorted(given - {"out", *OF_BOTH}):
        raise UsageError(
            f"finished runs have their settings: {', '.join(extra)} cannot be set", "omit it"
        )


def take_evaluation(
    flags: dict[str, Any], of_recipe: Mapping[str, Any], table: str, *, of_methods: bool
) -> dict[str, Any]:
    """Remove from `flags` the settings of the evaluations alone.

    Returns those, a recipe's, and what a table needs.
    """
    if of_methods and "model" in flags:
        raise UsageError("--model is for finished runs", "--student sets the network to train")
    of_table = {"attacks": PAPER_ATTACKS, "each": True} if table == "paper" else {}
    known = {name: of_recipe[name] for name in EVALUATION_OF_COMPARISON if name in of_recipe}
    given = {name: flags.pop(name) for name in EVALUATION_OF_COMPARISON if name in flags}
    return of_table | known | given


def with_those_of_both(
    of_evaluation: Mapping[str, Any], of_trainings: Mapping[str, Any]
) -> EvaluationConfig:
    """Return the settings of the evaluations, also those that they share with the trainings."""
    both = {name: of_trainings[name] for name in OF_BOTH if name in of_trainings}
    return EvaluationConfig(**parse_all({**of_evaluation, **both}, EvaluationConfig))
