"""The seconds and the memory that work takes, on a CPU or an accelerator."""

import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch


class Timer:
    """Marks on a time line: seconds, or on CUDA events that the device passes, without a wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self.now: Callable[[], Any] = partial(cuda_event, device) if on_cuda else time.perf_counter
        self.marks: list[Any] = []

    def mark(self) -> None:
        self.marks.append(self.now())

    def spans(self) -> list[float]:
        """Return the seconds from each mark to the next, and remove the marks."""
        marks, self.marks = self.marks, []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return [
            end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
            for start, end in itertools.pairwise(marks)
        ]

    def time(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes."""
        self.marks = []
        self.mark()
        work()
        self.mark()
        return sum(self.spans())


def cuda_event(device: torch.device) -> Any:
    """Record an event on the device's current stream: that of another device does not wait for it."""
    with torch.cuda.device(device):
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no types there
        event.record()
    return event


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Return the spread of the speed-up from pair to pair."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


def peak_memory(device: torch.device, work: Callable[[], object]) -> int | None:
    """Return the bytes that `work` takes on a CUDA device beyond what was in use; elsewhere None."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
