"""Weights & Biases: offline in the folder of the runs, unless WANDB_MODE says otherwise."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absld.errors import UsageError
from absld.storage.files import write_text
from absld.storage.opening import make_folder, read_bytes
from absld.tracking.tracker import TrackedRun
from absld.tracking.values import Values

WAIT = 20  # seconds for its server to answer at the start


class Wandb:
    """A Store in Weights & Biases."""

    def start(self, out: Path) -> str:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb: Any = wandb
        self.mode = os.environ.get("WANDB_MODE", "offline")
        self.folder = Path(os.environ.get("WANDB_DIR") or out)
        make_folder(self.folder)
        if self.mode != "online":
            return f"{self.mode}, wandb sync {self.folder}/wandb/offline-run-*"
        try:
            self.wandb.Api(timeout=WAIT)  # which checks the key
        except self.wandb.errors.UsageError as error:
            raise UsageError(
                f"--track wandb: {error}", "wandb login, or unset WANDB_MODE to write locally"
            ) from error
        return os.environ.get("WANDB_BASE_URL", "online")

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        key = re.sub(r"[^\w-]", "_", run.key, flags=re.ASCII)[-128:]
        self.epochs = self.folder / "wandb" / f"{key}.epochs"
        self.run: Any = self.wandb.init(
            project=os.environ.get("WANDB_PROJECT", "absld"),
            id=key,
            name=os.environ.get("WANDB_NAME", run.name),
            dir=self.folder,
            mode=self.mode,
            config=dict(run.settings),
            resume="allow",
            reinit="create_new",
            settings=self.wandb.Settings(
                console="off",
                disable_code=True,
                disable_git=True,
                silent=True,
                x_disable_machine_info=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
        if self.run.resumed:
            return {name: v for name, v in self.run.summary.items() if isinstance(v, (int, float))}
        # An offline run cannot be read, so the number of its epochs is in a file beside it.
        return {"epoch": float(read_bytes(self.epochs))} if self.epochs.exists() else {}

    def log(self, values: Values, step: int) -> None:
        if "epoch" in values:
            self.run.log(values, step=step)
            write_text(self.epochs, str(step))
        else:  # of the whole run, not of an epoch
            self.run.summary.update(values)

    def attach(self, evaluation: Path, step: int) -> None:
        from absld.report.html import write_report

        page = read_bytes(write_report(str(evaluation))).decode()
        after = max(step + 1, self.run.step)  # a step that is over takes no more
        self.run.log({"report": self.wandb.Html(page, inject=False)}, step=after)

    def close(self, completed: bool) -> None:
        self.run.finish(exit_code=0 if completed else 1)
