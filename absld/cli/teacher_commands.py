"""`absld teacher`: check a teacher, train one, or compute its logits ahead of training."""

from typing import Annotated, Any

import typer

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
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe
from absld.config.parsing import parse_all
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.errors import CheckpointError, UsageError

teacher_app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    help="List published teachers, check or train one, or compute its logits ahead.",
)


@teacher_app.command("list", cls=Command)
def list_published(
    *,
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="only those of this data set")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List published robust networks that can teach, and where to get them.

    [bold]Examples[/]

    [cyan]absld teacher list[/]
    [cyan]absld teacher list --dataset cifar100 --json[/]

    What begins with hf: can be typed after --teacher. Other files are fetched by
    hand, for example with a browser.
    """
    from absld.cli.teacher_view import published_lines
    from absld.models.published import PUBLISHED

    found = [network for network in PUBLISHED if dataset in (None, network.dataset)]
    if not found:
        known = dict.fromkeys(network.dataset for network in PUBLISHED)
        raise UsageError(
            f"no published network for {dataset!r} is known",
            f"there are some for: {', '.join(known)}",
        )
    rows = [network._asdict() | {"pixels": network.pixels} for network in found]
    with command_output(as_json) as output:
        output.present({"schema": "absld-published-1", "networks": rows}, published_lines(found))


NOT_OF_A_CHECK = (
    *("attacks", "split", "restarts", "each", "checks", "out", "corruption", "severity"),
    *("save_adversarial", "track"),
)


@teacher_app.command(cls=Command)
@with_settings(EvaluationConfig, without=NOT_OF_A_CHECK)
def check(
    target: Target,
    *,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Check whether a network can teach: accuracy, robustness, soft labels.

    [bold]Examples[/]

    [cyan]absld teacher check trades.pt --dataset cifar10[/]
    [cyan]absld teacher check hf:OWNER/NAME/FILE --dataset cifar10 --examples 200[/]

    Uses validation images, held out of the training images. The exit code is 4
    if the network is unfit.
    """
    config = EvaluationConfig(**parse_all(explicit(settings), EvaluationConfig), split="validation")

    from absld.cli.evaluation_view import EvaluationView
    from absld.cli.teacher_view import teacher_lines
    from absld.evaluation.teacher_check import inspect_teacher

    with command_output(as_json) as output:
        with EvaluationView(output) as view:
            results = inspect_teacher(target, config, view)
        output.present(results, teacher_lines(results))
    if results["verdict"] == "unfit":
        raise CheckpointError(
            f"{target}: {'; '.join(results['reasons'])}", "needed: a better teacher"
        )


@teacher_app.command("train", cls=Command)
@with_settings(Config)
def train_teacher(*, recipe: RecipeFile = None, **settings: Any) -> None:
    """Train the teacher or robust start that `absld train` would train first, and nothing else.

    [bold]Example[/]

    [cyan]absld teacher train --dataset cifar10 --seed 1[/]

    Takes the settings of the run. Its student, and all others of this seed, use the
    teacher again. The same command continues after an interruption.
    """
    flags = explicit(settings)
    config = resolve((read_recipe(recipe, flags) if recipe else {}) | flags)

    from absld.cli.training_view import TrainingView
    from absld.engine.distributed import init_distributed
    from absld.runs.training_run import train_teacher_alone
    from absld.tracking.start import tracked

    with (
        init_distributed(config.device) as distributed,
        command_output(
            False,
            continue_with=SAME_COMMAND,
            world_size=distributed.world_size,
            is_main=distributed.is_main,
        ) as output,
        TrainingView(output) as view,
        tracked(config.track, config.out, view, is_main=distributed.is_main) as observer,
    ):
        view.line(train_teacher_alone(config, observer, distributed))


CACHE_SETTINGS = (
    *("dataset", "data", "image_size", "resize", "channels", "in_memory"),
    *("padding", "flip", "teacher", "teacher_model"),
    *("teacher_weights", "class_order", "image_column", "label_column"),
    *("logit_cache_gib", "engine", "precision", "teacher_precision", "channels_last", "cuda_graph"),
    *("batch_size", "device", "out"),
)
CACHE_MEANINGS = {
    "teacher": "teacher (required): a file, a run directory, hf:owner/name or package.module:factory",
    "batch_size": "number of views per forward pass",
    "logit_cache_gib": "largest size of the cache, in GiB",
    "engine": "engine of the trainings that are to use the cache",
    "cuda_graph": "run the teacher as a CUDA graph [default: on CUDA, except plain]",
    "precision": "numeric precision of those trainings [default: as the engine chooses]",
}


@teacher_app.command(cls=Command)
@with_settings(Config, only=CACHE_SETTINGS, meanings=CACHE_MEANINGS)
def cache(**settings: Any) -> None:
    """Fill the logit cache of a teacher for every view of the training images.

    [bold]Example[/]

    [cyan]absld teacher cache --dataset cifar10 --teacher trades.pt[/]

    A training run fills its part of the cache by itself; this command fills all
    of it, ahead of all runs with this teacher. The same command continues after
    an interruption.
    """
    config = resolve(explicit(settings))

    import time

    from absld.cli.view import View, time_left
    from absld.runs.logit_caches import fill_logit_cache

    with command_output(False, continue_with=SAME_COMMAND) as output, View(output) as view:
        started = time.perf_counter()
        for done, total in fill_logit_cache(config, view):
            left = time_left(time.perf_counter() - started, done, total)
            view.progress(f"{done:,} of {total:,} views", done, total, left, end=done == total)
