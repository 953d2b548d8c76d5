"""Seconds and bytes that work takes, on a CPU or an accelerator."""

import ctypes
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Stopwatch:
    """Marks on a time line; on CUDA events that the device passes, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types there
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def spans(self) -> list[float]:
        """Seconds from each mark to the next, and a clean line."""
        marks, self.marks = self.marks, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [between(*pair) for pair in itertools.pairwise(marks)]

    def time(self, work: Callable[[], object]) -> float:
        """Seconds that `work` takes."""
        self.marks = []
        self.mark()
        work()
        self.mark()
        return sum(self.spans())


def between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(start.elapsed_time(end)) / 1000
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def memory_taken(device: torch.device, work: Callable[[], object]) -> int | None:
    """Bytes that `work` takes at its peak beyond what was in use before: of the device, or of this
    process. None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # What earlier work has left free is given back, and the peak set to what is in use now:
        # glibc, and Linux.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = status_bytes("VmHWM")
    except (OSError, KeyError, AttributeError):
        work()
        return None
    work()
    return status_bytes("VmHWM") - before


def status_bytes(name: str) -> int:
    """A figure of /proc/self/status. Raises OSError or KeyError where there is none."""
    lines = Path("/proc/self/status").read_text().splitlines()
    figures = dict(line.split(":", 1) for line in lines)
    return int(figures[name].split()[0]) * 1024
