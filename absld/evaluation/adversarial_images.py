"""The adversarial images of an evaluation in a file: all of them, or an example of each class.

While the attacks run, images go to a plain file of float32 rows: memory stays bounded, and an
interrupted evaluation continues. docs/evaluation.md describes the file that is made of them.
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.dataset import ImageSet
from absld.errors import CheckpointError, UsageError
from absld.evaluation.evaluate import PENDING, Evaluation
from absld.evaluation.predictions import predict
from absld.progress import Observer
from absld.storage.files import raw_bytes, replacing
from absld.storage.opening import open_regular
from absld.storage.safetensors_files import Column, opened_safetensors, write_columns

NAME, PARTIAL = "adversarial.safetensors", "adversarial.partial"
FORMAT = "absld-adversarial-1"
CANDIDATES = 16  # images of a class among which its example is chosen
MOST_CANDIDATES = 2**26  # bytes of those of all classes
EXAMPLES = 20  # classes with an example: the worst ones
FROM_EVALUATION = ("norm", "epsilon", "seed", "weights_sha256", "images_sha256")  # its identity
FLAG = "--save-adversarial"


class Recorder:
    """The file that takes images while the attacks run; as a context, it is open.

    positions: those of its images in the evaluation, ascending (m,). total: images of the evaluation.
    """

    def __init__(
        self, path: Path, *, positions: Int[Tensor, " m"], total: int, image_shape: Sequence[int]
    ) -> None:
        self.path, self.positions, self.image_shape = path, positions, tuple(image_shape)
        self.row_bytes = 4 * math.prod(image_shape)
        self.row_of = torch.full((total,), -1)
        self.row_of[positions] = torch.arange(len(positions))

    def make(self) -> None:
        """Make the file anew."""
        with replacing(self.path) as file:
            file.truncate(len(self.positions) * self.row_bytes)

    def __enter__(self) -> "Recorder":
        self.file: IO[bytes] = open_regular(self.path, "r+b")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def keep(
        self,
        evaluation: Evaluation,
        row: int,
        chosen: Int[Tensor, " b"],
        images: Float[Tensor, "b ch h w"],
    ) -> None:
        """Store the images of a batch, but for those of which an earlier attack broke another."""
        rows = self.row_of[chosen]
        kept = (rows >= 0) & evaluation.correct[:row, chosen].all(0)
        for at, image in zip(
            rows[kept].tolist(), images[kept.to(images.device)].cpu(), strict=True
        ):
            self.file.seek(at * self.row_bytes)
            self.file.write(raw_bytes(image.float()))

    def flush(self) -> None:
        """Bring the images to the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def images(self, rows: Int[Tensor, " k"], size: int) -> Iterator[Float[Tensor, "b ch h w"]]:
        """Read images, `size` at a time."""
        for part in torch.split(rows, size):
            content = bytearray()
            for at in part.tolist():
                self.file.seek(at * self.row_bytes)
                content += self.file.read(self.row_bytes)
            if len(content) < len(part) * self.row_bytes:
                raise CheckpointError(f"{self.path}: ends too early", "remove it")
            images = torch.frombuffer(content, dtype=torch.float32)
            yield images.view(len(part), *self.image_shape)


# --- Before the attacks ---


def begin_recording(
    folder: Path,
    data: ImageSet,
    index: Int[Tensor, " n"],
    before: Int[Tensor, "a n"] | None,
    identity: Mapping[str, Any],
    observer: Observer,
    *,
    save_all: bool,
) -> tuple[Recorder | None, Int[Tensor, "a n"] | None]:
    """Return what is to take the images, or None, and the predictions to continue from.

    index: numbers of the images of the evaluation. before: predictions of an earlier command.
    identity: what decides the evaluation. save_all: whether all adversarial images are to be stored;
    they can be missing for `before`: then the attacks run again.

    Raises UsageError if the disk is too small for all.
    """
    stored, partial = folder / NAME, folder / PARTIAL
    if stored.exists() and (not save_all or count_stored(stored, identity) == len(index)):
        partial.unlink(missing_ok=True)  # it would lack the images of what runs now
        return None, before
    recorder = functools.partial(Recorder, partial, total=len(index), image_shape=data.image_shape)
    found = partial.stat().st_size if before is not None and partial.exists() else -1
    everything = recorder(positions=torch.arange(len(index)))
    whole = len(index) * everything.row_bytes
    chosen = everything
    if not save_all and found != whole:
        chosen = recorder(positions=candidates(data.labels.cpu()[index], everything.row_bytes))
    if found == len(chosen.positions) * chosen.row_bytes:
        return chosen, before
    if before is not None and not save_all:  # of an earlier version, which kept none
        partial.unlink(missing_ok=True)
        return None, before
    if save_all:
        announce(folder, 2 * whole + whole // 4 * clean_dtype(data).itemsize, whole, observer)
        if before is not None and (before != PENDING).any():
            observer.note("the attacks run again: adversarial images were not stored before")
    chosen.make()
    return chosen, None


def announce(folder: Path, peak: int, whole: int, observer: Observer) -> None:
    """Say how much will be stored. Raises UsageError if the disk has no room for it."""
    free = shutil.disk_usage(folder).free
    texts = [f"{size / 1e6:,.1f} MB" for size in (peak, free)]
    if peak > free:
        raise UsageError(
            f"{FLAG} needs {texts[0]}, and {folder} has {texts[1]}",
            "--examples N stores fewer images, --out FOLDER elsewhere",
        )
    observer.note(
        f"adversarial images: {(peak - whole) / 1e6:,.1f} MB in {folder / NAME}, "
        f"{texts[0]} until they are complete"
    )


def candidates(labels: Int[Tensor, " n"], row_bytes: int) -> Int[Tensor, " m"]:
    """Return the positions of the first images of each class, as many as are kept in a small file."""
    rank = torch.empty_like(labels)
    for k in set(labels.tolist()):
        of_class = labels == k
        rank[of_class] = torch.arange(int(of_class.sum()))
    first = rank.argsort(stable=True)
    first = first[rank[first] < CANDIDATES]
    return first[: max(MOST_CANDIDATES // row_bytes, 1)].sort().values


def count_stored(path: Path, identity: Mapping[str, Any]) -> int:
    """Return the number of images in a file. Raises CheckpointError for another file."""
    try:
        with open_regular(path) as file, opened_safetensors(file, path) as content:
            check_origin(content.metadata() or {}, identity, ["clean", *identity["attacks"]])
            return int(content.get_slice("labels").get_shape()[0])
    except Exception as error:  # the library has its own
        raise CheckpointError(f"{path}: {error}", "remove it: it is made anew") from error


def check_origin(
    metadata: Mapping[str, str], known: Mapping[str, Any], attacks: Sequence[str]
) -> None:
    """Raise ValueError if a file is not of an evaluation.

    metadata: of the file. known: what decides the evaluation. attacks: their names, clean first.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"its format is not {FORMAT}")
    expected = {name: known[name] for name in FROM_EVALUATION} | {"attacks": attacks}
    for name, value in expected.items():
        if json.loads(metadata.get(name, "null")) != value:
            raise ValueError(f"it is of another evaluation, by {name}")


# --- After the attacks ---


def finish_recording(
    recorder: Recorder,
    model: nn.Module,
    data: ImageSet,
    evaluation: Evaluation,
    identity: Mapping[str, Any],
    batch_size: int,
    observer: Observer,
    *,
    save_all: bool,
) -> None:
    """Make the file of the adversarial images, of all or of examples, and remove the one of rows."""
    attack, predictions = decisive_attacks(evaluation)
    positions = recorder.positions
    labels, attack, predictions = (x[positions] for x in (evaluation.labels, attack, predictions))
    rows = torch.arange(len(positions))
    if not save_all:
        worst_first = evaluation.robust_accuracy.nan_to_num(2.0).argsort(stable=True).tolist()
        rows = torch.tensor(example_rows(labels, attack, predictions, worst_first)[:EXAMPLES])
    stored = recorder.path.with_name(NAME)
    index = evaluation.index[positions[rows]]
    shape = (len(rows), *recorder.image_shape)
    texts = {name: json.dumps(identity[name]) for name in FROM_EVALUATION}
    texts |= {"format": FORMAT, "attacks": json.dumps(evaluation.attacks)}
    with replacing(stored) as file:
        columns = {
            name: Column(torch.int64, (len(rows),), [values])
            for name, values in (
                ("index", index),
                ("labels", labels[rows]),
                ("attack", attack[rows]),
                ("predictions", predictions[rows]),
            )
        }
        columns["images"] = Column(torch.float32, shape, recorder.images(rows, batch_size))
        dtype = clean_dtype(data)
        clean = (data.rows(part).to(dtype).cpu() for part in torch.split(index, batch_size))
        columns["clean"] = Column(dtype, shape, clean)
        write_columns(file, columns, texts)
        if save_all:
            count_changed(recorder, model, data, predictions, batch_size, observer)
    recorder.file.close()
    recorder.path.unlink()
    if save_all:
        observer.note(f"adversarial images: {stored}")


def decisive_attacks(evaluation: Evaluation) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return for each image the row that broke it first, else the last one; and its prediction."""
    wrong = ~evaluation.correct
    last = len(evaluation.attacks) - 1
    row = torch.where(wrong.any(0), wrong.int().argmax(0), last)
    return row, evaluation.predictions.gather(0, row[None])[0]


def example_rows(
    labels: Int[Tensor, " m"],
    attack: Int[Tensor, " m"],
    predictions: Int[Tensor, " m"],
    classes: Sequence[int],
) -> list[int]:
    """Return a row for each of the classes that has one.

    It is the first that an attack broke; without one the first robust one; else the first.
    """
    wrong = predictions != labels
    rank = torch.where(wrong & (attack > 0), 0, torch.where(wrong, 2, 1))
    best = rank.argsort(stable=True)
    of_class = dict(reversed([(int(labels[row]), row) for row in best.tolist()]))
    return [of_class[k] for k in classes if k in of_class]


def count_changed(
    recorder: Recorder,
    model: nn.Module,
    data: ImageSet,
    predictions: Int[Tensor, " n"],
    batch_size: int,
    observer: Observer,
) -> None:
    """Predict the stored images once more, and say if there are other predictions."""
    observer.wait("predicting the stored images once more")
    images = recorder.images(torch.arange(len(predictions)), batch_size)
    with frozen_eval(model), torch.no_grad():
        again = torch.cat(
            [predict(model, x.to(data.device), "of stored images").cpu() for x in images]
        )
    if changed := int((again != predictions).sum()):
        observer.note(
            f"{changed:,} of {len(predictions):,} stored images have another prediction in other "
            "batches: those of the evaluation are stored"
        )


def clean_dtype(data: ImageSet) -> torch.dtype:
    """Return the type in which clean images are stored: their own, or float32."""
    return torch.uint8 if data.dtype == torch.uint8 else torch.float32
