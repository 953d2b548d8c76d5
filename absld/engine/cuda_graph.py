"""Functions as CUDA graphs: their kernels are launched together, not one by one."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from absld.errors import UsageError

T = TypeVar("T")


class GraphedFunction:
    """A function (tensors -> tensor) that is captured once and replayed for other tensors.

    It runs on buffers of its own, of the shapes of `examples`, into which each call copies. So the
    function must do the same operations whatever the values are, and may not wait for the device.
    Raises UsageError if it does.
    """

    def __init__(self, function: Callable[..., Tensor], examples: Sequence[Tensor]) -> None:
        self.inputs = [tensor.clone() for tensor in examples]
        self.graph, self.output = capture(lambda: function(*self.inputs), self.inputs[0].device)

    def __call__(self, *tensors: Tensor) -> Tensor:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        self.graph.replay()
        return self.output.clone()  # the next call overwrites it


class GraphedNetwork(nn.Module):
    """A frozen network whose forward without gradient is a CUDA graph for each shape of images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graphs: dict[torch.Size, GraphedFunction] = {}

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # for an attack on the network
            logits: Tensor = self.model(x)
            return logits
        if x.shape not in self.graphs:
            self.graphs[x.shape] = GraphedFunction(self.model, [x])
        return self.graphs[x.shape](x)


def capture(function: Callable[[], T], device: torch.device) -> tuple[torch.cuda.CUDAGraph, T]:
    """Return a CUDA graph of a function, and its result, which each replay writes again.

    device: of the function's tensors. Raises UsageError if the function cannot be captured.
    """
    graph = torch.cuda.CUDAGraph()
    # Streams belong to the current device, which need not be the one that is used.
    with torch.cuda.device(device):
        # Libraries initialise themselves in the first calls, which do not belong in the graph.
        side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types there
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(side_stream)
        try:
            # Other threads, such as those of NCCL, may use the device meanwhile.
            with torch.cuda.graph(graph, stream=side_stream, capture_error_mode="thread_local"):
                output = function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            cause = str(error).splitlines()[0]
            raise UsageError(
                f"a network cannot be captured in a CUDA graph: {cause}",
                "--no-cuda-graph",
            ) from error
    return graph, output


def partial_tensors(function: object) -> tuple[Tensor, ...] | None:
    """Return the arguments of a `partial` of tensors alone; None for any other function.

    Nor for one whose function has a state of its own, as methods and closures have: in a graph it
    would stay as it was.
    """
    if not isinstance(function, partial) or function.keywords:
        return None
    plain = inspect.unwrap(function.func)
    if not inspect.isfunction(plain) or plain.__closure__:
        return None
    tensors = tuple(value for value in function.args if isinstance(value, Tensor))
    return tensors if len(tensors) == len(function.args) else None
