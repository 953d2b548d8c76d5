"""Data sets: published archives, folders of images, scikit-learn's digits."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from absld.config.datasets import Channels, Columns, Resize
from absld.config.imports import HUB
from absld.data.archives import provide, unpack_zip
from absld.data.dataset import ImageSet, Splits, check_classes
from absld.data.decoding import Form, UnreadableError, decode_all, unreadable
from absld.data.folders import check_utf8, describe_skipped, list_classes, list_files
from absld.data.hub_datasets import load_hub
from absld.data.placement import Placement
from absld.data.published import Part, cifar, image_set, svhn
from absld.data.readers import FileReader
from absld.errors import CheckpointError, DataError
from absld.seeding import generator
from absld.storage.opening import read_bytes
from absld.text import printable

HINTS = {
    "folder": "needed in {folder}: train/CLASS/* to train, test/CLASS/* to test",
    "cifar10": "needed in {folder}: cifar-10-python.tar.gz",
    "cifar100": "needed in {folder}: cifar-100-python.tar.gz",
    "svhn": "needed in {folder}: train_32x32.mat and test_32x32.mat",
    "tiny-imagenet": "needed in {folder}: tiny-imagenet-200/, as tiny-imagenet-200.zip unpacks",
}
UNPACK = "unpack tiny-imagenet-200.zip anew"
RESIZED = ("folder", "tiny-imagenet")
GREY = ("digits", *RESIZED)  # their images may be of one channel
ON_CPU = Placement()
ONLY = Columns()


def load_data(
    dataset: str,
    folder: str,
    image_size: int = 32,
    resize: Resize = "squash",
    channels: Channels = 3,
    placement: Placement = ON_CPU,
    columns: Columns = ONLY,
) -> Splits:
    """Load the training, validation and test set of a data set, for batches on the CPU.

    Validation is split off the training images by class, the same for all seeds: 5 % (digits 15 %),
    at least one image of a class that has two or more, and none of a class of one.

    Args:
        dataset: digits, one of those in HINTS, or hf:owner/name.
        folder: where its files are; missing archives are downloaded to it.
        image_size: side in pixels to which images of folder and tiny-imagenet are resized.
        resize: how they become square: squashed, or their centre.
        channels: 1 makes images of folder, tiny-imagenet and digits grey.
        placement: whether images are kept in memory or in a file, and who is told.
        columns: of images and labels, in data sets of the hub.

    Raises:
        DataError: with the file or class at fault.
    """
    form = Form(image_size, resize, channels)
    train, test = load_parts(dataset, folder, form, ("train", "test"), placement, columns)
    splits = *hold_out(train, share_of(dataset)), test
    return Splits(*map(placement.place, splits))


def load_split(
    dataset: str,
    folder: str,
    form: Form,
    name: str,
    placement: Placement = ON_CPU,
    columns: Columns = ONLY,
) -> ImageSet:
    """Load one set of `load_data`; nothing else is read, or needs to be there.

    name: train, validation or test. Raises DataError.
    """
    if name == "test":
        return placement.place(load_parts(dataset, folder, form, ("test",), placement, columns)[0])
    (images,) = load_parts(dataset, folder, form, ("train",), placement, columns)
    train, validation = hold_out(images, share_of(dataset))
    return placement.place(train if name == "train" else validation)


def load_parts(
    dataset: str,
    folder: str,
    form: Form,
    parts: Sequence[Part],
    placement: Placement,
    columns: Columns,
) -> list[ImageSet]:
    """Load the parts of a data set as they were published. Raises DataError."""
    if dataset.startswith(HUB):
        return [*load_hub(dataset, columns, form, parts, placement)]
    sources: dict[str, Callable[[], Sequence[ImageSet]]] = {
        "digits": lambda: digits(parts, form.channels),
        "folder": lambda: from_folder(folder, form, parts, placement),
        "cifar10": lambda: cifar(dataset, folder, parts, placement.observer),
        "cifar100": lambda: cifar(dataset, folder, parts, placement.observer),
        "svhn": lambda: svhn(folder, parts, placement.observer),
        "tiny-imagenet": lambda: tiny_imagenet(folder, form, parts, placement),
    }
    if dataset not in sources:
        raise DataError(f"there is no data set {dataset!r}", f"there are: {', '.join(sources)}")
    if form.channels == 1 and dataset not in GREY:
        raise DataError(
            f"{dataset} has images of 3 channels", f"--channels 1 is for {', '.join(GREY)}"
        )
    check_utf8(folder)
    try:
        return [*sources[dataset]()]
    except (OSError, RuntimeError, ValueError, ImportError, EOFError) as error:
        hint = getattr(error, "hint", "") or HINTS[dataset].format(folder=folder)
        raise DataError(printable(str(error)), printable(hint)) from error


def is_resized(dataset: str) -> bool:
    """Return whether the images of a data set get the size that is asked for."""
    return dataset in RESIZED or dataset.startswith(HUB)


def share_of(dataset: str) -> float:
    """Return the share of the training images that is held out."""
    return 0.15 if dataset == "digits" else 0.05


def split(data: ImageSet, size: int) -> tuple[ImageSet, ImageSet]:
    """Split a set in two, the second of `size` images, stratified by class."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        torch.arange(len(data)), test_size=size, stratify=data.labels, random_state=0
    )
    return data.subset(first), data.subset(second)


def hold_out(data: ImageSet, share: float = 0.05) -> tuple[ImageSet, ImageSet]:
    """Split validation images off a set: a share of each class.

    At least one image of a class that has two or more, none of a class of one. Raises DataError if
    no class has two.
    """
    counts = data.labels.bincount()
    counts = counts[counts > 0]
    rarest, size = int(counts.min()), max(round(share * len(data)), len(counts))
    if rarest > 1 and size * rarest >= len(data):  # the split leaves every class an image or more
        return split(data, size)
    # It would leave a rare class none, or take more of all others.
    order = torch.randperm(len(data), generator=generator("validation"))
    held_out = torch.zeros(len(data), dtype=torch.bool)
    for k in range(data.num_classes):
        of_class = order[data.labels[order] == k]
        number = len(of_class)
        held_out[of_class[: min(max(round(share * number), 1), number - 1)]] = True
    if not held_out.any():
        raise DataError("no class has two images", "needed: images to train and to validate on")
    return data.subset(torch.where(~held_out)[0]), data.subset(torch.where(held_out)[0])


class Files(NamedTuple):
    """Image files with their labels, and what was skipped in their folder."""

    folder: str
    files: list[tuple[str, int]]
    skipped: list[str]


# --- Published archives ---


def digits(parts: Sequence[Part], channels: int = 3) -> list[ImageSet]:
    """Load scikit-learn's 1,797 digits of 8x8 pixels, grey or as RGB; a third is the test set."""
    from sklearn.datasets import load_digits

    grey, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (grey * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    train, test = split(image_set(images.repeat(1, channels, 1, 1), labels, "0123456789"), 599)
    return [train if part == "train" else test for part in parts]


def tiny_imagenet(
    folder: str, form: Form, parts: Sequence[Part], placement: Placement
) -> list[ImageSet]:
    """Load Tiny ImageNet as its archive unpacks, in `folder` or its tiny-imagenet-200.

    Where neither is there, it is unpacked from its archive, which is downloaded if missing.

    Its labelled validation images are the test set; its test images have no labels. Classes are in
    the order of their sorted ids, as those of a folder set, not in that of wnids.txt. Names are
    the ids and a word.
    """
    root, top = Path(folder), "tiny-imagenet-200"
    if not (root / top).is_dir() and not os.path.lexists(root / "wnids.txt"):
        observer = placement.observer
        provide(["tiny-imagenet"], folder, observer, lambda path: unpack_zip(path, top, observer))
    if (root / top).is_dir():
        root /= top
    ids = sorted({*lines(root / "wnids.txt")})
    names = dict(row.split("\t", 1) for row in lines(root / "words.txt") if "\t" in row)
    # The first synonym tells a reader enough.
    classes = [f"{wnid} {names.get(wnid, '').split(',')[0]}".strip() for wnid in ids]
    label_of = {wnid: label for label, wnid in enumerate(ids)}

    found: dict[Part, Files] = {}
    seen = set[str]()
    if "train" in parts:
        found["train"] = tiny_training_files(root / "train", label_of, seen)
    if "test" in parts:
        found["test"] = tiny_validation_files(root / "val", label_of, seen)
    return read_parts(found, classes, form, placement)


def tiny_training_files(folder: Path, label_of: Mapping[str, int], seen: set[str]) -> Files:
    """List the files of `folder`/ID/images."""
    skipped: list[str] = []
    folders = list_classes(str(folder), skipped)
    skipped += [str(folder / name) for name in folders if name not in label_of]
    missing = sorted(label_of.keys() - {*folders})
    if missing:
        raise DataError(f"{folder}: no folder of {missing[0][:80]!r}, a class of wnids.txt", UNPACK)
    files = [
        (path, label)
        for wnid, label in label_of.items()
        for path in list_files(str(folder / wnid / "images"), skipped, seen)
    ]
    return Files(str(folder), files, skipped)


def tiny_validation_files(folder: Path, label_of: Mapping[str, int], seen: set[str]) -> Files:
    """List the files of `folder`/val_annotations.txt, which says their classes."""
    skipped: list[str] = []
    unlisted = {*list_files(str(folder / "images"), skipped, seen)}
    table = folder / "val_annotations.txt"
    files = []
    for row in lines(table):
        name, wnid, *_ = [*row.split("\t"), ""]
        path = str(folder / "images" / name)
        if wnid not in label_of:
            raise DataError(
                f"{table}: {wnid[:80]!r} of {name[:80]!r} is not a class of wnids.txt", UNPACK
            )
        if path not in unlisted:
            raise DataError(f"{table}: {name[:80]!r} is not in images/, or is listed twice", UNPACK)
        unlisted.remove(path)
        files.append((path, label_of[wnid]))
    return Files(str(folder), files, [*skipped, *unlisted])


def lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty. Raises DataError."""
    try:
        text = read_bytes(path).decode()
    except CheckpointError as error:
        raise DataError(str(error), error.hint) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: {error}", UNPACK) from error
    return [line for line in text.splitlines() if line.strip()]


# --- Folders of images ---


def from_folder(
    folder: str, form: Form, parts: Sequence[Part], placement: Placement
) -> list[ImageSet]:
    """Load images in `folder`/{train,test}/CLASS/ and folders below, resized."""
    skipped: dict[Part, list[str]] = {part: [] for part in parts}
    classes = {part: list_classes(os.path.join(folder, part), skipped[part]) for part in parts}
    names = classes[parts[0]]
    if len(names) < 2 or names != classes[parts[-1]]:
        raise DataError(
            "; ".join(f"classes in {part}: {found}" for part, found in classes.items()),
            "both need the same folders, two or more, one for each class",
        )
    found: dict[Part, Files] = {}
    seen = set[str]()
    for part in parts:
        root = os.path.join(folder, part)
        files = [
            (path, label)
            for label, name in enumerate(names)
            for path in list_files(os.path.join(root, name), skipped[part], seen)
        ]
        found[part] = Files(root, files, skipped[part])
    return read_parts(found, names, form, placement)


def read_parts(
    parts: Mapping[Part, Files], classes: Sequence[str], form: Form, placement: Placement
) -> list[ImageSet]:
    """Read the images of all parts; every class needs one."""
    check_classes(classes)
    for folder, files, _ in parts.values():
        empty = sorted({*range(len(classes))} - {label for _, label in files})
        if empty:
            raise DataError(f"{folder}: no images of {classes[empty[0]]}", "remove it, or add some")
    sets: list[ImageSet] = []
    faults: list[str] = []
    for part, (folder, files, skipped) in parts.items():
        reader = FileReader(folder, files, form.channels)
        try:
            data = decode_all(reader, classes, form, part, placement)
        except UnreadableError as error:
            faults += error.faults  # those of all parts are told together
        else:
            notes = *data.notes, *describe_skipped(part, folder, skipped)
            sets.append(replace(data, notes=notes))
    if faults:
        raise unreadable(faults, reader)
    return sets
