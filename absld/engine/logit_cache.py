"""The cache of a teacher's logits: a teacher of clean images evaluates each view once.

A crop with padding p and a mirror image has 2 (2p+1)^2 views of an image. The cache is a memory-
mapped file with a row for each view, filled in training or ahead of it, and shared by all runs with
the same teacher and images. Each row has a checksum: a row that was never written, was written in
part, or has changed since, is computed again. So nothing has to be locked.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.augmentation import Views, view_count
from absld.errors import CheckpointError
from absld.storage.files import digest, key_of, write_text

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
        folder.mkdir(parents=True, exist_ok=True)
        size = cache_bytes(rows, num_classes)
        try:
            path.open("xb").close()
        except FileExistsError:
            pass
        else:  # of two processes that start at once, one writes the identity
            write_text(path.with_suffix(".json"), json.dumps(identity, indent=1) + "\n")
        if path.stat().st_size == 0:
            reserve(path, size)
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, needed are {size}", "remove it"
            )
        words = rows * (num_classes + 1)
        mapped = torch.from_file(str(path), shared=True, size=words, dtype=torch.int32)
        return cls(mapped.view(rows, num_classes + 1))

    def read(self, index: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n c"], Bool[Tensor, " n"]]:
        """Return the logits of rows, and whether each row is valid."""
        rows = self.rows[index.to(self.rows.device)]
        words = rows[:, :-1].contiguous()
        valid = checksums(words) == rows[:, -1].long() % MODULUS
        return words.view(torch.float32), valid

    def write(self, index: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> None:
        """Store the logits of rows."""
        words = logits.detach().to(self.rows.device).contiguous().view(torch.int32)
        check = checksums(words)
        check = torch.where(check >= MODULUS // 2, check - MODULUS, check).to(torch.int32)
        self.rows[index.to(self.rows.device)] = torch.cat([words, check.unsqueeze(1)], dim=1)

    def filled(self, chunk: int = 2**16) -> float:
        """Return the fraction of rows that are valid."""
        parts = torch.split(torch.arange(len(self.rows)), chunk)
        return sum([int(self.read(part)[1].sum()) for part in parts]) / len(self.rows)


def reserve(path: Path, size: int) -> None:
    """Give a file its size and its blocks on the disk.

    A full disk is an error here; in the mapped file, it would kill the process. Raises OSError, and
    leaves the file empty.
    """
    with path.open("r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.truncate(0)
            raise


class CachedTeacher(nn.Module):
    """A frozen teacher that caches its logits for clean augmented views."""

    def __init__(self, teacher: nn.Module, cache: LogitCache) -> None:
        super().__init__()
        self.teacher, self.cache = teacher, cache
        self.preloaded: Tensor | None = None  # the logits of all views, on an accelerator

    def preload(self, device: torch.device) -> None:
        """Copy the logits to the device if all are valid: no step waits for it to check them."""
        if self.cache.filled() == 1:
            self.preloaded = self.cache.read(torch.arange(len(self.cache.rows)))[0].to(device)

    def forward(self, x: Tensor, views: Int[Tensor, " n"] | None = None) -> Tensor:
        """Return the teacher's logits (N,C).

        views: the numbers (`Views.numbers`) of clean views, which the teacher evaluates only where
        the cache lacks them; None for other images, such as attacked ones.
        """
        if views is None:
            logits: Tensor = self.teacher(x)
            return logits
        if self.preloaded is not None:
            return self.preloaded[views]
        cached, valid = self.cache.read(views)
        if not valid.all():
            self.evaluate_missing(x, views.to(cached.device), cached, valid)
        return cached.to(x.device)

    def evaluate_missing(self, x: Tensor, views: Tensor, cached: Tensor, valid: Tensor) -> None:
        """Put the teacher's logits where they are not valid, in `cached` and in the file."""
        # A few missing images are evaluated together with others, up to MIN_BATCH.
        count = max(int((~valid).sum()), MIN_BATCH)
        batch = valid.long().argsort(stable=True)[:count].sort().values
        with torch.no_grad():
            logits = self.teacher(x[batch.to(x.device)]).float().to(cached.device)
        missing = ~valid[batch]
        logits, batch = logits[missing], batch[missing]
        finite = logits.isfinite().all(1)  # NaN is not worth storing
        self.cache.write(views[batch][finite], logits[finite])
        cached[batch] = logits


def open_logit_cache(
    folder: Path, teacher: nn.Module, views: Views, *, flip: float, precision: str
) -> LogitCache:
    """Open the cache of a teacher's logits of all views. teacher: as it is called, in `precision`;
    flip: probability of a mirror image."""
    # The same weights in other code, or with other rounding, are another teacher.
    with frozen_eval(teacher), torch.no_grad():
        outputs = teacher(views.of_numbers(torch.arange(2, device=views.data.labels.device)))
    rows = cache_rows(len(views.data), views.padding, flip)
    identity = {
        "version": VERSION,
        "teacher": digest(teacher.state_dict()),
        "outputs": digest({"outputs": outputs}),
        "images": views.data.digest(),
        "padding": views.padding,
        "rows": rows,
        "precision": precision,
        "device": views.data.labels.device.type,
        "torch": torch.__version__,
    }
    return LogitCache.open(folder, identity, rows, views.data.num_classes)


class LogitCacheSettings(NamedTuple):
    """The folder of the caches, and the largest size of one in GiB."""

    folder: Path
    gib: float

    def wrap(self, teacher: nn.Module, views: Views, *, flip: float, precision: str) -> nn.Module:
        """Return the teacher with its cache, or as it is if that does not fit or is not float32."""
        rows = cache_rows(len(views.data), views.padding, flip)
        size = cache_bytes(rows, views.data.num_classes)
        if size > self.gib * 2**30 or next(teacher.parameters()).dtype != torch.float32:
            return teacher
        cache = open_logit_cache(self.folder, teacher, views, flip=flip, precision=precision)
        cached = CachedTeacher(teacher, cache)
        device = views.data.labels.device
        if device.type == "cuda":
            cached.preload(device)  # pragma: no cover  # tested on a CPU in test_logit_cache.py
        return cached


def fill(teacher: CachedTeacher, views: Views, batch_size: int) -> Iterator[tuple[int, int]]:
    """Evaluate all views that the cache lacks; yield the number of views done, and of all."""
    total, size = len(teacher.cache.rows), max(batch_size, MIN_BATCH)
    for end in range(size, total + size, size):
        end = min(end, total)
        # The last batch is a whole one, too: it begins with views that are cached already.
        numbers = torch.arange(max(end - size, 0), end, device=views.data.labels.device)
        teacher(views.of_numbers(numbers), numbers)
        yield end, total
