"""Device and precision: how fast the same arithmetic is done."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from absld.errors import UsageError


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


class Autocast(nn.Module):
    """A network whose forward computes in bfloat16, from float32 weights to float32 logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            logits: Tensor = self.model(x)
        return logits.float()


def in_precision(model: nn.Module, precision: str) -> nn.Module:
    """The network to call for a precision: itself, or in bfloat16. The weights are shared."""
    return Autocast(model) if precision == "bf16" else model
