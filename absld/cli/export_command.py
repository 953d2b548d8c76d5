"""`absld export`: a network in a file for another program."""

from typing import Annotated, Any

import typer

from absld.cli.options import AsJson, explicit, with_settings
from absld.cli.output import SAME_COMMAND, command_output
from absld.config.evaluation_settings import ExportConfig
from absld.config.parsing import parse_all


@with_settings(
    ExportConfig,
    without=("attacks", "restarts", "each", "precision", "checks", "save_adversarial", "track"),
    meanings={"batch_size": "images per batch"},
)
def export(
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="a run directory, a file or package.module:factory"),
    ],
    *,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Write a network to a file for another program, and compare the two.

    [bold]Examples[/]

    [cyan]absld export RUN[/]                                ONNX, in RUN/exports
    [cyan]absld export RUN --format safetensors --out net.safetensors[/]
    [cyan]absld export net.pt --dataset cifar10 --format torch-export[/]

    The network in the file takes pixels in [0,1], any number of images. It is
    read back and must predict what the original does, on test images and on
    adversarial images, which are stored beside it. FILE.parity.json tells how
    near it is. The exit code is 4, and no network is written, if predictions differ.
    """
    config = ExportConfig(**parse_all(explicit(settings), ExportConfig))

    from absld.cli.evaluation_view import EvaluationView
    from absld.cli.export_view import export_lines
    from absld.runs.exporting import export_network

    with command_output(as_json, continue_with=SAME_COMMAND) as output:
        with EvaluationView(output) as view:
            results = export_network(target, config, view)
        output.present(results, export_lines(results))
