"""Atomic writes, and digests of tensors and settings."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor


def digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of a state dict: sorted names, each with dtype, shape and raw bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update((name + f"{tensor.dtype}{tuple(tensor.shape)}").encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    """Return the values of a tensor as bytes, row by row."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def key_of(settings: Mapping[str, Any]) -> str:
    """Compute a short digest of settings, for the name of a directory."""
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, which gets the name `path` once it is whole and on the disk."""
    # The same name every time, so that the file of a killed process is overwritten.
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())
