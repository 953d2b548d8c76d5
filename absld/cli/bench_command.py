"""`absld bench`."""

from typing import Annotated

import typer

from absld.cli.options import AsJson
from absld.cli.output import command_output

BATCH_SIZE = r"images per step \[default: 128 on CUDA, 16 elsewhere]"


def bench(
    *,
    student: Annotated[str, typer.Option(metavar="NAME", help="student network")] = "resnet18",
    teacher_model: Annotated[
        str, typer.Option(metavar="NAME", help="teacher network")
    ] = "wrn-34-10",
    batch_size: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, max=2**16, help=BATCH_SIZE),
    ] = None,
    image_size: Annotated[
        int, typer.Option(metavar="N", min=1, max=4096, help="side of the images in pixels")
    ] = 32,
    rounds: Annotated[
        int,
        typer.Option(metavar="N", min=1, max=10**6, help="measure at most N steps for each row"),
    ] = 5,
    minutes: Annotated[
        float,
        typer.Option(metavar="N", min=0, max=10**6, help="stop measuring after N minutes"),
    ] = 10,
    device: Annotated[
        str, typer.Option(metavar="TEXT", help="torch device; auto: cuda if there is one, else cpu")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the speed of a training step by each engine, and of each technique.

    [bold]Examples[/]

    [cyan]absld bench[/]                       the networks of the paper
    [cyan]absld bench --student mobilenetv2[/]

    Measures the step of absld_min.py, the engines auto, plain and fast, and
    techniques added to auto one by one, kept if they are faster. Steps that
    are compared run alternately. Techniques that the device lacks are listed
    as left out. The last line is the fastest command.
    """
    from absld.bench.contenders import BenchConfig
    from absld.cli.bench_view import BenchView
    from absld.engine.precision import resolve_device

    config = BenchConfig(
        student=student,
        teacher_model=teacher_model,
        batch_size=batch_size or (128 if resolve_device(device).type == "cuda" else 16),
        image_size=image_size,
        rounds=rounds,
        minutes=minutes,
        device=device,
    )
    with command_output(as_json) as output:
        with BenchView(output) as view:
            results = view.measure(config)
        output.present(results, [])
