"""A function of tensors as one CUDA graph: its kernels are launched together, not one by one."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor


class GraphedFunction:
    """A function (tensors -> tensor) that is captured once and replayed for other tensors.

    It runs on buffers of its own, of the shapes of `examples`, into which each call copies. So the
    function must do the same operations whatever the values are, and may not wait for the device.
    """

    def __init__(self, function: Callable[..., Tensor], examples: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in examples]
        self.graph, self.output = capture(lambda: function(*self.inputs))

    def __call__(self, *tensors: Tensor) -> Tensor:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return self.output.clone()  # the next call overwrites it


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Return a CUDA graph of a function, and the tensor in which each replay leaves its output."""
    # Libraries initialise themselves in the first calls, which do not belong in the graph.
    side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types there
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def partial_tensors(function: object) -> tuple[Tensor, ...] | None:
    """Return the arguments of a `partial` of tensors alone; None for any other function."""
    if not isinstance(function, partial) or function.keywords:
        return None
    tensors = tuple(value for value in function.args if isinstance(value, Tensor))
    return tensors if len(tensors) == len(function.args) else None
