"""A record of what a piece of code makes a CUDA device do, and the real device that keeps one.

`helpers.pretend_cuda` has a device with the same interface for machines without one.
"""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

import absld_min

ROOT = Path(absld_min.__file__).parent
HAS_CUDA = torch.cuda.is_available()  # before a pretend device says so, too


@dataclass
class Record:
    """A record of a device's work; an entry names an operation and its place, "item at trainer.py:12".

    waits: the host waited for the device. The other fields are those of the pretend device only.
    cpu_indices: CPU indices of CUDA tensors, which are copied without a word. global_draws: random
    numbers from the device's global generator. unrepeatable: kernels that sum in any order.
    operations: those with work on the device, a lower bound of its kernels.
    """

    waits: list[str] = field(default_factory=list)
    cpu_indices: list[str] = field(default_factory=list)
    global_draws: list[str] = field(default_factory=list)
    unrepeatable: list[str] = field(default_factory=list)
    operations: int = 0


def place() -> str:
    """Return the innermost line of the product's code, as file:line."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path == ROOT / "absld_min.py" or ROOT / "absld" in path.parents:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


class RealCuda:
    """The first CUDA device of this machine. Its waits are those that torch itself warns of."""

    device = "cuda:0"
    is_pretend = False

    def __init__(self) -> None:
        self.faults: list[str] = []  # there are none: the device raises

    def __enter__(self) -> "RealCuda":
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.empty_cache()

    @contextmanager
    def step(self) -> Iterator[Record]:
        """Keep a record of what happens inside."""
        record = Record()

        def note(message: Warning | str, *_: object) -> None:
            if "called a synchronizing CUDA operation" in str(message):
                record.waits.append(f"wait at {place()}")

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            mode = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield record
            finally:
                torch.cuda.set_sync_debug_mode(mode)
