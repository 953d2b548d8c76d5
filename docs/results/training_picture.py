"""Write docs/assets/train.svg: the view of `absld train` in the middle of a run.

    python docs/results/training_picture.py

It trains a teacher and a student on the digits with the default settings, until the picture is taken.
The picture loads nothing: links to a font, which rich puts in, are taken out.
"""

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console, RenderableType
from rich.text import Text

from absld.cli.output import Output
from absld.cli.signals import StopRequest
from absld.cli.training_view import TrainingView
from absld.config.resolve import resolve
from absld.progress import StepReport
from absld.runs.training_run import train

PICTURE = Path(__file__).parents[1] / "assets" / "train.svg"
EPOCH, LINES = 14, 15  # when the picture is taken; lines above the live region
WIDTH = 84  # columns


class PictureTakenError(Exception):
    """Ends the training."""


class PictureView(TrainingView):
    """A view that keeps lines and live region, and writes them as a picture."""

    def __init__(self, output: Output) -> None:
        super().__init__(output)
        self.lines: list[str] = []
        self.region: tuple[RenderableType, ...] = ()

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show(self, *rows: RenderableType) -> None:
        self.region = rows

    def step(self, report: StepReport) -> None:
        super().step(report)
        half_way = report.phase == "training" and 2 * report.done > report.total
        if self.role == "student" and report.epoch == EPOCH and half_way:
            self.take()
            raise PictureTakenError

    def take(self) -> None:
        console = Console(width=WIDTH, record=True, file=io.StringIO())
        for text in ["$ absld train", *self.lines[-LINES:]]:
            console.print(Text(text))
        for row in self.region:
            console.print(row)
        svg = console.export_svg(title="absld train")
        PICTURE.write_text(re.sub(r"@font-face \{.*?\}\s*|<!--.*?-->\s*", "", svg, flags=re.DOTALL))


if __name__ == "__main__":
    with StopRequest() as stop, tempfile.TemporaryDirectory() as out:
        try:
            train(resolve({"out": out}), PictureView(Output(sys.stdout, stop, as_json=False)))
        except PictureTakenError:
            print(PICTURE)
