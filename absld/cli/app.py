"""The commands. Heavy imports are inside the commands, so that help and completion are fast."""

import errno
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import absld
from absld.cli.bench_command import bench
from absld.cli.compare_command import compare
from absld.cli.export_command import export
from absld.cli.options import (
    AsJson,
    Command,
    CommandGroup,
    RecipeFile,
    Target,
    explicit,
    with_settings,
)
from absld.cli.output import SAME_COMMAND, command_output
from absld.cli.printing import say, say_aside, standard_streams
from absld.cli.push_command import push
from absld.cli.recipe_commands import recipe_app
from absld.cli.signals import signal_exit_code
from absld.cli.sweep_command import SweepCommand, sweep
from absld.cli.teacher_commands import teacher_app
from absld.config.datasets import CORRUPTED
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe
from absld.config.resolve import resolve, resolve_evaluation
from absld.config.settings import Config
from absld.errors import AbsldError, UnreliableError, UsageError, in_words
from absld.text import clip, page_of

app = typer.Typer(
    cls=CommandGroup,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def print_version(wanted: bool | None) -> None:
    """Print the version and end, for --version."""
    if wanted:
        say(f"absld {absld.__version__}", sys.stdout)
        raise typer.Exit


@app.callback()
def about(
    *,
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=print_version, is_eager=True, help="print the version"),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="print the traceback of an error")] = False,
) -> None:
    """Train and evaluate small, robust image classifiers without weak classes.

    RUN is a run directory of `absld train`, such as runs/digits-absld-seed0-...

    [bold]Examples[/]

    [cyan]absld train[/]                              digits on a CPU, in about a minute
    [cyan]absld train --dataset cifar10[/]            the setting of the ABSLD paper
    [cyan]absld train --method rslad[/]               another method, same settings
    [cyan]absld train --resume[/]                     continue an interrupted run
    [cyan]absld evaluate RUN[/]                       robust accuracy by class, with checks
    [cyan]absld report RUN[/]                         an HTML page of the evaluation
    [cyan]absld push RUN hf:owner/name[/]             the student on the Hugging Face Hub
    [cyan]absld compare --methods rslad,absld[/]      methods under the same conditions
    [cyan]absld sweep --over adv_weight=0.5,0.9[/]    a setting's average and worst class
    [cyan]absld export RUN[/]                         an ONNX file of the network, checked
    [cyan]absld teacher list[/]                       published teachers, with links
    [cyan]absld teacher check FILE[/]                 accuracy and soft labels of a teacher
    [cyan]absld recipe show cifar10[/]                all settings, with their sources
    """
    # `main` takes --debug out, wherever it stands; the option is here for the help.


# --- absld train, evaluate, compare, sweep, export ---


@app.command(cls=Command)
@with_settings(Config)
def train(
    *,
    recipe: RecipeFile = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Train a student whose classes are about equally robust, and test it.

    [bold]Examples[/]

    [cyan]absld train[/]                               digits on a CPU, in about a minute
    [cyan]absld train --dataset cifar10 --teacher FILE[/]   a teacher from a file
    [cyan]absld train --dataset folder --data DIR[/]   images in DIR/{train,test}/CLASS/
    [cyan]absld train --student mypackage.nets:small[/]   a network of your own
    [cyan]absld train --recipe my.toml --resume[/]     continue after an interruption

    Each run has a directory in --out with its settings, environment, metrics
    and checkpoints (best.pt, last.pt). A teacher trained by this command is saved
    in --out and reused by later runs.
    """
    flags = explicit(settings)
    config = resolve((read_recipe(recipe, flags) if recipe else {}) | flags)

    import absld.runs.training_run
    from absld.cli.training_view import TrainingView, training_lines
    from absld.engine.distributed import init_distributed
    from absld.tracking.start import tracked

    with (
        init_distributed(config.device) as distributed,
        command_output(
            as_json, world_size=distributed.world_size, is_main=distributed.is_main
        ) as output,
    ):
        with (
            TrainingView(output) as view,
            tracked(config.track, config.out, view, is_main=distributed.is_main) as observer,
        ):
            result = absld.runs.training_run.train(
                config, observer, resume=resume, distributed=distributed
            )
        output.present(
            result.to_dict() | {"config": asdict(config)}, training_lines(result, config.student)
        )


@app.command(cls=Command)
@with_settings(EvaluationConfig)
def evaluate(
    target: Target,
    *,
    against: Annotated[
        str | None,
        typer.Option(metavar="TARGET", help="compare with another network on the same images"),
    ] = None,
    against_model: Annotated[
        str, typer.Option(metavar="TEXT", help="architecture of the --against network, see --model")
    ] = "",
    against_weights: Annotated[
        str,
        typer.Option(metavar="TEXT", help="key of the --against network's weights, see --weights"),
    ] = "",
    strict: Annotated[
        bool, typer.Option("--strict", help="end with exit code 6 if a check warns")
    ] = False,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Evaluate the robust accuracy of every class, and check the evaluation.

    [bold]Examples[/]

    [cyan]absld evaluate RUN[/]                              on the test images of the run
    [cyan]absld evaluate net.pt --dataset cifar10 --eps 8/255[/]   weights from a file
    [cyan]absld evaluate mypackage.nets:small --dataset folder --data DIR[/]
    [cyan]absld evaluate RUN --attacks clean,autoattack --examples 1000[/]
    [cyan]absld evaluate RUN --against OTHER[/]              difference of two networks
    [cyan]absld evaluate RUN --dataset cifar10-c --data DIR[/]   corrupted images

    An image counts as robust if the network classifies it correctly under
    every attack. The same command continues after an interruption, and shows a
    finished evaluation again. `absld report` makes a page of it.
    """
    config = resolve_evaluation(explicit(settings))
    check_evaluation(target, config, strict=strict)

    from absld.cli.evaluation_view import EvaluationView, evaluation_lines
    from absld.evaluation import corruptions, runner
    from absld.tracking.start import tracked

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with (
            EvaluationView(output) as view,
            tracked(config.track, Path(target).parent, view) as observer,
        ):
            if against is None and config.dataset in CORRUPTED:
                result = corruptions.run_corruptions(target, config, observer)
            elif against is None:
                result = runner.run_evaluation(target, config, observer)
            else:
                base = {"model": against_model, "weights": against_weights}
                result = runner.run_paired_evaluation(target, against, base, config, observer)
        output.present(result.results, evaluation_lines(result))
    if strict and result.warnings:
        raise UnreliableError(
            f"{len(result.warnings)} checks warn: {'; '.join(result.warnings)}",
            f"{page_of('gradient-masking')} explains each check",
        )


def check_evaluation(target: str, config: EvaluationConfig, *, strict: bool) -> None:
    """Raise UsageError for settings that do not go together."""
    if strict and not config.checks:
        raise UsageError("--strict needs the checks, which are left out", "--checks")
    if config.track and not (Path(target) / "config.toml").exists():
        raise UsageError(
            f"--track adds an evaluation to the training that it is of, and {target} is not a run",
            "leave out --track, or evaluate a run directory",
        )
    if config.track and config.dataset in CORRUPTED:
        raise UsageError("evaluations on corrupted images are not tracked", "leave out --track")


app.command(cls=Command)(compare)
app.command(cls=SweepCommand)(sweep)
app.command(cls=Command)(export)


# --- absld report, push, recipe, bench, teacher ---


@app.command(cls=Command)
def report(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="a run directory or an evaluation.json")
    ],
    *,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="file to write: .html, .png or .pdf")
    ] = None,
) -> None:
    """Write an evaluation as an HTML page or a figure.

    [bold]Examples[/]

    [cyan]absld report RUN[/]                             report.html beside the evaluation
    [cyan]absld report evaluation.json --out card.pdf[/]  a figure
    """
    from absld.report.html import write_report

    say(str(write_report(source, out)), sys.stdout)


app.command(cls=Command)(push)


app.command(cls=Command)(bench)
app.add_typer(recipe_app, name="recipe")
app.add_typer(teacher_app, name="teacher")


# --- Errors and exit codes ---

# Errors of a path, not of the disk behind it.
PATH_ERRORS = ("ENAMETOOLONG", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ELOOP")


def main() -> None:
    """Run a command. An error is two lines on stderr; each kind has its exit code."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with standard_streams():
        try:
            sys.exit(app(arguments, prog_name="absld", standalone_mode=False))
        except (Exception, KeyboardInterrupt) as error:
            sys.exit(say_error(error))


def say_error(error: BaseException) -> int:
    """Print an error in two lines, or that a signal interrupted; return the exit code."""
    if (exit_code := signal_exit_code(error)) is not None:
        say_aside("Interrupted.")
        return exit_code
    if "--debug" in sys.argv:
        for line in traceback.format_exc().splitlines():
            say_aside(line)
    code, cause, hint = explain(error)
    if cause:  # without a command there is help, and nothing more to say
        say_aside(f"error: {cause}")
        say_aside(hint)
    return code


def explain(error: BaseException) -> tuple[int, str, str]:
    """Return the exit code, the cause and a hint."""
    if isinstance(error, typer.TyperException):
        return error.exit_code, " ".join(error.format_message().split()), "--help lists the flags"
    cause = in_words(error) or type(error).__name__
    if isinstance(error, AbsldError):
        return error.exit_code, cause, error.hint
    if "out of memory" in cause.lower() or "can't allocate memory" in cause.lower():
        return 1, cause, "a smaller --batch-size needs less; what was saved before is kept"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in PATH_ERRORS:
        return 2, clip(cause, 200), "check this path"
    if isinstance(error, OSError):
        return 1, cause, "check free space and permissions of --out; saved checkpoints are kept"
    return (
        1,
        f"{type(error).__name__}: {cause}",
        "internal error, please report it; --debug prints the traceback",
    )
