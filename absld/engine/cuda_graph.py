"""A function of tensors as one CUDA graph: the device is told once what to do, not kernel by kernel."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor


class Replayable(Protocol):
    def replay(self) -> None: ...


class Recorded:
    """`run` (tensors -> tensor), recorded on tensors like `given`, for others of their shapes.

    It is replayed on buffers of its own, into which each call copies. So `run` must do the same
    operations whatever the values are, and may not wait for the device.
    """

    def __init__(self, run: Callable[..., Tensor], given: Sequence[Tensor]) -> None:
        self.given = [tensor.clone() for tensor in given]
        self.graph, self.result = record(lambda: run(*self.given))

    def __call__(self, *given: Tensor) -> Tensor:
        for mine, new in zip(self.given, given, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.result.clone()  # which the next call writes over


def record(run: Callable[[], Tensor]) -> tuple[Replayable, Tensor]:
    """A CUDA graph of `run`, and the tensor in which each replay leaves its result."""
    # Libraries set themselves up in the first calls, which is no part of the graph.
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types there
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def tensors_of(function: object) -> tuple[Tensor, ...] | None:
    """The tensors that a function is `partial` to; None if it is no such function."""
    if not isinstance(function, partial) or function.keywords:
        return None
    tensors = tuple(value for value in function.args if isinstance(value, Tensor))
    return tensors if len(tensors) == len(function.args) else None
