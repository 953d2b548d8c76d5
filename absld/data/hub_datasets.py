"""Image data sets of the Hugging Face Hub, `hf:owner/name[@revision][/subset]`.

The library `datasets` fetches them into its own cache, and finds them there without a network
(HF_HUB_OFFLINE, HF_DATASETS_OFFLINE). No code of a repository is run: of version 4 or newer, it
reads files of data only, and here only those of formats that hold images.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from absld.config.datasets import Columns, parse_hub_dataset
from absld.config.imports import HUB, import_extra
from absld.data.dataset import InMemoryImages
from absld.data.decoding import Form, decode_all
from absld.data.image_files import open_encoded
from absld.data.mapped import MappedImages
from absld.data.placement import Placement
from absld.data.readers import DatasetReader
from absld.errors import CheckpointError, DataError, UsageError
from absld.storage.opening import read_bytes
from absld.text import first_of, printable

BUILDERS = ("arrow", "cache", "imagefolder", "parquet", "webdataset")
TESTS = ("test", "validation", "valid", "val", "dev")  # splits: the first that has labels
SHOWN = 10  # names in a message


class HubImages:
    """Images and labels of a split, by index."""

    def __init__(self, rows: Any, column: str, labels: Sequence[int]) -> None:
        self.rows, self.column, self.labels = rows, column, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Any:
        """Return an image of PIL and its label. Raises ValueError and whatever Pillow raises."""
        cell = self.rows[index][self.column] or {}
        content, path = cell.get("bytes"), cell.get("path")
        if content is None and path:
            content = read_bytes(Path(path))
        if content is None:
            raise ValueError("no image")
        return open_encoded(content), self.labels[index]


def load_hub(
    name: str, columns: Columns, form: Form, parts: Sequence[str], placement: Placement
) -> list[InMemoryImages | MappedImages]:
    """Load the training or test images of a data set on the hub.

    Raises:
        UsageError: for its name, or without the library `datasets`.
        DataError: it cannot be fetched, or has no such images.
    """
    placement.observer.note(f"{name}: by the Hugging Face Hub, or from its cache")
    builder = prepare(name)
    if builder.hash:
        placement.observer.note(f"{name}: commit {builder.hash}")
    splits = builder.as_dataset()
    image, label = find_columns(name, columns, builder.info.features)
    classes = class_names(splits, label)
    number_of = {value: number for number, value in enumerate(classes)}
    feature = builder.info.features[label]
    sets = []
    for part in parts:
        split, labels = find_split(name, part, splits, label)
        if not hasattr(feature, "names"):
            labels = [number_of.get(str(value), -1) for value in labels]
        rows = splits[split].select_columns([image]).cast_column(image, undecoded())
        # The builder's hash is that of the commit.
        key = f"{name} {builder.hash} {split} {image} {label}" if builder.hash else ""
        reader = DatasetReader(HubImages(rows, image, labels), len(classes), form.channels, key)
        placement.observer.note(f"{part}: split {printable(split)} of {name}")
        sets.append(decode_all(reader, classes, form, part, placement))
    return sets


def prepare(name: str) -> Any:
    """Fetch a data set, or find it in the cache of `datasets`. Raises DataError."""
    repository, revision, subset = parse_hub_dataset(name)
    datasets = import_datasets()
    if os.path.lexists(repository):
        raise DataError(
            f"{repository} is a name in this folder, too, which would be read instead",
            "run from another folder, or rename it",
        )
    try:
        builder = datasets.load_dataset_builder(
            repository, name=subset or None, revision=revision or None
        )
        kind = type(builder).__module__.split(".")[-2]
        if kind not in BUILDERS:
            raise DataError(
                f"{name}: its files are of kind {kind!r}", f"needed: {', '.join(BUILDERS)}"
            )
        if kind == "cache" and revision and builder.hash != cached_commit(repository, revision):
            raise DataError(
                f"{name}: the hub cannot be reached, and its cache has commit {builder.hash}",
                "leave out the revision, or name that commit",
            )
        builder.download_and_prepare()
    except DataError:
        raise
    except Exception as error:  # of the library, of the hub's client, and of what these use
        raise DataError(f"{name}: {type(error).__name__}: {error}", hint_for(error)) from error
    return builder


def cached_commit(repository: str, revision: str) -> str:
    """Return the commit that a revision was when it was fetched; the revision itself if not known."""
    with suppress(OSError, CheckpointError):
        return read_bytes(cache_of(repository) / "refs" / revision).decode().strip()
    return revision


def cache_of(repository: str) -> Path:
    """Return the folder of a data set in the cache of huggingface_hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"datasets--{repository.replace('/', '--')}")


def refuse_unfetched(name: str, origin: str) -> None:
    """Raise UsageError for a data set on the hub that `origin` names, if it was never fetched to here.

    Files may be anybody's: what they name is not fetched.
    """
    if not name.startswith(HUB):
        return
    import_datasets()
    if not cache_of(parse_hub_dataset(name).repository).is_dir():
        raise UsageError(
            f"{origin}: its data set is {name}, which has not been fetched before",
            f"to fetch it, type --dataset {name}",
        )


def hint_for(error: Exception) -> str:
    """Return what to do where a data set cannot be fetched."""
    text = str(error)
    if "script" in text:
        return "no code of a repository is run; @refs%2Fconvert%2Fparquet may have it as files"
    if "onfig" in text:  # of BuilderConfig, or a config name
        return "a subset is named at the end: hf:owner/name/subset"
    return "check name, revision and network; HF_TOKEN, or `hf auth login`, opens gated ones"


def import_datasets() -> Any:
    """Import the library `datasets`. Raises UsageError without it."""
    return import_extra("datasets", "datasets", "a data set of the hub")


def undecoded() -> Any:
    """Return the feature of images as they are stored: our own reader opens them."""
    return import_datasets().Image(decode=False)


def find_columns(name: str, columns: Columns, features: Mapping[str, Any]) -> tuple[str, str]:
    """Return the columns of images and labels: the given ones, or the only ones of their kind.

    Raises UsageError.
    """
    datasets = import_datasets()
    found = []
    for given, kind, others, flag in (
        (columns.image, datasets.Image, (), "--image-column"),
        (columns.label, datasets.ClassLabel, (datasets.Value,), "--label-column"),
    ):
        of_kind = [key for key, feature in features.items() if isinstance(feature, kind)]
        if given and isinstance(features.get(given), (kind, *others)):
            found.append(given)
        elif given or len(of_kind) != 1:
            number = f"no column {given!r}" if given else f"{len(of_kind)} columns"
            there = [f"{key} ({type(feature).__name__})" for key, feature in features.items()]
            raise UsageError(
                f"{name}: {number} of kind {kind.__name__}",
                f"{flag}, one of {first_of(there, SHOWN)}",
            )
        else:
            found += of_kind
    return found[0], found[1]


def class_names(splits: Mapping[str, Any], label: str) -> tuple[str, ...]:
    """Return the names of the classes: of the column, or the different values of all splits."""
    for rows in splits.values():
        with suppress(AttributeError):
            return tuple(map(str, rows.features[label].names))
    values = {value for rows in splits.values() for value in rows.unique(label)} - {None, -1}
    numbers = all(isinstance(value, int) for value in values)
    return tuple(map(str, sorted(values, key=None if numbers else str)))


def find_split(
    name: str, part: str, splits: Mapping[str, Any], label: str
) -> tuple[str, Sequence[Any]]:
    """Return the split with the training or test images, and its labels.

    For the test: of TESTS the first whose images have labels. Raises DataError.
    """
    for split in ("train",) if part == "train" else TESTS:
        if split in splits:
            labels = splits[split][label][:]
            if len(labels) and all(value is not None and value != -1 for value in labels):
                return split, labels
    raise DataError(
        f"{name}: no {part} images with labels in its splits {', '.join(splits)}",
        f"needed: train, and {' or '.join(TESTS)}",
    )
