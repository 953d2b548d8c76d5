"""The checkpoints of a training in its run directory, and which training they belong to."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from absld.errors import CheckpointError, UsageError
from absld.storage.checkpoint import load
from absld.storage.opening import COPY_AGAIN, make_folder
from absld.storage.run_directory import RunDirectory


class TrainingCheckpoint:
    """A training's state in last.pt, its best weights in best.pt, its records in metrics.jsonl.

    Args:
        run: the directory, locked by `with RunDirectory(...) as run`.
        about: plain values that both files carry, such as the architecture.
        identity: plain values that decide what the training computes.

    Raises UsageError for a directory that is not locked.
    """

    def __init__(
        self, run: RunDirectory, about: Mapping[str, Any], identity: Mapping[str, Any]
    ) -> None:
        if not run.is_locked:
            raise UsageError(f"{run.path} is not locked", "with RunDirectory(...) as run: fit(...)")
        self.run, self.about, self.identity = run, dict(about), dict(identity)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state of the training."""
        self.run.write_checkpoint({**self.about, "identity": self.identity, **state}, self.run.last)

    def save_epoch(
        self, record: Mapping[str, Any], best: Mapping[str, Any] | None, state: Mapping[str, Any]
    ) -> None:
        """Write an epoch: its record, the weights if they are the best, and the state.

        The state comes last: what it does not know of is dropped on resuming, and computed again.
        """
        if best is not None:
            self.run.write_checkpoint(
                {**self.about, "model": best, "record": record}, self.run.best
            )
        self.run.append_record(record)
        self.save(state)

    def load(self) -> dict[str, Any] | None:
        """Read the state of the training; None if it has none yet.

        Raises CheckpointError if the directory holds another training, or its state is missing.
        """
        make_folder(self.run.path)
        if not os.path.lexists(self.run.last):
            # A training that was killed before it wrote its first state has one record at most.
            if (self.run.path / "result.json").exists() or len(self.run.records()) > 1:
                raise CheckpointError(
                    f"{self.run.last}: missing, though this training has gone on from it",
                    f"{COPY_AGAIN}, or remove the directory to train anew",
                )
            return None
        state = load_of_program(self.run.last, "identity")
        if differences := compare_settings(state["identity"], self.identity):
            raise CheckpointError(
                f"{self.run.path} holds another training: {'; '.join(differences)}",
                "give the same settings, or another --out",
            )
        return state

    def load_best(self, epochs: int, student: Mapping[str, Tensor]) -> dict[str, Any]:
        """Read the best weights of `epochs` finished epochs, and drop the records of later ones.

        student: its weights, of whose names and shapes they are.
        """
        self.run.drop_records_after(epochs)
        if not epochs:
            return {}
        best: dict[str, Any] = load_of_program(self.run.best, "model")["model"]
        if shapes(best) != shapes(student):
            raise CheckpointError(f"{self.run.best}: belongs to a different network", COPY_AGAIN)
        return best


def shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


def load_of_program(path: Path, name: str) -> dict[str, Any]:
    """Load a checkpoint that a training has written. Raises CheckpointError if `name` is missing."""
    content = load(path, sealed=True)
    if not isinstance(content, dict) or not isinstance(content.get(name), dict):
        raise CheckpointError(f"{path}: not a checkpoint of a training by absld", COPY_AGAIN)
    return content


def compare_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """List the differences of the settings of a run, as `name is A in the run, B now`."""
    return [
        f"{name} is {shown(saved.get(name))} in the run, {shown(current.get(name))} now"
        for name in {**current, **saved}
        if saved.get(name) != current.get(name)
    ]


def shown(value: Any) -> str:
    """Return a value as text, of a digest its beginning."""
    text = repr(value)
    return text if len(text) < 60 else f"{text[:9]}...'"
