"""The command line. Heavy imports are inside the commands, so that help answers at once."""

import contextlib
import json
import os
import signal
import sys
import traceback
from dataclasses import asdict, fields
from typing import Annotated, Any

import typer

from absld.cli.options import given, seed_list, shown, with_settings
from absld.cli.signals import Stop, exit_code_of_a_signal
from absld.config.files import from_toml
from absld.config.parsing import parse
from absld.config.recipes import METHOD_RECIPES, RECIPES
from absld.config.resolve import resolve, source
from absld.config.settings import Config, EvaluationConfig, group
from absld.errors import (
    AbsldError,
    CheckpointError,
    UnreliableError,
    UsageError,
)

app = typer.Typer(
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")
teacher_app = typer.Typer(no_args_is_help=True)
app.add_typer(teacher_app, name="teacher")


@app.callback()
def about() -> None:
    """Small, robust image classifiers without weak classes.

    [bold]Examples[/]

    [cyan]absld train[/]   8x8 digits on a CPU, from nothing to the table, in a minute

    [cyan]absld train --dataset cifar10[/]   the paper's setting

    [cyan]absld train --method rslad[/]   the same with all temperatures 1

    [cyan]absld train --resume[/]   go on with a run that was interrupted

    [cyan]absld evaluate RUN[/]   how robust is every class, and can the figure be trusted?

    [cyan]absld report RUN[/]   the result as a page to show

    [cyan]absld compare --methods rslad,absld --seeds 5[/]   methods beside each other

    [cyan]absld teacher check FILE --dataset cifar10[/]   is this network fit to teach?

    [cyan]absld recipe show cifar10[/]   every setting with its source
    """


@recipe_app.callback()
def about_recipes() -> None:
    """The settings of a data set and a method, with their sources.

    [bold]Example[/]

    [cyan]absld recipe show digits[/]
    """


@recipe_app.command("show")
def show(
    name: Annotated[str, typer.Argument(help=", ".join(RECIPES))],
    *,
    method: Annotated[str, typer.Option(metavar="TEXT", help=", ".join(METHOD_RECIPES))] = "absld",
) -> None:
    """Every setting for a data set and a method, with its source.

    [bold]Examples[/]

    [cyan]absld recipe show digits[/]

    [cyan]absld recipe show cifar10 --method ard[/]
    """
    if name not in RECIPES:
        raise UsageError(f"there is no recipe {name!r}", f"there are: {', '.join(RECIPES)}")
    config = resolve({"dataset": name, "method": method})
    typer.echo(f"{'setting':20} {'value':20} {'source':24} meaning")
    for heading in dict.fromkeys(group(f) for f in fields(Config)):
        typer.echo(f"# {heading}")
        for f in fields(Config):
            if group(f) == heading:
                value, origin = shown(getattr(config, f.name)), source(config, f.name)
                typer.echo(f"{f.name:20} {value:20} {origin:24} {f.metadata['meaning']}")


# --- Settings as options ---


# --- Commands ---

AsJson = Annotated[
    bool, typer.Option("--json", help="one JSON document on stdout, the progress on stderr")
]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]


@app.command()
@with_settings(Config)
def train(
    *,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="settings, as lines name = value")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Train a student whose classes are about equally robust, and test it.

    [bold]Examples[/]

    [cyan]absld train[/]   8x8 digits on a CPU, from nothing to the table, in a minute

    [cyan]absld train --dataset cifar10 --teacher FILE[/]   the paper's setting, your teacher

    [cyan]absld train --dataset folder --data DIR[/]   your images: DIR/{train,test}/CLASS/*

    [cyan]absld train --student mine.nets:small[/]   your network: a function in mine/nets.py

    [cyan]absld train --recipe my.toml --seed 1 --resume[/]   go on after an interruption

    Each run has a directory of its own in --out: its settings, environment and metrics, and the
    checkpoints best.pt and last.pt. A teacher made on the way is kept there and used again.
    """
    config = resolve((from_toml(recipe) if recipe else {}) | given(settings))

    import absld.runs.training_run
    from absld.cli.training_view import view_of
    from absld.engine.distributed import launched

    with contextlib.ExitStack() as stack:
        ranks = stack.enter_context(launched(config.device))
        stream = sys.stderr if as_json else sys.stdout
        if not ranks.first:
            stream = stack.enter_context(open(os.devnull, "w"))
        stop = stack.enter_context(Stop(patient=ranks.count > 1))
        view = stack.enter_context(view_of(stream, stop))
        result = absld.runs.training_run.train(config, view, resume=resume, ranks=ranks)
    if not ranks.first:
        return
    if as_json:
        typer.echo(json.dumps(result.document() | {"config": asdict(config)}, indent=1))
    else:
        view.result(result)


@app.command()
@with_settings(EvaluationConfig)
def evaluate(
    target: Annotated[str, typer.Argument(help="a run, a file, or package.module:factory")],
    *,
    against: Annotated[
        str | None, typer.Option(metavar="TARGET", help="another network, on the same images")
    ] = None,
    against_model: Annotated[
        str, typer.Option(metavar="TEXT", help="as --model, of that network")
    ] = "",
    strict: Annotated[bool, typer.Option("--strict", help="exit 6 if a check warns")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """How robust is every class of a classifier, and can the figure be trusted?

    [bold]Examples[/]

    [cyan]absld evaluate runs/digits-absld-seed0-1a2b3c4d[/]   a run, on its own test images

    [cyan]absld evaluate net.pt --dataset cifar10 --eps 8/255[/]   anybody's ResNet-18

    [cyan]absld evaluate mine.nets:small --dataset folder --data DIR[/]   any network

    [cyan]absld evaluate RUN --attacks clean,autoattack --examples 1000[/]   the strongest, on some

    [cyan]absld evaluate RUN --against OTHER[/]   the difference, and how sure it is

    An image counts as robust if it withstands all attacks. The same command goes on after an
    interruption, and shows a finished result again. `absld report` makes a page of it.
    """
    if strict and settings.get("checks") is False:
        raise UsageError("--strict has nothing to judge with --no-checks", "leave out one of them")
    typed = {name: parse(name, v, EvaluationConfig) for name, v in given(settings).items()}
    config = EvaluationConfig(**typed)

    from absld.cli.evaluation_view import EvaluationView
    from absld.evaluation import results as document
    from absld.evaluation import runner as assessment

    stream = sys.stderr if as_json else sys.stdout
    # What networks of others print is no part of the document.
    with Stop(), EvaluationView(stream) as view, contextlib.redirect_stdout(stream):
        if against is None:
            result = assessment.assess(target, config, view)
        else:
            result = assessment.assess_against(target, against, against_model, config, view)
    if as_json:
        typer.echo(document.to_json(result.document), nl=False)
    else:
        view.result(result)
    if strict and result.warnings:
        raise UnreliableError(
            f"{len(result.warnings)} checks warn: {'; '.join(result.warnings)}",
            "docs/evaluation.md says what each means",
        )


@app.command()
@with_settings(Config, without=("method", "seed"))
def compare(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN", help="finished runs")] = None,
    *,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help=f"of {', '.join(METHOD_RECIPES)}, package.module:Class, and recipe files",
        ),
    ] = "",
    seeds: Annotated[
        str, typer.Option(metavar="N", help="so many, from 0 on; or numbers with commas")
    ] = "",
    baseline: Annotated[
        str, typer.Option(metavar="NAME", help="what the others are compared with; the first")
    ] = "",
    attacks: Annotated[
        str, typer.Option(metavar="NAMES", help="as of absld evaluate")
    ] = EvaluationConfig.attacks,
    examples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="so many test images only")
    ] = None,
    checks: Annotated[bool, typer.Option(help="as of absld evaluate")] = True,
    recipe: Annotated[
        str | None, typer.Option(metavar="FILE.toml", help="settings of all, name = value")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """Methods beside each other: same images, same teachers, same schedule, several seeds.

    [bold]Examples[/]

    [cyan]absld compare --methods rslad,absld --seeds 5[/]   on the digits

    [cyan]absld compare --methods absld,mine.methods:Mart,warm.toml[/]   a method of your own

    [cyan]absld compare RUN RUN RUN[/]   runs that are there

    Mean and standard deviation over the seeds, differences to the first method with intervals, and
    a plot. Runs that are there are used again; the same command goes on after an interruption.
    """
    named = given(settings)
    evaluation = EvaluationConfig(
        attacks=attacks, examples=examples, checks=checks, device=named.get("device", "auto")
    )
    if bool(runs) == bool(methods):
        raise UsageError("what is to be compared?", "--methods NAMES, or runs, and not both")
    told = {**named, **given({"seeds": seeds or None, "recipe": recipe})}
    if runs and (extra := sorted(told.keys() - {"out", "device"})):
        raise UsageError(
            f"runs are what they are: {', '.join(extra)} cannot be set", "leave it out"
        )

    from absld.cli.comparison_view import ComparisonView
    from absld.evaluation import results as document
    from absld.runs import comparison

    stream = sys.stderr if as_json else sys.stdout
    with Stop() as stop, ComparisonView(stream, stop) as view, contextlib.redirect_stdout(stream):
        if runs:
            out = named.get("out", "")
            result = comparison.compare_runs(runs, evaluation, baseline, out, view)
        else:
            of_all = (from_toml(recipe) if recipe else {}) | named
            names = [name.strip() for name in methods.split(",") if name.strip()]
            result = comparison.compare_methods(
                names, seed_list(seeds), of_all, evaluation, baseline, view
            )
    if as_json:
        typer.echo(document.to_json(result.document), nl=False)
    else:
        view.result(result)


@teacher_app.callback()
def about_teachers() -> None:
    """Teachers: is this network fit to be one?

    [bold]Example[/]

    [cyan]absld teacher check FILE --dataset cifar10[/]
    """


@teacher_app.command()
@with_settings(EvaluationConfig, without=("attacks", "split", "restarts", "each", "checks", "out"))
def check(
    target: Annotated[str, typer.Argument(help="a file, a run, or package.module:factory")],
    *,
    as_json: AsJson = False,
    debug: Debug = False,
    **settings: Any,
) -> None:
    """What is this network, how robust is each class, what are its soft labels like?

    [bold]Examples[/]

    [cyan]absld teacher check trades.pt --dataset cifar10[/]   a file of weights from anywhere

    [cyan]absld teacher check trades.pt --dataset cifar10 --examples 200[/]   a quick look

    On validation images, held out of the training images. Exit code 4 if it is unfit.
    """
    typed = {name: parse(name, v, EvaluationConfig) for name, v in given(settings).items()}
    config = EvaluationConfig(**typed, split="validation")

    from absld.cli.evaluation_view import EvaluationView
    from absld.cli.teacher_view import teacher_lines
    from absld.evaluation import results as document
    from absld.evaluation.teacher_check import inspect_teacher

    stream = sys.stderr if as_json else sys.stdout
    with Stop(), EvaluationView(stream, goes_on=False) as view, contextlib.redirect_stdout(stream):
        found = inspect_teacher(target, config, view)
    if as_json:
        typer.echo(document.to_json(found), nl=False)
    else:
        typer.echo("\n".join(teacher_lines(found)))
    if found["verdict"] == "unfit":
        raise CheckpointError(
            f"{target}: {'; '.join(found['reasons'])}", "needed: a better teacher"
        )


OF_A_BANK = [
    *("dataset", "data", "image_size", "padding", "flip", "teacher", "teacher_model"),
    *("bank_gib", "precision", "teacher_precision", "channels_last"),
    *("batch_size", "device", "out"),
]


@teacher_app.command()
@with_settings(Config, without=[f.name for f in fields(Config) if f.name not in OF_A_BANK])
def bank(*, debug: Debug = False, **settings: Any) -> None:
    """Ask a teacher once for every view of the training images, ahead of all runs with it.

    [bold]Example[/]

    [cyan]absld teacher bank --dataset cifar10 --teacher trades.pt[/]   162 views of each image

    A run fills what it needs of the bank by itself; this fills all of it. It may be stopped: what
    is remembered is not asked for again.
    """
    config = resolve(given(settings))

    import time

    from absld.cli.training_view import time_text
    from absld.runs.training_run import fill_bank

    with Stop():
        started = told = time.perf_counter()
        for done, total in fill_bank(config, typer.echo):
            now = time.perf_counter()
            if now - told > 10 or done == total:
                left = time_text((now - started) * (total - done) / done)
                typer.echo(f"{done:,} of {total:,} views, about {left} left")
                told = now


@app.command()
def bench(
    *,
    student: Annotated[
        str, typer.Option(metavar="NAME", help="the student's network")
    ] = "resnet18",
    teacher_model: Annotated[
        str, typer.Option(metavar="NAME", help="the teacher's network")
    ] = "wrn-34-10",
    batch_size: Annotated[int, typer.Option(metavar="N", min=2, help="images a step")] = 128,
    image_size: Annotated[int, typer.Option(metavar="N", min=1, help="their side")] = 32,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="counted steps of each")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="try torch.compile, too")
    ] = True,
    device: Annotated[
        str, typer.Option(metavar="TEXT", help="auto is cuda where there is one, else cpu")
    ] = "auto",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """How fast is a training step here, and what is each technique worth?

    [bold]Examples[/]

    [cyan]absld bench[/]   the paper's networks and batch; on a CPU that is long

    [cyan]absld bench --student mobilenetv2 --batch-size 16[/]   two cores, ten minutes

    The plain step of absld_min.py and the engine take turns; techniques are added one by one, and
    stay where they pay. The last line has the flags of absld train that pay on this machine.
    """
    from absld.bench.bench import Bench, BenchConfig
    from absld.cli.bench_view import GROWTH_HEAD, HEAD, growth_line, row_line, summary
    from absld.evaluation import results as document

    measured = Bench(
        BenchConfig(
            student=student,
            teacher_model=teacher_model,
            batch_size=batch_size,
            image_size=image_size,
            rounds=rounds,
            compile=compiled,
            device=device,
        )
    )
    stream = sys.stderr if as_json else sys.stdout
    with Stop():
        print(HEAD, file=stream, flush=True)
        for figures in measured.rows():
            print(row_line(figures), file=stream, flush=True)
        print("\n".join([*summary(measured.document), GROWTH_HEAD]), file=stream, flush=True)
        for figures in measured.growth():
            print(growth_line(figures), file=stream, flush=True)
    if as_json:
        typer.echo(document.to_json(measured.document), nl=False)


@app.command()
def report(
    source: Annotated[str, typer.Argument(help="a run, or an evaluation.json")],
    *,
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="to write: .html, .png or .pdf")
    ] = None,
    debug: Debug = False,
) -> None:
    """The result of an evaluation as a page to show, or as a picture.

    [bold]Examples[/]

    [cyan]absld report runs/digits-absld-seed0-1a2b3c4d[/]   report.html beside its evaluation

    [cyan]absld report evaluation.json --out card.pdf[/]   for a paper (needs matplotlib)
    """
    from absld.report.html import make

    typer.echo(make(source, out))


# --- Signals, errors, exit codes ---


def main() -> None:
    """Run a command; exit codes as promised, an error in two lines on stderr."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # quiet in `| head`
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # class names may be in any script
    try:
        sys.exit(app(standalone_mode=False))
    except Exception as error:
        if signalled := exit_code_of_a_signal(error):
            sys.exit(signalled)
        if "--debug" in sys.argv:
            traceback.print_exc()
        code, cause, way_out = explained(error)
        if cause:  # without a command there is help, and nothing more to say
            print(f"error: {cause}\n{way_out}", file=sys.stderr)
        sys.exit(code)
    except KeyboardInterrupt:
        sys.exit(130)


def explained(error: Exception) -> tuple[int, str, str]:
    """Exit code, cause and way out."""
    if isinstance(error, typer.TyperException):
        return error.exit_code, " ".join(error.format_message().split()), "--help lists the flags"
    cause = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, AbsldError):
        return error.exit_code, cause, error.way_out
    if "out of memory" in cause.lower() or "can't allocate memory" in cause.lower():
        return 1, cause, "a smaller --batch-size needs less; what was saved before is kept"
    if isinstance(error, OSError):
        return 1, cause, "is there room, and is --out writable? what was saved before is kept"
    return 1, f"{type(error).__name__}: {cause}", "a fault of ours; --debug shows where"
