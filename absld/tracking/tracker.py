"""Tracking: an observer that sends what is reported to a tracker's store, whatever happens there.

A training's tracked run has a key that follows from its run directory, so that a later command
continues it. The store is asked which epochs it has, and gets those that it lacks: a run that is
resumed has no epoch twice, and what could not be sent is sent later.
"""

import math
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from absld.config.files import read_run_config
from absld.errors import in_words
from absld.metrics import ClassAccuracies
from absld.progress import EpochReport, Observer, TrainingStart
from absld.storage.environment import read_sessions
from absld.storage.files import key_of
from absld.storage.run_directory import RunDirectory
from absld.text import clip
from absld.tracking.values import (
    Values,
    epoch_values,
    evaluation_values,
    setting_values,
    values_on_test,
)

TOLD = 200  # columns of a library's message


@dataclass(frozen=True)
class TrackedRun:
    """A training as a tracker has it.

    name: shown to people. key: unlike that of any other training. folder: the run directory, or
    None.
    """

    name: str
    key: str
    folder: Path | None
    settings: Mapping[str, str | float | bool]
    classes: tuple[str, ...]


class Entry(NamedTuple):
    """Values at an epoch, and the JSON of the evaluation that they are of, if they are of one."""

    values: Values
    step: int
    evaluation: Path | None = None


class Store(Protocol):
    """A tracker's store. Its methods may raise anything."""

    def start(self, out: Path) -> str:
        """Import the library and reach the store; return where it writes.

        out: the folder of the runs, where a store without an address of its own writes.
        """

    def begin(self, run: TrackedRun) -> Mapping[str, float]:
        """Continue a run, or begin it; return the latest values that the store has of it."""

    def log(self, values: Values, step: int) -> None:
        """Store values at an epoch; they are safe when this returns, where the library allows."""

    def attach(self, evaluation: Path, step: int) -> None:
        """Store the report of an evaluation, of which this is the JSON, at the last epoch."""

    def close(self, completed: bool) -> None:
        """Close the run."""


class Tracker(Observer):
    """An observer that keeps a store up to date, and never raises.

    What could not be stored is tried again with the next epoch, and a line says so once.
    """

    def __init__(self, name: str, store: Store, warn: Callable[[str], None]) -> None:
        self.name, self.store, self.warn_user = name, store, warn
        self.run: TrackedRun | None = None
        self.epochs = 0  # of the run
        self.known: dict[str, float] | None = None  # latest values in the store; None: not open
        self.pending: deque[Entry] = deque()
        self.has_warned = False

    def begin_training(self, start: TrainingStart) -> None:
        self.close(completed=True)
        with self.forgiving():
            self.begin(describe_run(start), start.run.records() if start.run else [])

    def epoch(self, report: EpochReport) -> None:
        if self.run:
            self.add(epoch_values(report.record(), self.run.classes), report.epoch)

    def test(self, accuracies: ClassAccuracies) -> None:
        if self.run:
            self.add(values_on_test(accuracies, self.run.classes), self.epochs)

    def end_evaluation(self, path: Path, results: Mapping[str, Any]) -> None:
        folder = Path(results["network"]["target"])
        if not (folder / "config.toml").exists():
            return  # only runs are tracked
        if self.run is None or self.run.folder != folder:
            self.close(completed=True)
            with self.forgiving():
                classes = tuple(results["data"]["classes"])
                self.begin(read_run(folder, classes), RunDirectory(folder).records())
        if self.run:
            self.add(evaluation_values(results), self.epochs, path)

    def begin(self, run: TrackedRun, records: Sequence[Mapping[str, Any]]) -> None:
        """Begin or continue a tracked run, whose epochs so far have these records."""
        self.run, self.epochs = run, len(records)
        for record in records:
            self.pending.append(Entry(epoch_values(record, run.classes), record["epoch"]))
        self.flush()

    def add(self, values: Values, step: int, evaluation: Path | None = None) -> None:
        """Store values, after those that are still to be stored."""
        self.epochs = step
        self.pending.append(Entry(values, step, evaluation))
        with self.forgiving():
            self.flush()

    def flush(self) -> None:
        """Store what is pending. Raises what the store raises; what it has is not pending then."""
        if self.known is None and self.run:
            self.known = dict(self.store.begin(self.run))
        while self.pending:
            self.send(self.pending[0], self.known or {})
            self.pending.popleft()

    def send(self, entry: Entry, known: dict[str, float]) -> None:
        """Store an entry unless it is known."""
        if is_new(entry.values, known):
            if entry.evaluation:  # first: with the values it would be known
                self.store.attach(entry.evaluation, entry.step)
            self.store.log(entry.values, entry.step)
            known.update(entry.values)

    def close(self, *, completed: bool) -> None:
        """Close the tracked run, and say what could not be stored."""
        if self.run is None:
            return
        with self.forgiving():
            self.flush()
            self.store.close(completed)
        if self.pending:
            hint = "; the same command (absld train: with --resume) adds them"
            self.warn_user(
                f"warning: {self.name} lacks the last {len(self.pending)} reports of "
                f"{self.run.name}{hint if self.run.folder else ''}"
            )
        self.run, self.known = None, None
        self.pending.clear()

    @contextmanager
    def forgiving(self) -> Iterator[None]:
        """Turn an exception into a warning, the first time, and open the run anew after it."""
        try:
            yield
        except Exception as error:
            self.known = None
            if not self.has_warned:
                text = f"warning: {self.name}: {told(error)}; it is tried again after each epoch"
                self.warn_user(text)
            self.has_warned = True


def is_new(values: Values, known: Mapping[str, float]) -> bool:
    """Return whether a store whose latest values are known lacks these."""
    if "epoch" in values:
        return values["epoch"] > known.get("epoch", 0)
    same = (name in known and math.isclose(v, known[name], rel_tol=1e-5, abs_tol=1e-9)
            for name, v in values.items())  # fmt: skip
    return not all(same)


def told(error: Exception) -> str:
    """Return a library's error in a line."""
    text = clip(in_words(error), TOLD)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# --- Tracked runs ---


def describe_run(start: TrainingStart) -> TrackedRun:
    """Return the tracked run of a training; one without a directory is always a new one."""
    config, folder = start.config, start.run.path if start.run else None
    if folder and (folder / "config.toml").exists():
        return read_run(folder, start.classes)
    name = f"{start.role}-{config.method}-seed{config.seed}"
    key = folder.resolve().name if folder else f"{name}-{uuid.uuid4().hex[:8]}"
    return TrackedRun(key, key, folder, setting_values(vars(config)), start.classes)


def read_run(folder: Path, classes: tuple[str, ...]) -> TrackedRun:
    """Return the tracked run of a run directory.

    Its key has the time at which the run began: a directory of the same name, made later, is
    another run.
    """
    settings = setting_values(vars(read_run_config(folder / "config.toml")))
    begun = {"started": sessions[0].get("started")} if (sessions := read_sessions(folder)) else {}
    name = folder.resolve().name
    return TrackedRun(name, f"{name}-{key_of(begun)}", folder, settings, classes)
