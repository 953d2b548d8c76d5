"""Images in a memory-mapped file: sets that need not fit in memory, decoded once.

A cache is two files: NAME.images has the pixels, one image after another, and NAME.header what is
known of them and when they were written, sealed with its SHA-256. The header is written last:
without it there is no cache.
"""

import contextlib
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Int
from torch import Tensor

from absld.data.dataset import (
    InMemoryImages,
    Labelled,
    check_classes,
    check_labels,
    digest_images,
)
from absld.errors import AbsldError, CheckpointError, DataError
from absld.progress import Observer
from absld.storage.checkpoint import load, save
from absld.storage.files import raw_bytes, replacing, write_text
from absld.storage.opening import make_folder, open_regular, read_bytes

VERSION = 1
READ = 2**24  # bytes that are read from the file at once
ELSEWHERE = "ABSLD_CACHE=DIR names another folder for decoded images"


def cache_folder() -> Path:
    """Return the folder of the caches: ABSLD_CACHE/images, else images in the user's cache folder."""
    import pooch

    return Path(os.environ.get("ABSLD_CACHE") or pooch.os_cache("absld")) / "images"


@dataclass(frozen=True, eq=False)
class ImageFile:
    """The pixels of a cache (N,channels,H,W) uint8, mapped: they are not to be written to."""

    path: Path
    pixels: "np.memmap[Any, np.dtype[np.uint8]]"

    def read(self, numbers: Int[Tensor, " m"]) -> Iterator[bytes]:
        """Read images in parts of about READ bytes.

        By plain reading: pages of the mapping would count as memory of the process.
        """
        size = math.prod(self.pixels.shape[1:])
        with open_regular(self.path) as file:
            for part in torch.split(numbers, max(1, READ // size)):
                found = []
                for number in part.tolist():
                    file.seek(number * size)
                    found.append(file.read(size))
                yield b"".join(found)


@dataclass(frozen=True, eq=False)
class MappedImages(Labelled):
    """Images of an `ImageFile`, uint8; labels (N,) int64; names of the classes.

    numbers (N,): of the images in the file, on the CPU: a subset is a list of numbers, not a copy.
    """

    source: ImageFile
    numbers: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_classes(self.classes)
        object.__setattr__(self, "classes", tuple(self.classes))
        check_labels(self.labels, len(self.numbers), len(self.classes))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.source.pixels.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def index_device(self) -> torch.device:
        """The CPU, which gathers the images."""
        return self.numbers.device

    @property
    def size(self) -> int:
        """The bytes that the images would take in memory."""
        return len(self) * math.prod(self.image_shape)

    @property
    def storage(self) -> str:
        """Where the images are, in words."""
        return f"mapped from {self.source.path.parent}"

    def rows(self, index: Tensor | slice) -> Tensor:
        """Gather the images of these numbers (n,channels,H,W), and copy them to the device."""
        numbers = self.numbers[index if isinstance(index, slice) else index.to("cpu")]
        pinned = self.device.type == "cuda"  # from which the copy does not wait
        shape = len(numbers), *self.image_shape
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        # The numbers are in range; "raise" would go through a buffer.
        np.take(self.source.pixels, numbers.numpy(), axis=0, out=images.numpy(), mode="clip")
        return images.to(self.device, non_blocking=True)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all images with their labels, `size` at a time, in order."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.rows(part), self.labels[part]

    def to(self, device: torch.device | str) -> "MappedImages":
        """Return the set with its labels, and from now on its batches, on a device."""
        return replace(self, labels=self.labels.to(device))

    def subset(self, index: Int[Tensor, " m"]) -> "MappedImages":
        """Return the images of these numbers, in this order; nothing is copied."""
        numbers, labels = self.numbers[index.to("cpu")], self.labels[index.to(self.device)]
        return replace(self, numbers=numbers, labels=labels)

    def digest(self) -> str:
        """Compute the digest of `InMemoryImages`; it is kept beside the cache."""
        labels = self.labels.cpu()
        what = hashlib.sha256(repr(self.classes).encode())
        for tensor in (self.numbers, labels):
            what.update(raw_bytes(tensor))
        path = self.source.path.with_suffix(f".{what.hexdigest()[:16]}.sha256")
        with contextlib.suppress(OSError, AbsldError):
            kept = read_bytes(path).decode(errors="replace")
            if re.fullmatch("[0-9a-f]{64}", kept):
                return kept
        shape = len(self), *self.image_shape
        images = self.source.read(self.numbers)
        found = digest_images(self.classes, self.dtype, shape, images, labels)
        with contextlib.suppress(OSError, AbsldError):  # a folder that can only be read
            write_text(path, found)
        return found

    def in_memory(self) -> InMemoryImages:
        """Read the images into memory: one copy, on the device of the labels."""
        images = torch.empty((len(self), *self.image_shape), dtype=torch.uint8)
        flat, done = images.flatten().numpy(), 0  # which share the memory
        for part in self.source.read(self.numbers):
            flat[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        return InMemoryImages(images.to(self.device), self.labels, self.classes, self.notes)


@dataclass(frozen=True, eq=False)
class Header:
    """The shape of the images in a cache (N,channels,H,W), their labels (N,), and a description."""

    shape: tuple[int, ...]
    labels: Int[Tensor, " n"]
    description: str


def open_cache(path: Path) -> tuple[ImageFile, Header] | None:
    """Open a cache; None if it is not there, not whole, changed, or of another version."""
    try:
        content = load(path.with_suffix(".header"), sealed=True)
        shape, labels = tuple(map(int, content["shape"])), content["labels"]
        if content["version"] != VERSION or labels.shape != shape[:1] or min(shape) < 1:
            return None
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != (math.prod(shape), content["written"]):
                return None
            pixels = np.memmap(file, np.uint8, mode="r", shape=shape)
    except (AbsldError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return ImageFile(path, pixels), Header(shape, labels, str(content["description"]))


def open_or_write(
    path: Path, write: Callable[[IO[bytes]], Header], observer: Observer
) -> tuple[ImageFile, Header]:
    """Open a cache, which `write` fills if there is none: one process writes, others wait for it.

    Raises DataError if it cannot be written.
    """
    if found := open_cache(path):
        return found
    header_path = path.with_suffix(".header")
    try:
        with locked(path.with_suffix(".lock"), observer):
            if not (found := open_cache(path)):
                header_path.unlink(missing_ok=True)
                with replacing(path) as file:
                    header = write(file)
                written = path.stat().st_mtime_ns
                save(asdict(header) | {"version": VERSION, "written": written}, header_path)
                found = open_cache(path)
    except CheckpointError as error:
        raise DataError(f"image cache: {error}", ELSEWHERE) from error
    except OSError as error:
        raise DataError(f"image cache: {path}: {error.strerror or error}", ELSEWHERE) from error
    if not found:
        raise DataError(f"image cache: {path} cannot be read again", ELSEWHERE)
    return found


@contextmanager
def locked(path: Path, observer: Observer) -> Iterator[None]:
    """Hold the lock of a cache, after the process that holds it now."""
    folder = path.parent
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: a link, not a folder")
    make_folder(folder)
    open_regular(path, "ab").close()  # the library may write through links
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        observer.wait(f"waiting for another process, which decodes these images: {path}")
        lock.acquire()
    except NotImplementedError as error:
        raise OSError(f"its file system has no file locks ({error})") from error
    try:
        yield
    finally:
        lock.release()
