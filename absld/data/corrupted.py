"""Corrupted images for evaluation, in the layout of CIFAR-10-C (arXiv 1903.12261).

A folder with labels.npy, and for each corruption NAME.npy: uint8 (N,height,width,channels), the test
images in five severities one after the other.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from absld.data.dataset import InMemoryImages
from absld.errors import DataError
from absld.text import first_of, printable

SEVERITIES = 5
FOLDERS = {"cifar10-c": "CIFAR-10-C", "cifar100-c": "CIFAR-100-C"}  # as their archives unpack
# Means are published over the other fifteen.
EXTRA = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CLASSES = {"cifar10-c": tuple(CIFAR10.split()), "cifar100-c": tuple(CIFAR100.split())}
SHOWN = 20  # names in a message


def find_folder(dataset: str, folder: str) -> Path:
    """Return the folder of the files: the given one, or the archive's folder in it."""
    inner = Path(folder, FOLDERS.get(dataset, "."))
    return inner if inner.is_dir() else Path(folder)


def list_corruptions(dataset: str, folder: str, chosen: str) -> list[str]:
    """Return the corruptions to evaluate on, sorted, or in the order in which they were chosen.

    chosen: names with commas; empty: all that are there, but for those of EXTRA. Raises DataError.
    """
    root = find_folder(dataset, folder)
    there = sorted(
        path.stem
        for path in root.glob("*.npy")
        if path.stem != "labels" and path.name[0] != "." and path.is_file()
    )
    if not there or not (root / "labels.npy").is_file():
        raise DataError(
            f"{root}: no labels.npy with a .npy file for each corruption",
            "needed: the folder that CIFAR-10-C.tar unpacks to, or one of its layout",
        )
    names = [name.strip().removesuffix(".npy") for name in chosen.split(",") if name.strip()]
    if missing := [name for name in names if name not in there]:
        raise DataError(
            f"{root}: no corruption {printable(missing[0])!r}",
            f"there are: {first_of([*map(printable, there)], SHOWN)}",
        )
    return list(dict.fromkeys(names)) or [n for n in there if n not in EXTRA] or there


def load_corrupted(
    dataset: str, folder: str, corruption: str, severity: int | None
) -> InMemoryImages:
    """Load the images of a corruption, of one severity, or of all five.

    Classes of `corrupted` have numbers for names. Raises DataError.
    """
    root = find_folder(dataset, folder)
    images, labels = (read_array(root / f"{name}.npy") for name in (corruption, "labels"))
    count = len(labels)
    if (
        images.dtype != np.uint8
        or images.shape[:1] != (count,)
        or images.ndim != 4
        or images.shape[3] not in (1, 3)
    ):
        raise DataError(
            f"{root / corruption}.npy: {images.dtype} of shape {images.shape}",
            f"needed: uint8 of shape ({count}, height, width, 1 or 3), as labels.npy has {count}",
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or count % SEVERITIES or not count:
        raise DataError(
            f"{root}/labels.npy: {labels.dtype} of shape {labels.shape}",
            "needed: whole numbers, one for each image, in five parts of equal size",
        )
    part = slice(None)
    if severity is not None:
        size = count // SEVERITIES
        part = slice((severity - 1) * size, severity * size)
    numbers = torch.from_numpy(labels[part].astype(np.int64))
    classes: Sequence[str] = CLASSES.get(dataset) or [*map(str, range(int(labels.max()) + 1))]
    # Only these images are read from the file; the copy is in the order of torch.
    pixels = torch.from_numpy(np.array(images[part].transpose(0, 3, 1, 2), order="C"))
    notes = () if dataset in CLASSES else (f"labels.npy names {len(classes)} classes",)
    return InMemoryImages(pixels, numbers, tuple(classes), notes)


def read_array(path: Path) -> Any:
    """Map an array of a .npy file, which holds no objects. Raises DataError."""
    try:
        if not path.is_file():
            raise ValueError("not a regular file")
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {error}", "needed: a .npy file of numbers") from error
