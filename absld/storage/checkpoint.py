"""Checkpoints: files of tensors and plain values, sealed with their SHA-256.

They are read with `weights_only=True`: nothing in a file is executed. What is read takes no more
memory than a few times the file's size.
"""

import contextlib
import errno
import hashlib
import io
import struct
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from absld.errors import CheckpointError
from absld.storage.files import raw_bytes, replacing
from absld.storage.opening import COPY_AGAIN, file_size, open_regular
from absld.storage.pickles import OF_A_LIST, RefusedContentError, check_pickle
from absld.storage.safetensors_files import read_safetensors

SEAL = "content_sha256"
SLACK = 2**20  # bytes that a file may take beyond its size
EXPORT = "where you trust it, export torch.save(model.state_dict(), FILE) from it"
MOST_PICKLED = 2**24  # bytes of all but the tensors
MOST_LISTED = 2**22  # bytes of a list of an archive's records
ZIP = b"PK\x03\x04"
OLD_FORMAT = 4  # pickles, before the list of the storages and their bytes
PLAIN = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device)
# torch.load takes these values of numpy where it is told to. Files by numpy 1 name them otherwise.
NUMPY_CALLS: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
NUMPY: list[Any] = [
    np.dtype,
    np.ndarray,
    *[
        (call, f"numpy.{core}.multiarray.{call.__name__}")
        for call in NUMPY_CALLS
        for core in ("core", "_core")
    ],
    *{type(np.dtype(letter)) for letter in "?bhilqBHILQefdFDSU"},
]
LOADING = threading.Lock()  # torch's list is one of the process


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
        elif isinstance(value, (np.generic, np.ndarray)):
            sha.update(f"array {value.dtype.str}{value.shape}".encode() + value.tobytes())
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


def load(path: str | Path, *, sealed: bool = False) -> Any:
    """Read a file of tensors and plain values, on the CPU.

    sealed: whether it must have the SHA-256 that `save` writes, as the files of a run.

    Raises:
        CheckpointError: the file is something else, would take more memory than its size, or has
            changed since it was written.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            content = read_content(file, path)
            refuse_inflated(content, file_size(file))
        seal = content.pop(SEAL, None) if isinstance(content, dict) else None
        changed = seal is not None and seal != content_digest(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "check the path") from None
    except CheckpointError:
        raise
    except RefusedContentError as error:
        raise CheckpointError(f"{path}: {error}", EXPORT) from error
    except Exception as error:  # a broken file can make the unpickler raise anything
        raise CheckpointError(*diagnose(path, error)) from error
    if changed:
        raise CheckpointError(
            f"{path}: its content has changed since its SHA-256 was taken", COPY_AGAIN
        )
    if sealed and seal is None:
        raise CheckpointError(f"{path}: not a file of a run, its SHA-256 is missing", COPY_AGAIN)
    return content


def read_content(file: IO[bytes], path: Path) -> Any:
    """Read what a file holds. Raises RefusedContentError, and others for a damaged file."""
    if path.suffix == ".safetensors":
        return read_safetensors(file, path)
    if file.read(len(ZIP)) == ZIP:
        check_archive(file)
        file.seek(0)
        reader = torch._C.PyTorchFileReader(file)  # the one by which torch.load reads
        check_pickle(io.BytesIO(reader.get_record("data.pkl")))
    else:
        file.seek(0)
        pickles = io.BytesIO(head := file.read(MOST_PICKLED))
        refuse_tar(head[: tarfile.BLOCKSIZE])
        *_, content = [check_pickle(pickles) for _ in range(OLD_FORMAT)]
        if content.storages - check_pickle(pickles, OF_A_LIST).texts:
            raise RefusedContentError("holds storages without bytes")
    file.seek(0)
    with LOADING, warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY):
        warnings.simplefilter("ignore")  # about formats: the content decides
        return torch.load(file, map_location="cpu", weights_only=True)


def refuse_tar(block: bytes) -> None:
    """Raise RefusedContentError if a file begins as a tar archive, which torch.load would try."""
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        raise RefusedContentError("a tar archive, not weights")


def check_archive(file: IO[bytes]) -> None:
    """Raise RefusedContentError for an archive that would become larger than its file.

    Raises BadZipFile if its directory is not at its end: readers could find different ones.
    """
    size = file_size(file)
    file.seek(max(size - 98, 0))
    # By the ZIP format: a record of 64 bits (56 bytes), its locator (20), and the old record (22).
    tail = file.read().rjust(98)
    place, length, offset = size - 22, *struct.unpack("<LL", tail[88:96])
    at_end = tail[76:80] == b"PK\x05\x06" and tail[96:] == b"\0\0"  # no comment
    if tail[56:60] == b"PK\x06\x07":
        place, length, offset = size - 98, *struct.unpack("<QQ", tail[40:56])
        at_end &= tail[:4] == b"PK\x06\x06" and struct.unpack("<Q", tail[64:72]) == (place,)
    if not at_end or offset + length != place:
        raise zipfile.BadZipFile("its directory is not at its end")
    if length > MOST_LISTED:
        raise RefusedContentError(f"lists its records in {length:,} bytes")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise RefusedContentError("a TorchScript program, not weights")
    if (unpacked := sum(entry.file_size for entry in entries)) > size:
        raise RefusedContentError(f"its {size:,} bytes would become {unpacked:,}")
    if any(e.file_size > MOST_PICKLED for e in entries if e.filename.lower().endswith(".pkl")):
        raise RefusedContentError(f"holds more than {MOST_PICKLED:,} bytes beside its tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise RefusedContentError("compressed, which torch.save does not do")


def refuse_inflated(content: Any, size: int) -> None:
    """Raise RefusedContentError for values that are not plain, or claim more than `size` bytes.

    Tensors may share all of their bytes, but not a part.
    """
    pending, claimed = [content], dict[Any, int]()
    while pending:  # it ends: check_pickle has bounded the number of values
        value = pending.pop()
        if isinstance(value, Mapping):
            if getattr(value, "__dict__", {}).keys() - {"_metadata"}:  # they may be its methods
                raise RefusedContentError("holds a dict with attributes")
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            pending += value
        elif isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta:
                view = (value.data_ptr(), value.shape, value.stride())
                claimed[view] = value.numel() * value.element_size()
        elif isinstance(value, (np.generic, np.ndarray)) and value.dtype.kind in "biufcSU":
            claimed[id(value)] = value.nbytes
        elif not isinstance(value, PLAIN):
            raise RefusedContentError(f"holds {type(value).__name__}, not tensors and plain values")
    if (total := sum(claimed.values())) > size + SLACK:
        raise RefusedContentError(f"repeats the bytes of its tensors: {size:,} become {total:,}")


def diagnose(path: Path, error: Exception) -> tuple[str, str]:
    """Return why a file does not load, and a hint."""
    again = "fetch or copy it again"
    # EINVAL does not come from the disk: a damaged archive made the reader seek before its start.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"{path}: {error.strerror or error}", "needed: a file of weights, or a run"
    with open_regular(path) as file:
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
