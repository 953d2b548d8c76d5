"""The bank of a teacher's logits: a teacher that sees clean views only need see each view once.

A crop with padding p and a mirror has 2 (2p+1)^2 views of an image. The bank is a memory-mapped
file with a row for each, filled as views come up or ahead of time, and shared by all runs with the
same teacher and images. Each row carries a checksum: a row that was never written, was written in
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
CHECK_OF_ZEROS = 0x5EED  # not 0, or an empty row would be a row of zeros
MODULUS = 2**32
# Matrix products of fewer rows are done by other routines, with other rounding: logits from a batch
# of at least so many images are the same in any company.
FEWEST = 16


def rows_of(images: int, padding: int, flip: float) -> int:
    """How many rows the bank of a training has: without mirrors half of the views."""
    views = view_count(images, padding)
    return views if flip else views // 2


def bank_bytes(rows: int, num_classes: int) -> int:
    """The size of a bank's file: float32 logits and a checksum for each row."""
    return 4 * rows * (num_classes + 1)


def checksums(words: Int[Tensor, "n c"]) -> Int[Tensor, " n"]:
    """A 32-bit checksum of each row of 32-bit words.

    The words are weighed by odd numbers, which have inverses modulo 2^32: a change of any one word
    changes it.
    """
    weights = 2 * torch.arange(words.shape[1], device=words.device) * 40503 + 1
    total = ((words.long() % MODULUS) * (weights % 65536)) % MODULUS
    return (total.sum(1) + CHECK_OF_ZEROS) % MODULUS


class LogitBank:
    """The rows of a bank. `rows` (images * views, C + 1) int32: the bits of the logits, and their
    checksum."""

    def __init__(self, rows: Int[Tensor, "v c"]) -> None:
        self.rows = rows

    @classmethod
    def open(cls, folder: Path, about: dict[str, Any], rows: int, num_classes: int) -> "LogitBank":
        """The bank of `about` (plain values: digests of teacher and images, and the like) in
        `folder`, made if it is not there. Raises CheckpointError if the file is of another size.
        """
        path = folder / f"{key_of(about)}.bank"
        folder.mkdir(parents=True, exist_ok=True)
        size = bank_bytes(rows, num_classes)
        try:
            path.open("xb").close()
        except FileExistsError:
            pass
        else:  # of two processes that begin at once, one says what it is
            write_text(path.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
        if path.stat().st_size == 0:
            reserve(path, size)
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, needed are {size}", "remove it"
            )
        mapped = torch.from_file(
            str(path), shared=True, size=rows * (num_classes + 1), dtype=torch.int32
        )
        return cls(mapped.view(rows, num_classes + 1))

    def read(self, index: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n c"], Bool[Tensor, " n"]]:
        """The logits of rows, and whether each is there and whole."""
        rows = self.rows[index.to(self.rows.device)]
        words = rows[:, :-1].contiguous()
        whole = checksums(words) == rows[:, -1].long() % MODULUS
        return words.view(torch.float32), whole

    def write(self, index: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> None:
        """Remember the logits of rows."""
        words = logits.detach().to(self.rows.device).contiguous().view(torch.int32)
        check = checksums(words)
        check = torch.where(check >= MODULUS // 2, check - MODULUS, check).to(torch.int32)
        self.rows[index.to(self.rows.device)] = torch.cat([words, check.unsqueeze(1)], dim=1)

    def filled(self, chunk: int = 2**16) -> float:
        """The share of rows that are there and whole."""
        parts = torch.split(torch.arange(len(self.rows)), chunk)
        return sum([int(self.read(part)[1].sum()) for part in parts]) / len(self.rows)


def reserve(path: Path, size: int) -> None:
    """Give a file its size, and the disk for it: a mapped file has no error for a full disk, the
    process would be killed. Raises OSError, and the file is empty again."""
    with path.open("r+b") as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError:
            file.truncate(0)
            raise


class RememberingTeacher(nn.Module):
    """A frozen teacher that is asked for a clean view only if its bank has not got it.

    It knows clean views by the tensor: `about_to_see` announces the next batch; any other images,
    such as attacked ones, go to the teacher itself.
    """

    def __init__(self, teacher: nn.Module, bank: LogitBank) -> None:
        super().__init__()
        self.teacher, self.bank = teacher, bank
        self.announced: tuple[Tensor, Tensor] | None = None
        self.held: Tensor | None = None  # all logits, on an accelerator

    def hold(self, device: torch.device) -> None:
        """Keep the logits on the device if all are there: checked once, and then no step waits for
        the device to know whether one is missing."""
        if self.bank.filled() == 1:
            self.held = self.bank.read(torch.arange(len(self.bank.rows)))[0].to(device)

    def about_to_see(self, x_nat: Tensor, views: Int[Tensor, " n"]) -> None:
        """The next clean images, and the numbers of their views (`Views.numbers`)."""
        self.announced = x_nat, views

    def forward(self, x: Tensor) -> Tensor:
        if self.announced is None or x is not self.announced[0]:
            logits: Tensor = self.teacher(x)
            return logits
        views = self.announced[1]
        if self.held is not None:
            return self.held[views]
        known, whole = self.bank.read(views)
        if whole.all():
            return known.to(x.device)
        missing = int((~whole).sum())
        # Images that are known keep a few that are not company.
        asked = whole.long().argsort(stable=True)[: max(missing, FEWEST)].sort().values
        with torch.no_grad():
            fresh = self.teacher(x[asked.to(x.device)]).float().to(known.device)
        fresh, asked = fresh[~whole[asked]], asked[~whole[asked]]  # without the company
        sound = fresh.isfinite().all(1)  # no other is worth remembering
        self.bank.write(views.to(asked.device)[asked][sound], fresh[sound])
        known[asked] = fresh
        return known.to(x.device)


def open_bank(
    folder: Path, teacher: nn.Module, views: Views, *, flip: float, precision: str
) -> LogitBank:
    """The bank of a teacher's logits of all views of a set of images, in `folder`. teacher: as it
    is called, in its precision."""
    # The same weights in other code, or with other rounding, are another teacher.
    with frozen_eval(teacher), torch.no_grad():
        outputs = teacher(views.of_numbers(torch.arange(2, device=views.data.labels.device)))
    rows = rows_of(len(views.data), views.padding, flip)
    about = {
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
    return LogitBank.open(folder, about, rows, views.data.num_classes)


class Bank(NamedTuple):
    """Where banks are, and how many GiB one may take."""

    folder: Path
    gib: float

    def remembering(
        self, teacher: nn.Module, views: Views, *, flip: float, precision: str
    ) -> nn.Module:
        """The teacher with its bank where that fits, and logits are float32; else as it is."""
        rows = rows_of(len(views.data), views.padding, flip)
        size = bank_bytes(rows, views.data.num_classes)
        if size > self.gib * 2**30 or next(teacher.parameters()).dtype != torch.float32:
            return teacher
        bank = open_bank(self.folder, teacher, views, flip=flip, precision=precision)
        remembering = RememberingTeacher(teacher, bank)
        device = views.data.labels.device
        if device.type == "cuda":
            remembering.hold(device)  # pragma: no cover  # tried on a CPU, see test_bank.py
        return remembering


def fill(teacher: RememberingTeacher, views: Views, batch_size: int) -> Iterator[tuple[int, int]]:
    """Fill what is missing in a bank; yields the views done, and how many there are."""
    total, size = len(teacher.bank.rows), max(batch_size, FEWEST)
    for end in range(size, total + size, size):
        end = min(end, total)
        # The last batch, too, is a whole one: it has company of views that are known.
        part = torch.arange(max(end - size, 0), end, device=views.data.labels.device)
        x_nat = views.of_numbers(part)
        teacher.about_to_see(x_nat, part)
        teacher(x_nat)
        yield end, total
