"""`absld bench`."""

from typing import Annotated

import typer

from absld.cli.options import AsJson
from absld.cli.output import command_output


def bench(
    *,
    student: Annotated[str, typer.Option(metavar="NAME", help="student network")] = "resnet18",
    teacher_model: Annotated[
        str, typer.Option(metavar="NAME", help="teacher network")
    ] = "wrn-34-10",
    batch_size: Annotated[int, typer.Option(metavar="N", min=2, help="images per step")] = 128,
    image_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="side of the images in pixels")
    ] = 32,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="measured steps of each technique")
    ] = 5,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile/--no-compile",
            show_default=False,
            help=r"try torch.compile \[default: on; --no-compile switches it off]",
        ),
    ] = True,
    device: Annotated[
        str, typer.Option(metavar="TEXT", help="torch device; auto: cuda if there is one, else cpu")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the speed of a training step, and the gain of each technique.

    [bold]Examples[/]

    [cyan]absld bench[/]                the networks of the paper; slow on a CPU
    [cyan]absld bench --student mobilenetv2 --batch-size 16[/]   minutes on a CPU

    Steps of absld_min.py and of the package take turns. Techniques are added
    one by one, and kept if they are faster. The output names the flags of
    `absld train` that make a step faster on this machine.
    """
    from absld.bench.bench import Bench
    from absld.bench.contenders import BenchConfig
    from absld.cli.bench_view import BenchView

    config = BenchConfig(
        student=student,
        teacher_model=teacher_model,
        batch_size=batch_size,
        image_size=image_size,
        rounds=rounds,
        compile=compile,
        device=device,
    )
    with command_output(as_json) as output:
        with BenchView(output) as view:
            results = view.measure(Bench(config))
        output.present(results, [])
