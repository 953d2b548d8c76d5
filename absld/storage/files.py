"""Atomic writes, and digests of tensors and settings."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from absld.storage.opening import irregular


def digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of a state dict: sorted names, each with dtype, shape and raw bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update((name + f"{tensor.dtype}{tuple(tensor.shape)}").encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the values of a tensor as bytes, row by row; a view where the tensor is in that order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def key_of(settings: Mapping[str, Any]) -> str:
    """Compute a short digest of settings, for the name of a directory."""
    return hashlib.sha256(repr(sorted(settings.items())).encode()).hexdigest()[:8]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, which gets the name `path` once it is whole and on the disk."""
    # The same name every time, so that the file of a killed process is replaced.
    temporary = path.with_name(f".partial-{path.name}")
    for name in (path, temporary):
        if name.is_dir() and not name.is_symlink():
            raise irregular(name, "wb")
    temporary.unlink(missing_ok=True)  # it may be a link: the name goes, not the file behind it
    try:
        with temporary.open("xb") as file:  # never through a link
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
        # A text may name a path with bytes that are not UTF-8, and is not to be lost for that.
        file.write(text.encode(errors="backslashreplace"))
