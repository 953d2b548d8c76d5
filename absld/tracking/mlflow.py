"""MLflow: a local database beside the runs, or the server at MLFLOW_TRACKING_URI."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from absld.errors import UsageError
from absld.storage.opening import make_folder
from absld.tracking.tracker import TrackedRun
from absld.tracking.values import Values

KEY = "absld.key"  # the tag by which a run is found again
MOST_METRICS, MOST_PARAMETERS, MOST_LETTERS = 1000, 100, 6000  # in a request; of a value


class MLflow:
    """A Store in MLflow. Only its client is used: what a program tracks itself is left alone."""

    def start(self, out: Path) -> str:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        # A server that is down delays an epoch by seconds; it is tried again after the next one.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self.entities = entities
        if address := os.environ.get("MLFLOW_TRACKING_URI"):
            self.reach(MlflowClient(tracking_uri=address))
            return address
        folder = (out / "mlflow").resolve()
        if {"%", "?"} & {*str(folder)}:  # in the address of a database they mean something else
            raise UsageError(
                f"--track mlflow: % or ? in {folder}", "another --out, or MLFLOW_TRACKING_URI"
            )
        make_folder(folder)
        address = f"sqlite:///{folder}/mlflow.db"
        with FileLock(folder / ".lock"):  # another process may make the same database
            self.reach(MlflowClient(tracking_uri=address), (folder / "artifacts").as_uri())
        return f"mlflow ui --backend-store-uri {address}"

    def reach(self, client: Any, artifacts: str | None = None) -> None:
        """Find the experiment, or make it. artifacts: where its files are; None: the server knows."""
        self.client, name = client, os.environ.get("MLFLOW_EXPERIMENT_NAME", "absld")
        found = client.get_experiment_by_name(name)
        self.experiment = (
            found.experiment_id if found else client.create_experiment(name, artifacts)
        )

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        found = self.client.search_runs([self.experiment], f"tags.`{KEY}` = '{run.key}'")
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return dict(found[0].data.metrics)
        made = self.client.create_run(self.experiment, run_name=run.name, tags={KEY: run.key})
        self.id = made.info.run_id
        settings = [
            self.entities.Param(name, str(value)[:MOST_LETTERS])
            for name, value in run.settings.items()
        ]
        for first in range(0, len(settings), MOST_PARAMETERS):
            self.client.log_batch(self.id, params=settings[first : first + MOST_PARAMETERS])
        return {}

    def log(self, values: Values, step: int) -> None:
        now = round(1000 * time.time())
        metrics = [self.entities.Metric(k, v, now, step) for k, v in values.items()]
        for first in range(0, len(metrics), MOST_METRICS):
            self.client.log_batch(self.id, metrics=metrics[first : first + MOST_METRICS])

    def attach(self, evaluation: Path, step: int) -> None:
        from absld.report.html import write_report

        folder = f"evaluations/{evaluation.parent.name}"
        for path in (write_report(str(evaluation)), evaluation):
            self.client.log_artifact(self.id, str(path), folder)

    def close(self, completed: bool) -> None:
        self.client.set_terminated(self.id, "FINISHED" if completed else "KILLED")
