"""Devices, floating-point precision and memory format."""

import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from absld.errors import UsageError

T = TypeVar("T", bound=nn.Module)


def parse_device(name: str) -> torch.device:
    """Return the device `name`, there or not; "auto" is cuda where there is one, else cpu.

    Raises UsageError if torch does not know it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: {error}", "--device cpu works everywhere") from error


def resolve_device(name: str) -> torch.device:
    """Return the device `name`, as `parse_device`. Raises UsageError also if it is not there."""
    device = parse_device(name)
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise UsageError(f"--device {device}: {error}", "--device cpu works everywhere") from error
    return device


def computes_bf16(device: torch.device) -> bool:
    """Return whether a device has bfloat16 instructions; elsewhere they are emulated, slowly."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # or a person has limited oneDNN, by ONEDNN_MAX_CPU_ISA
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    cpu: Any = torch.cpu  # torch has no types there
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


def emulation_warnings(precisions: Iterable[str], device: torch.device) -> list[str]:
    """Return a warning if bfloat16 is among the precisions and the device has to emulate it."""
    if "bf16" not in precisions or computes_bf16(device):
        return []
    return [f"warning: {device} has no bfloat16 instructions and emulates them slowly"]


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set how torch multiplies float32 inside: in TF32 for "tf32", else in full (IEEE).

    Only CUDA has TF32. cuDNN is deterministic inside. On leaving, torch's settings are what they
    were.
    """
    backends: Any = torch.backends  # torch has no types there
    matmul, cudnn, mkldnn = backends.cuda.matmul, backends.cudnn, backends.mkldnn
    on_cuda, on_cpu = [matmul, cudnn.conv, cudnn.rnn], [mkldnn.matmul, mkldnn.conv]
    before = [(part, part.fp32_precision) for part in (*on_cuda, *on_cpu)]
    legacy = legacy_settings()
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        # The legacy settings, too: torch raises for whoever reads them, as networks and
        # max-autotune do, while they disagree with the new ones.
        matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        for part in on_cuda:
            part.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        for part in on_cpu:
            part.fp32_precision = "ieee"
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy[0])
            cudnn.allow_tf32 = legacy[1]
        for part, value in before:
            part.fp32_precision = value


def legacy_settings() -> tuple[str, bool] | None:
    """Return torch's legacy settings of TF32; None where they disagree with the new ones."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


class WithPrecision(nn.Module):
    """A network whose forward computes in a precision, from float32 weights to float32 logits.

    A backward is in the precision of the code around it, except for bf16.
    """

    def __init__(self, model: nn.Module, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, x: Tensor) -> Tensor:
        in_bf16 = bf16_autocast(x.device) if self.precision == "bf16" else nullcontext()
        with float32_precision(self.precision), in_bf16:
            logits: Tensor = self.model(x)
        return logits.float() if self.precision == "bf16" else logits


@contextmanager
def bf16_autocast(device: torch.device) -> Iterator[None]:
    """Compute in bfloat16 what autocast does, but for what a CPU computes slowly in it."""
    # Each forward casts each weight once: there is nothing to cache, and a CUDA graph could not.
    autocast = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    with autocast, StridedDepthwiseInFloat32() if device.type == "cpu" else nullcontext():
        yield


class StridedDepthwiseInFloat32(TorchFunctionMode):
    """Depthwise convolutions with strides compute in float32, also inside of autocast.

    On CPUs, oneDNN has a slow gradient for them in bfloat16: 27 ms where float32 takes 0.8, for 16
    images of 144 channels of 32x32. The three of MobileNetV2 took more than a third of its attack.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is nn.functional.conv2d:
            func = strided_depthwise_in_float32
        return func(*args, **(kwargs or {}))


def strided_depthwise_in_float32(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    *others: Any,
    **named: Any,
) -> Tensor:
    """Convolve; in the weights' type, whatever autocast says, where the gradient would be slow.

    The arguments are those of torch.nn.functional.conv2d.
    """
    strides = (stride,) if isinstance(stride, int) else stride
    depthwise = weight.shape[1] == 1 and input.shape[-3] > 1
    slow = depthwise and max(strides) > 1
    with torch.autocast("cpu", enabled=False) if slow else nullcontext():
        x = input.to(weight.dtype) if slow else input
        return nn.functional.conv2d(x, weight, bias, stride, *others, **named)


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
