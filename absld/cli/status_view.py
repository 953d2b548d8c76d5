"""The view of `--status`: a line for each training."""

from collections.abc import Mapping, Sequence
from typing import Any

from absld.text import column


def status_lines(states: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a row for each training: its state, its epochs, its number in Slurm; and a count."""
    width = max(len(state["training"]) for state in states)
    finished = sum(state["state"] == "finished" for state in states)
    rows = []
    for state in states:
        done, total = state["epochs"]
        job = f"  job {state['job']}" if state["job"] else ""
        name = column(state["training"], min(width, 60))
        rows.append(f"{name}  {f'{done}/{total}':>9} epochs  {state['state']}{job}")
    return [*rows, f"{finished} of {len(states)} finished"]
