"""Devices, floating-point precision and memory format."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from absld.errors import UsageError

T = TypeVar("T", bound=nn.Module)


def resolve_device(name: str) -> torch.device:
    """Return the device `name`; "auto" is cuda where there is one, else cpu. Raises UsageError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"--device {name}: {error}", "--device cpu works everywhere") from error
    return device


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set how torch multiplies float32 inside: in TF32 for "tf32", else in full (IEEE).

    cuDNN is deterministic inside. On leaving, torch's settings are what they were.
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


class WithPrecision(nn.Module):
    """A network whose forward computes in a precision, from float32 weights to float32 logits.

    A backward is in the precision of the code around it, except for bf16.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        # Each forward casts each weight once: there is nothing to cache, and a CUDA graph could not.
        autocast = torch.autocast(
            x.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )
        with float32_precision(self.precision), autocast:
            logits: Tensor = self.model(x)
        return logits.float() if self.precision == "bf16" else logits


def with_precision(
    model: nn.Module, precision: str, caller_precision: str | None = None
) -> nn.Module:
    """Return the module to call for a precision: the network, or a wrapper that shares its weights.

    caller_precision: the `float32_precision` of the calling code; by default `precision`.
    """
    unchanged = precision == (caller_precision or precision) != "bf16"
    return model if unchanged else WithPrecision(model, precision)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def to_memory_format(model: T, channels_last: bool) -> T:
    """Return the network itself, its weights in the memory format. Its state dict is unchanged."""
    return model.to(memory_format=torch.channels_last) if channels_last else model
