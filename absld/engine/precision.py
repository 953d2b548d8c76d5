"""Devices, floating-point precision and memory format."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from absld.errors import UsageError

T = TypeVar("T", bound=nn.Module)


def resolve_device(name: str) -> torch.device:
    """The device `name`; "auto" is cuda where there is one, else the CPU. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"--device {name}: {error}", "--device cpu works everywhere") from error
    return device


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Inside, float32 is multiplied in full (fp32, bf16), or in tf32, and cuDNN is repeatable.

    torch's own settings are as before afterwards.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    conv = cudnn.conv  # type: ignore[attr-defined]  # set at run time
    before = matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark
    try:
        matmul.fp32_precision = conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        matmul.fp32_precision, conv.fp32_precision, cudnn.deterministic, cudnn.benchmark = before


class InPrecision(nn.Module):
    """A network whose forward computes in a precision, from float32 weights to float32 logits. A
    backward is in that of the code around it, but for bf16."""

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        # Weights are cast once a forward: there is nothing to cache, and a graph could not.
        half = torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )
        with arithmetic(self.precision), half:
            logits: Tensor = self.model(x)
        return logits.float() if self.precision == "bf16" else logits


def in_precision(model: nn.Module, precision: str, around: str | None = None) -> nn.Module:
    """The network to call for a precision: itself, or a wrapper. The weights are shared. around:
    the `arithmetic` in which it will be called, if not its own."""
    as_around = precision == (around or precision) != "bf16"
    return model if as_around else InPrecision(model, precision)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def laid_out(model: T, channels_last: bool) -> T:
    """The network itself, its weights in the memory format. Its state dict is as before."""
    return model.to(memory_format=torch.channels_last) if channels_last else model
