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
    """SHA-256 over the sorted names of a state dict, each followed by dtype, shape, raw bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update((name + f"{tensor.dtype}{tuple(tensor.shape)}").encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def key_of(made_of: Mapping[str, Any]) -> str:
    """A short digest of settings and the like, for the name of a directory."""
    return hashlib.sha256(repr(sorted(made_of.items())).encode()).hexdigest()[:8]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets the name `path` when it is whole and on the disk, or never."""
    # One name for all attempts: what a killed process left behind is written over.
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
