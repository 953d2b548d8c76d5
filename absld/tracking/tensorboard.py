"""TensorBoard: an event file in the run directory, which `tensorboard --logdir runs` shows."""

import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absld.storage.opening import make_folder, read_bytes
from absld.tracking.tracker import TrackedRun
from absld.tracking.values import Values

# Figures of which the page HPARAMS has a column.
HEADLINES = [f"validation/{name}" for name in ("clean_average", "robust_average", "robust_worst")]
# Groups that have a chart with a line for each class.
GROUPS = ("validation_clean", "validation_robust", "temperature_adv", "temperature_nat",
          "class_risk_adv", "class_risk_nat")  # fmt: skip


class TensorBoard:
    """A Store of event files."""

    def start(self, out: Path) -> str:
        from torch.utils import tensorboard

        self.writer_class, self.out = tensorboard.SummaryWriter, out
        return f"tensorboard --logdir {out}"

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        folder = run.folder or self.out / run.name
        make_folder(folder)
        known = latest_values(str(folder))
        self.writer: Any = self.writer_class(str(folder))
        if not known:
            self.describe(run)
        return known

    def describe(self, run: TrackedRun) -> None:
        """Write the settings, and which charts have several lines."""
        from torch.utils.tensorboard.summary import hparams

        rows = [f"| {k} | {re.sub('[|`]', '_', str(v))} |" for k, v in run.settings.items()]
        self.writer.add_text("settings", "\n".join(["| setting | value |", "|---|---|", *rows]))
        for summary in hparams(dict(run.settings), dict.fromkeys(HEADLINES)):  # type: ignore[no-untyped-call]
            self.writer.file_writer.add_summary(summary)
        charts = {group: ["Multiline", [f"^{group}/"]] for group in GROUPS}
        self.writer.add_custom_scalars({"classes": charts})

    def log(self, values: Values, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def attach(self, evaluation: Path, step: int) -> None:
        """Add the report as a picture: TensorBoard shows no pages."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        from absld.report.html import write_report

        picture = write_report(str(evaluation), str(evaluation.with_name("report.png")))
        content = read_bytes(picture)
        width, height = struct.unpack(">II", content[16:24])  # of the header of a PNG
        image = Summary.Image(
            encoded_image_string=content, width=width, height=height, colorspace=4
        )
        value = Summary.Value(tag="report", image=image)
        self.writer.file_writer.add_summary(Summary(value=[value]), step)
        self.writer.flush()

    def close(self, completed: bool) -> None:
        self.writer.close()


def latest_values(folder: str) -> dict[str, float]:
    """Return the last value of each name in the event files of a folder."""
    from tensorboard.backend.event_processing import event_accumulator

    events = event_accumulator.EventAccumulator(folder, {event_accumulator.SCALARS: 1})
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}
