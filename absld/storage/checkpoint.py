"""Files that are whole or not there, and are what they were when they were written.

Checkpoints hold tensors and plain values only and are read with `weights_only=True`: nothing in
a file is executed. Their content carries a SHA-256. A run directory keeps all files of a run.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from absld.errors import CheckpointError, Interrupted, UsageError

try:
    import fcntl
except ImportError:  # Windows has no flock; there, a second process is not noticed
    fcntl = None  # type: ignore[assignment]  # the module is the value wherever it exists

SEAL = "content_sha256"


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the sorted names of a state dict, each followed by dtype, shape, raw bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        sha.update((name + f"{tensor.dtype}{tuple(tensor.shape)}").encode())
        sha.update(raw_bytes(tensor))
    return sha.hexdigest()


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def content_digest(content: Any) -> str:
    """SHA-256 of nested dicts, lists, tuples, tensors and plain values."""
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


def save(content: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values, sealed with their SHA-256."""
    # Through memory: torch.save's own errors of a full disk do not say that it is full.
    whole = io.BytesIO()
    torch.save(content | {SEAL: content_digest(content)}, whole)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def load(path: str | Path) -> Any:
    """Read a file of tensors and plain values, on the CPU, executing nothing in it.

    A name that ends in .safetensors needs the library of that name. Raises CheckpointError, which
    says what the file is instead, that it would take more memory than its size tells, or that it
    has changed since it was written.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            content = load_safetensors(path)
        else:
            refuse_compressed(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of formats, where the content says all
                content = torch.load(path, map_location="cpu", weights_only=True)
        refuse_inflated(content, path)
        sealed = content.pop(SEAL, None) if isinstance(content, dict) else None
        changed = sealed is not None and sealed != content_digest(content)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file", "check the path") from None
    except (UsageError, CheckpointError):
        raise
    except Exception as error:  # a broken file can make the unpickler raise anything
        raise CheckpointError(*diagnosis(path, error)) from error
    if changed:
        raise CheckpointError(
            f"{path}: its content has changed since its SHA-256 was taken",
            "copy it again from where it came from",
        )
    return content


MOST_VALUES = 1_000_000  # in a file; a network of a thousand tensors has a few thousand
LITTLE = 2**20  # bytes for which nobody is refused


def refuse_compressed(path: Path) -> None:
    """Raise CheckpointError if unpacking an archive makes more of it: torch.save compresses
    nothing, so one that is compressed is not by torch, and a small one may hold any amount."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size + LITTLE:
            raise CheckpointError(
                f"{path}: its {path.stat().st_size:,} bytes would become {unpacked:,}",
                "needed: a file by torch.save, which compresses nothing",
            )


def refuse_inflated(content: Any, path: Path) -> None:
    """Raise CheckpointError if going through a content takes more than the file's size tells: one
    that holds itself, or the same part many times over, or tensors that repeat their bytes."""
    left = [content]
    for _ in range(MOST_VALUES):
        if not left:
            return
        value = left.pop()
        if isinstance(value, Mapping):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple)):
            left += value
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            claimed = value.numel() * value.element_size()
            if claimed > value.untyped_storage().nbytes() and claimed > LITTLE:
                raise CheckpointError(
                    f"{path}: a tensor of {tuple(value.shape)} repeats the bytes that it has",
                    "where you trust it, save a .clone() of it",
                )
    raise CheckpointError(
        f"{path}: holds more than {MOST_VALUES:,} values, or holds itself", "needed: weights"
    )


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of the format safetensors. Raises UsageError without its library."""
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise UsageError(f"{path}: {error}", "pip install safetensors") from error
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


EXPORT = "where you trust it, export torch.save(model.state_dict(), FILE) from it"


def diagnosis(path: Path, error: Exception) -> tuple[str, str]:
    """What is wrong with a file that does not load, and what to do."""
    again = "fetch or copy it again"
    # EINVAL is no fault of the disk: a damaged archive had the reader seek before its start.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"{path}: {error.strerror or error}", "needed: a file of weights, or a run"
    if "TorchScript" in str(error):
        return f"{path}: a TorchScript program, not weights", EXPORT
    if kinds := re.findall(r"GLOBAL (\S+)", str(error)):
        return (
            f"{path}: refused, it would run code or build objects ({kinds[0]})",
            EXPORT,
        )
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return f"{path}: the file is empty", again
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return f"{path}: this is an HTML page, not weights", "download the file itself"
    if path.suffix == ".safetensors":
        return f"{path}: no whole safetensors file: {error}", again
    if head.startswith(b"PK"):
        return f"{path}: a checkpoint that is truncated or damaged", again
    return f"{path}: no checkpoint; it starts with {head[:20]!r}", "needed: a file by torch.save"


class RunDirectory:
    """The files of one run: config.toml, environment.json, metrics.jsonl, best.pt, last.pt, STATUS.

    Used as a context it is locked: a second process is refused (CheckpointError), and STATUS says
    how the run ended.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.best, self.last = self.path / "best.pt", self.path / "last.pt"
        self.metrics = self.path / "metrics.jsonl"
        self._lock: IO[str] | None = None

    def __enter__(self) -> "RunDirectory":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        if fcntl:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise CheckpointError(
                    f"{self.path}: another process is at work in this run",
                    "wait for it, or give another --out",
                ) from None
        self.set_status("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.set_status("finished")
            elif issubclass(kind, Interrupted) or not issubclass(kind, Exception):
                self.set_status("interrupted")
            else:
                self.set_status(f"failed: {' '.join(str(error).split())}")
        except OSError:
            if error is None:
                raise
        finally:
            if self._lock:
                self._lock.close()

    def put(self, content: dict[str, Any], path: Path) -> None:
        """Write a checkpoint."""
        save(content, path)

    def exists(self) -> bool:
        """Has a run been started here?"""
        return (self.path / "STATUS").exists()

    def status(self) -> str:
        return (self.path / "STATUS").read_text().strip()

    def set_status(self, status: str) -> None:
        self.write("STATUS", status + "\n")

    def write(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def append(self, record: Mapping[str, Any]) -> None:
        """One record more in metrics.jsonl, on the disk when this returns."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl; a last line that was cut off is left out. Raises
        CheckpointError for a line that is no record."""
        if not self.metrics.exists():
            return []
        *whole, _ = self.metrics.read_bytes().split(b"\n")
        try:
            records: list[dict[str, Any]] = [json.loads(line) for line in whole]
            _ = [(record["epoch"], record.get("seconds")) for record in records]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.metrics}: damaged ({error})", "copy the run again from where it came from"
            ) from error
        return records

    def keep_records(self, epochs: int) -> None:
        """Drop what was recorded after `epochs`: the checkpoint does not know of it."""
        kept = [record for record in self.records() if record["epoch"] <= epochs]
        self.write(self.metrics.name, "".join(json.dumps(record) + "\n" for record in kept))


class ReadRunDirectory(RunDirectory):
    """A run directory in the hands of a process that leaves all writing to another."""

    def __enter__(self) -> "ReadRunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def append(self, record: Mapping[str, Any]) -> None:
        pass

    def put(self, content: dict[str, Any], path: Path) -> None:
        pass
