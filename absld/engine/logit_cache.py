"""The cache of a teacher's logits: a teacher of clean images evaluates each view once.

A crop with padding p and a mirror image has 2 (2p+1)^2 views of an image. The cache is a memory-
mapped file with a row for each view, filled in training or ahead of it, and shared by all runs with
the same teacher and images. Each row has a checksum: a row that was never written, was written in
part, or has changed since, is computed again. So nothing has to be locked.

A CPU reads each batch from the file. An accelerator would wait for that: there, the cache is used
when it is whole, and all of it is held in the memory of the device.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.augmentation import Views, view_count
from absld.errors import CheckpointError
from absld.storage.files import digest, key_of, write_text
from absld.storage.opening import make_folder, open_regular

VERSION = 2
CHECKSUM_OF_ZEROS = 0x5EED  # not 0, or a row that was never written would be a valid one
MODULUS = 2**32
# Matrix products of fewer rows are done by other routines, with other rounding: logits from a batch
# of at least this many images do not depend on the other images in it.
MIN_BATCH = 16


def cache_rows(images: int, padding: int, flip: float) -> int:
    """Return the number of a cache's rows: without mirror images half of the views."""
    views = view_count(images, padding)
    return views if flip else views // 2


def cache_bytes(rows: int, num_classes: int) -> int:
    """Return the size of a cache's file: float32 logits and a checksum for each row."""
    return 4 * rows * (num_classes + 1)


def checksums(words: Int[Tensor, "n c"]) -> Int[Tensor, " n"]:
    """Compute a 32-bit checksum of each row of 32-bit words.

    The words are weighted by odd numbers, which have inverses modulo 2^32: a change of any one word
    changes the checksum.
    """
    weights = 2 * torch.arange(words.shape[1], device=words.device) * 40503 + 1
    total = ((words.long() % MODULUS) * (weights % 65536)) % MODULUS
    return (total.sum(1) + CHECKSUM_OF_ZEROS) % MODULUS


class LogitCache:
    """The rows of a cache: (views, C + 1) int32, the bits of the logits and their checksum."""

    def __init__(self, rows: Int[Tensor, "v c"]) -> None:
        self.rows = rows

    @classmethod
    def open(
        cls, folder: Path, identity: dict[str, Any], rows: int, num_classes: int
    ) -> "LogitCache":
        """Open the cache in `folder` of an identity (plain values, such as digests of teacher and
        images); create it if there is none. Raises CheckpointError if the file has another size.
        """
        path = folder / f"{key_of(identity)}.cache"
        make_folder(folder)
        size = cache_bytes(rows, num_classes)
        try:
            path.open("xb").close()
        except FileExistsError:
            pass
        else:  # of two processes that start at once, one writes the identity
            write_text(path.with_suffix(".json"), json.dumps(identity, indent=1) + "\n")
        open_regular(path, "r+b").close()  # torch would write through a link
        if path.stat().st_size == 0:
            reserve(path, size)
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, expected {size}", "remove it"
            )
        words = rows * (num_classes + 1)
        mapped = torch.from_file(str(path), shared=True, size=words, dtype=torch.int32)
        return cls(mapped.view(rows, num_classes + 1))

    def read(self, index: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n c"], Bool[Tensor, " n"]]:
        """Return the logits of rows, and whether each row is valid."""
        rows = self.rows[index]
        words = rows[:, :-1].contiguous()
        valid = checksums(words) == rows[:, -1].long() % MODULUS
        return words.view(torch.float32), valid

    def write(self, index: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> None:
        """Store the logits of rows, except for those that are not finite: NaN is not worth storing."""
        finite = logits.isfinite().all(1)
        words = logits[finite].contiguous().view(torch.int32)
        check = checksums(words)
        check = torch.where(check >= MODULUS // 2, check - MODULUS, check).to(torch.int32)
        self.rows[index[finite]] = torch.cat([words, check.unsqueeze(1)], dim=1)

    def read_whole(self, chunk: int = 2**16) -> Float[Tensor, "v c"] | None:
        """Return the logits of all rows; None, as soon as it is known, if a row is not valid."""
        logits = torch.empty(len(self.rows), self.rows.shape[1] - 1)
        for index in torch.split(torch.arange(len(self.rows)), chunk):
            logits[index], valid = self.read(index)
            if not valid.all():
                return None
        return logits


def reserve(path: Path, size: int) -> None:
    """Give a file its size and its blocks on the disk.

    A full disk is an error here; in the mapped file, it would kill the process. Raises OSError, and
    leaves the file empty.
    """
    with open_regular(path, "r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.truncate(0)
            raise


class CachedTeacher(nn.Module):
    """A frozen teacher that caches its logits for clean augmented views. Images are on the CPU."""

    def __init__(self, teacher: nn.Module, cache: LogitCache) -> None:
        super().__init__()
        self.teacher, self.cache = teacher, cache

    def forward(self, x: Tensor, views: Int[Tensor, " n"] | None = None) -> Tensor:
        """Return the teacher's logits (N,C).

        views: the numbers (`Views.numbers`) of clean views, which may be cached; None for other
        images, such as attacked ones.
        """
        logits: Tensor = self.teacher(x) if views is None else self.of_views(x, views)
        return logits

    def of_views(self, x: Tensor, views: Int[Tensor, " n"]) -> Tensor:
        """Return the logits of clean views; the teacher evaluates those that the cache lacks."""
        cached, valid = self.cache.read(views)
        if valid.all():
            return cached
        # A few missing images are evaluated together with others, up to MIN_BATCH.
        count = max(int((~valid).sum()), MIN_BATCH)
        batch = valid.long().argsort(stable=True)[:count].sort().values
        with torch.no_grad():
            logits = self.teacher(x[batch]).float()
        missing = ~valid[batch]
        logits, batch = logits[missing], batch[missing]
        self.cache.write(views[batch], logits)
        cached[batch] = logits
        return cached


class DeviceCachedTeacher(CachedTeacher):
    """A teacher on an accelerator, with a cache that is used when it is whole.

    Until then the teacher evaluates whole batches. There, the last digits of a logit may depend on
    the size of the batch: all rows come from whole batches of the size that the cache is made for.
    """

    def __init__(self, teacher: nn.Module, cache: LogitCache, device: torch.device) -> None:
        super().__init__(teacher, cache)
        self.device = device
        self.held: Tensor | None = None  # the logits of all views, on the device
        self.evaluated: list[tuple[Tensor, Tensor]] = []  # views and logits, on the device

    def of_views(self, x: Tensor, views: Int[Tensor, " n"]) -> Tensor:
        """Return the logits of a whole batch of clean views, without a wait for the device."""
        if self.held is not None:
            return self.held[views]
        with torch.no_grad():
            logits: Tensor = self.teacher(x).float()
        self.evaluated.append((views, logits))
        return logits

    def hold_if_whole(self) -> None:
        """Copy the cache to the device if it is whole; nothing to do if it is there."""
        if self.held is None and (logits := self.cache.read_whole()) is not None:
            self.held = logits.to(self.device)

    def store_evaluated(self) -> None:
        """Write the logits that were evaluated since the last time to the file."""
        if self.evaluated:
            views, logits = (torch.cat(parts).cpu() for parts in zip(*self.evaluated, strict=True))
            missing = ~self.cache.read(views)[1]
            self.cache.write(views[missing], logits[missing])
            self.evaluated = []


@contextmanager
def cached_epoch(teacher: nn.Module | None) -> Iterator[None]:
    """Take the steps of an epoch inside: an accelerator reads and writes the file before and after.

    If the epoch is interrupted, the logits that were evaluated in it are not stored.
    """
    if not isinstance(teacher, DeviceCachedTeacher):
        yield
        return
    teacher.evaluated = []
    teacher.hold_if_whole()
    yield
    teacher.store_evaluated()


def open_logit_cache(
    folder: Path,
    teacher: nn.Module,
    views: Views,
    *,
    flip: float,
    precision: str,
    batch_size: int,
) -> LogitCache:
    """Open the cache of a teacher's logits of all views.

    teacher: as it is called, in `precision`; flip: probability of a mirror image; batch_size: of
    this process, which decides rounding on an accelerator.
    """
    device = views.data.device
    rows = cache_rows(len(views.data), views.padding, flip)
    on_cpu = device.type == "cpu"
    # The same weights in other code, or with other rounding, are another teacher.
    numbers = torch.arange(2 if on_cpu else batch_size, device=device) % rows
    with frozen_eval(teacher), torch.no_grad():
        outputs = teacher(views.of_numbers(numbers))
    identity = {
        "version": VERSION,
        # Without names, which depend on what the teacher is wrapped in.
        "teacher": digest({str(n): t for n, t in enumerate(teacher.state_dict().values())}),
        "outputs": digest({"outputs": outputs}),
        "images": views.data.digest(),
        "padding": views.padding,
        "rows": rows,
        "precision": precision,
        "device": device.type,
        "torch": torch.__version__,
    } | ({} if on_cpu else {"batch_size": batch_size})
    return LogitCache.open(folder, identity, rows, views.data.num_classes)


def cached_teacher(teacher: nn.Module, cache: LogitCache, device: torch.device) -> CachedTeacher:
    """Return a teacher on a device with its cache."""
    if device.type == "cpu":
        return CachedTeacher(teacher, cache)
    return DeviceCachedTeacher(teacher, cache, device)


class LogitCacheSettings(NamedTuple):
    """The folder of the caches, and the largest size of one in GiB."""

    folder: Path
    gib: float

    def wrap(
        self, teacher: nn.Module, views: Views, *, flip: float, precision: str, batch_size: int
    ) -> nn.Module:
        """Return the teacher with its cache, or as it is if that does not fit or is not float32.

        batch_size: of this process.
        """
        rows = cache_rows(len(views.data), views.padding, flip)
        size = cache_bytes(rows, views.data.num_classes)
        is_float32 = all(p.dtype == torch.float32 for p in teacher.parameters())
        if size > self.gib * 2**30 or not is_float32:
            return teacher
        cache = open_logit_cache(
            self.folder, teacher, views, flip=flip, precision=precision, batch_size=batch_size
        )
        return cached_teacher(teacher, cache, views.data.device)


def fill(teacher: CachedTeacher, views: Views, batch_size: int) -> Iterator[tuple[int, int]]:
    """Evaluate all views that the cache lacks; yield the number of views done, and of all.

    batch_size: on an accelerator, that of the cache.
    """
    total, on_device = len(teacher.cache.rows), isinstance(teacher, DeviceCachedTeacher)
    size = batch_size if on_device else max(batch_size, MIN_BATCH)
    for start in range(0, total, size):
        # The last batch is a whole one, too: it goes on with views that are cached already.
        index = torch.arange(start, start + size) % total
        if not teacher.cache.read(index)[1].all():
            numbers = index.to(views.data.device)
            teacher(views.of_numbers(numbers), numbers)
        if isinstance(teacher, DeviceCachedTeacher):
            teacher.store_evaluated()
        yield min(start + size, total), total
