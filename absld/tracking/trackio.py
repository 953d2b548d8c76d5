"""trackio: a local database beside the runs, or the Space or server of its variables."""

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absld.storage.opening import make_folder
from absld.tracking.tracker import TrackedRun
from absld.tracking.values import Values

ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio:
    """A Store in trackio."""

    def start(self, out: Path) -> str:
        folder = os.environ.setdefault("TRACKIO_DIR", str((out / "trackio").resolve()))
        make_folder(Path(folder))
        import trackio

        self.trackio: Any = trackio
        self.project = os.environ.get("TRACKIO_PROJECT", "absld")
        self.address = next((os.environ[name] for name in ELSEWHERE if os.environ.get(name)), "")
        return self.address or f"TRACKIO_DIR={folder} trackio show --project {self.project}"

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        with contextlib.redirect_stdout(io.StringIO()):
            self.run: Any = self.trackio.init(
                self.project,
                name=run.key,
                config=dict(run.settings),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        return {"epoch": self.run._next_step - 1}

    def log(self, values: Values, step: int) -> None:
        self.run.log(dict(values), step=step)

    def attach(self, evaluation: Path) -> None:
        from absld.report.html import write_report

        self.run.log_artifact(write_report(str(evaluation)), type="report")

    def close(self, completed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()
