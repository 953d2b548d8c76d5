"""Checkpoints: files of tensors and plain values, sealed with their SHA-256.

They are read with `weights_only=True`: nothing in a file is executed.
"""

import errno
import hashlib
import io
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absld.errors import CheckpointError, UsageError
from absld.storage.files import raw_bytes, replacing

SEAL = "content_sha256"
MOST_VALUES = 1_000_000  # in a file; a network of a thousand tensors has a few thousand
SLACK = 2**20  # bytes that a file may take beyond its size
EXPORT = "where you trust it, export torch.save(model.state_dict(), FILE) from it"


def content_digest(content: Any) -> str:
    """Compute the SHA-256 of nested dicts, lists, tuples, tensors and plain values."""
    sha = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            sha.update(f"dict {len(value)}".encode())
            for key in value:
                walk(key)
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            sha.update(f"{type(value).__name__} {len(value)}".encode())
            for item in value:
                walk(item)
        elif isinstance(value, Tensor):
            sha.update(f"tensor {value.dtype}{tuple(value.shape)}".encode())
            sha.update(raw_bytes(value))
        else:
            sha.update(f"{type(value).__name__} {value!r}".encode())

    walk(content)
    return sha.hexdigest()


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values, sealed with their SHA-256; the file is whole or not there."""
    # Through memory: torch.save's own error on a full disk does not say that it is full.
    buffer = io.BytesIO()
    torch.save(content | {SEAL: content_digest(content)}, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def load(path: str | Path) -> Any:
    """Read a file of tensors and plain values, on the CPU.

    Raises:
        CheckpointError: the file is something else, would take more memory than its size, or has
            changed since it was written.
        UsageError: it is a .safetensors file, and that library is not installed.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_safetensors(path)
        else:
            refuse_compressed(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about formats: the content decides
                content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_inflated(content, path)
        sealed = content.pop(SEAL, None) if isinstance(content, dict) else None
        changed = sealed is not None and sealed != content_digest(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "check the path") from None
    except (UsageError, CheckpointError):
        raise
    except Exception as error:  # a broken file can make the unpickler raise anything
        raise CheckpointError(*diagnose(path, error)) from error
    if changed:
        raise CheckpointError(
            f"{path}: its content has changed since its SHA-256 was taken",
            "copy it again from where it came from",
        )
    return content


def refuse_compressed(path: Path) -> None:
    """Raise CheckpointError for a compressed archive, which may unpack to any size.

    torch.save does not compress.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size + SLACK:
            raise CheckpointError(
                f"{path}: its {path.stat().st_size:,} bytes would become {unpacked:,}",
                "needed: a file by torch.save, which compresses nothing",
            )


def refuse_inflated(content: Any, path: Path) -> None:
    """Raise CheckpointError for a content that is larger than its file.

    It may hold itself, the same part many times, or tensors that repeat their bytes.
    """
    pending = [content]
    for _ in range(MOST_VALUES):
        if not pending:
            return
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            claimed = value.numel() * value.element_size()
            if claimed > value.untyped_storage().nbytes() and claimed > SLACK:
                raise CheckpointError(
                    f"{path}: a tensor of {tuple(value.shape)} repeats the bytes that it has",
                    "where you trust it, save a .clone() of it",
                )
    raise CheckpointError(
        f"{path}: holds more than {MOST_VALUES:,} values, or holds itself", "needed: weights"
    )


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of the format safetensors. Raises UsageError if its library is missing."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{path}: {error}", "pip install safetensors") from error
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def diagnose(path: Path, error: Exception) -> tuple[str, str]:
    """Return why a file does not load, and a hint."""
    again = "fetch or copy it again"
    # EINVAL does not come from the disk: a damaged archive made the reader seek before its start.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"{path}: {error.strerror or error}", "needed: a file of weights, or a run"
    if "TorchScript" in str(error):
        return f"{path}: a TorchScript program, not weights", EXPORT
    if kinds := re.findall(r"GLOBAL (\S+)", str(error)):
        return f"{path}: refused, it would run code or build objects ({kinds[0]})", EXPORT
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return f"{path}: the file is empty", again
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path}: this is an HTML page, not weights", "download the file itself"
    if path.suffix == ".safetensors":
        return f"{path}: not a whole safetensors file: {error}", again
    if head.startswith(b"PK"):
        return f"{path}: a checkpoint that is truncated or damaged", again
    return f"{path}: not a checkpoint; it starts with {head[:20]!r}", "needed: a file by torch.save"
