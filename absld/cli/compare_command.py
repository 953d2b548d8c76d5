"""`absld compare`: methods under the same conditions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from absld.cli.options import (
    AsJson,
    RecipeFile,
    Status,
    explicit,
    seed_list,
    take_settings,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe
from absld.config.launcher_settings import LauncherSettings, launcher_settings
from absld.config.parsing import parse_all
from absld.config.resolve import resolve
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
@with_settings(LauncherSettings)
def compare(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="RUN", help="directories of finished runs")
    ] = None,
    *,
    methods: Annotated[
        str, typer.Option(metavar="NAMES", help="methods, package.module:Class or recipe files")
    ] = "",
    seeds: Annotated[
        str,
        typer.Option(metavar="N", help=r"number of seeds, or a list such as 0,3,7 \[default: 1]"),
    ] = "",
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
    [cyan]absld compare --methods rslad,absld --launcher slurm --gpus 1[/]
    [cyan]absld compare RUN RUN RUN[/]

    Prints means and standard deviations over the seeds and differences to the
    baseline with confidence intervals. Settings apply to all methods. Finished
    runs are used again; the same command continues after an interruption.
    """
    flags = explicit(settings)
    of_launcher = take_settings(flags, LauncherSettings)
    check_use(
        runs,
        methods,
        flags | of_launcher | {"seeds": seeds, "recipe": recipe, "status": status or None},
    )
    evaluation = take_evaluation(flags)
    launcher = launcher_settings(of_launcher)

    from absld.cli.comparison_view import ComparisonView, comparison_lines
    from absld.cli.status_view import status_lines
    from absld.runs import comparison
    from absld.tracking.start import tracked

    of_all = (read_recipe(recipe, flags) if recipe else {}) | flags
    tracking = launcher.launcher == "here" and not status  # else each job tracks itself
    place = Path(runs[0]).parent if runs else resolve(of_all).out
    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with (
            ComparisonView(output) as view,
            tracked(of_all.get("track", "") if tracking else "", place, view) as observer,
        ):
            if runs:
                out = flags.get("out", "")
                result = comparison.compare_runs(runs, evaluation, baseline, out, observer)
            else:
                names = [name.strip() for name in methods.split(",") if name.strip()]
                given = names, seed_list(seeds), of_all, evaluation
                if status:
                    states = comparison.comparison_states(*given, view, launcher)
                else:
                    result = comparison.compare_methods(*given, baseline, observer, launcher)
        if status:
            output.present({"schema": STATUS_SCHEMA, "trainings": states}, status_lines(states))
        else:
            output.present(result.results, comparison_lines(result))


def check_use(runs: list[str] | None, methods: str, flags: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that finished runs, or trainings, do not take."""
    if bool(runs) == bool(methods):
        raise UsageError("compare takes either --methods or finished runs", "see --help")
    if methods and "model" in flags:
        raise UsageError("--model is for finished runs", "--student sets the network to train")
    taken = {"out", *OF_BOTH, *EVALUATION_OF_COMPARISON}
    if runs and (
        extra := sorted(
            name for name, value in flags.items() if value not in (None, "") and name not in taken
        )
    ):
        raise UsageError(
            f"finished runs have their settings: {', '.join(extra)} cannot be set", "omit it"
        )


def take_evaluation(flags: dict[str, Any]) -> EvaluationConfig:
    """Return the settings of the evaluations, and remove from `flags` those of them alone."""
    chosen = {name: flags.pop(name) for name in EVALUATION_OF_COMPARISON if name in flags}
    chosen |= {name: flags[name] for name in OF_BOTH if name in flags}
    return EvaluationConfig(**parse_all(chosen, EvaluationConfig))
