"""trackio: a local database beside the runs, or the Space or server of its variables."""

import contextlib
import io
import os
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absld.storage.opening import make_folder
from absld.tracking.tracker import TrackedRun
from absld.tracking.values import Values

WAIT = 20  # seconds for a server to answer at the start


class Trackio:
    """A Store in trackio."""

    def start(self, out: Path) -> str:
        folder = os.environ.setdefault("TRACKIO_DIR", str((out / "trackio").resolve()))
        make_folder(Path(folder))
        import trackio

        self.trackio: Any = trackio
        self.project = os.environ.get("TRACKIO_PROJECT", "absld")
        if space := os.environ.get("TRACKIO_SPACE_ID"):
            import huggingface_hub

            huggingface_hub.whoami()  # which fails without network or token
            return f"Space {space}"
        if server := os.environ.get("TRACKIO_SERVER_URL"):
            urllib.request.urlopen(server, timeout=WAIT).close()
            return server.partition("?")[0]  # without the token
        return f"TRACKIO_DIR={folder} trackio show --project {self.project}"

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        with contextlib.redirect_stdout(io.StringIO()), local_hub():
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

    def attach(self, evaluation: Path, step: int) -> None:
        from absld.report.html import write_report

        self.run.log_artifact(write_report(str(evaluation)), type="report")

    def close(self, completed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.trackio.finish()


@contextlib.contextmanager
def local_hub() -> Iterator[None]:
    """Keep trackio from asking the Hugging Face Hub for the user's name, unless it writes there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not os.environ.get("TRACKIO_SPACE_ID")
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
