"""Checks of tensors: one of another shape is broadcast, to a number that means nothing."""

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless a tensor has the expected shape; a letter stands for any size."""
    shape = tuple(tensor.shape)
    if shape != expected and (
        len(shape) != len(expected)
        or any(isinstance(size, int) and size != n for n, size in zip(shape, expected, strict=True))
    ):
        raise ValueError(f"{name} must be ({','.join(map(str, expected))}), not {shape}")


def is_dense(value: object) -> bool:
    """Return whether a value is a tensor whose numbers lie in memory, one beside the other."""
    return (
        isinstance(value, Tensor)
        and not is_lazy(value)
        and value.layout == torch.strided
        and not value.is_quantized
        and not value.is_meta
    )


def describe_kind(value: object) -> str:
    """Describe what a value is: its type; of a tensor also its layout and device."""
    kind = type(value).__name__
    return f"{kind} ({value.layout}, {value.device})" if isinstance(value, Tensor) else kind
