"""The check of shapes: tensors of other shapes are broadcast, to a number that means nothing."""

from torch import Tensor


def check_shape(name: str, tensor: Tensor, *expected: int | str) -> None:
    """Raise ValueError unless a tensor has the expected shape; a letter stands for any size."""
    shape = tuple(tensor.shape)
    if shape != expected and (
        len(shape) != len(expected)
        or any(isinstance(size, int) and size != n for n, size in zip(shape, expected, strict=True))
    ):
        raise ValueError(f"{name} must be ({','.join(map(str, expected))}), not {shape}")
