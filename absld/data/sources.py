"""Data sets: published archives, folders of images, scikit-learn's digits."""

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absld.data.dataset import ImageSet, Splits
from absld.errors import DataError

HINTS = {
    "folder": "needed in {folder}: train/CLASS/* and test/CLASS/*",
    "cifar10": "needed in {folder}: cifar-10-python.tar.gz, or a network to fetch it",
    "cifar100": "needed in {folder}: cifar-100-python.tar.gz, or a network to fetch it",
    "svhn": "needed in {folder}: train_32x32.mat and test_32x32.mat, or a network to fetch them",
    "tiny-imagenet": "needed in {folder}: tiny-imagenet-200/, as tiny-imagenet-200.zip unpacks",
}


def load_data(dataset: str, folder: str, image_size: int = 32) -> Splits:
    """Load the training, validation and test set of a data set, on the CPU.

    Validation is split off the training images by class, the same for all seeds: 5 % (digits 15 %),
    and at least one image of each class.

    Args:
        dataset: digits, or one of those in HINTS.
        folder: where its files are; archives of CIFAR and SVHN are downloaded to it if missing.
        image_size: side in pixels to which images of folder and tiny-imagenet are resized.

    Raises:
        DataError: with the file or class at fault.
    """
    sources: dict[str, Callable[[], Splits]] = {
        "digits": digits,
        "folder": lambda: from_folder(folder, image_size),
        "cifar10": lambda: cifar(dataset, folder),
        "cifar100": lambda: cifar(dataset, folder),
        "svhn": lambda: svhn(folder),
        "tiny-imagenet": lambda: tiny_imagenet(folder, image_size),
    }
    if dataset not in sources:
        raise DataError(f"there is no data set {dataset!r}", f"there are: {', '.join(sources)}")
    try:
        return sources[dataset]()
    except (OSError, RuntimeError, ValueError, ImportError, EOFError) as error:
        if isinstance(error, DataError) and error.hint:
            raise
        raise DataError(str(error), HINTS[dataset].format(folder=folder)) from error


def split(data: ImageSet, size: int) -> tuple[ImageSet, ImageSet]:
    """Split a set in two, the second of `size` images, stratified by class."""
    from sklearn.model_selection import train_test_split

    first, second = train_test_split(
        torch.arange(len(data)), test_size=size, stratify=data.labels, random_state=0
    )
    return data.subset(first), data.subset(second)


def hold_out(train: ImageSet, test: ImageSet, share: float = 0.05) -> Splits:
    """Split validation images off the training images: a share, at least one of each class."""
    rarest = max(2, int(train.labels.bincount(minlength=train.num_classes).min()))
    size = max(round(share * len(train)), -(-len(train) // rarest))
    return Splits(*split(train, size), test)


def image_set(images: Any, labels: Any, classes: Iterable[str]) -> ImageSet:
    """Make a set of arrays or lists."""
    return ImageSet(torch.as_tensor(images), torch.as_tensor(labels).long(), tuple(classes))


# --- Published archives ---


def digits() -> Splits:
    """Load scikit-learn's 1,797 digits of 8x8 pixels, grey as RGB; a third is the test set."""
    from sklearn.datasets import load_digits

    grey, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (grey * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    return hold_out(*split(image_set(images, labels, "0123456789"), 599), share=0.15)


@contextmanager
def socket_timeout(seconds: float) -> Iterator[None]:
    """Set the default timeout of sockets, so that a network without an answer is an error."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def cifar(dataset: str, folder: str) -> Splits:
    """Load CIFAR-10 or CIFAR-100 from its archive in `folder`, downloaded if missing."""
    from torchvision import datasets

    source = getattr(datasets, dataset.upper())
    with socket_timeout(10):
        parts = [source(folder, train=train, download=True) for train in (True, False)]
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (
        image_set(x, part.targets, part.classes) for x, part in zip(images, parts, strict=True)
    )
    return hold_out(train, test)


def svhn(folder: str) -> Splits:
    """Load Street View House Numbers from train_32x32.mat and test_32x32.mat in `folder`.

    They are downloaded if missing. The extra training images are not used.
    """
    from torchvision import datasets

    with socket_timeout(10):
        parts = [datasets.SVHN(folder, split=part, download=True) for part in ("train", "test")]
    train, test = (image_set(part.data, part.labels, "0123456789") for part in parts)
    return hold_out(train, test)


def tiny_imagenet(folder: str, image_size: int) -> Splits:
    """Load Tiny ImageNet as its archive unpacks, in `folder` or its tiny-imagenet-200.

    Its labelled validation images are the test set; its test images have no labels.
    """
    root = Path(folder)
    if (root / "tiny-imagenet-200").is_dir():
        root /= "tiny-imagenet-200"
    ids = lines(root / "wnids.txt")
    names = dict(row.split("\t", 1) for row in lines(root / "words.txt") if "\t" in row)
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    # The first synonym is enough, where no other class has the same.
    short = [names.get(wnid, wnid).split(",")[0] for wnid in ids]
    classes = [
        name if short.count(name) == 1 else f"{name} {wnid}"
        for name, wnid in zip(short, ids, strict=True)
    ]

    def read(files: Sequence[tuple[Path, str]], where: Path) -> ImageSet:
        unknown = next((wnid for _, wnid in files if wnid not in label_of), None)
        if unknown or not files:
            cause = f"{unknown} is not a class of wnids.txt" if unknown else "no images"
            raise DataError(f"{where}: {cause}", "unpack the archive anew")
        images = read_images([str(path) for path, _ in files], image_size)
        return image_set(images, [label_of[wnid] for _, wnid in files], classes)

    train, val = root / "train", root / "val"
    train_files = [(p, wnid) for wnid in ids for p in sorted((train / wnid / "images").iterdir())]
    rows = (row.split("\t") for row in lines(val / "val_annotations.txt"))
    val_files = [(val / "images" / row[0], row[1]) for row in rows if len(row) > 1]
    return hold_out(read(train_files, train), read(val_files, val))


def lines(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# --- Folders of images ---


def from_folder(folder: str, image_size: int) -> Splits:
    """Load images in `folder`/{train,test}/CLASS/ and folders below, resized.

    Any format that Pillow reads. Links are followed, except to a folder that holds the link.
    """
    from torchvision import datasets

    folders = [os.path.join(folder, part) for part in ("train", "test")]
    for part in folders:
        refuse_circles(part)
    # isfile: a file that is not an image is an error, not skipped.
    parts = [datasets.ImageFolder(part, is_valid_file=os.path.isfile) for part in folders]
    train, test = (part.classes for part in parts)
    if len(train) < 2 or train != test:
        raise DataError(
            f"classes in train: {train}, in test: {test}",
            "both need the same folders, two or more, one for each class",
        )
    train_set, test_set = (
        image_set(read_images([path for path, _ in part.samples], image_size), part.targets, train)
        for part in parts
    )
    return hold_out(train_set, test_set)


def refuse_circles(folder: str, above: tuple[str, ...] = ()) -> None:
    """Raise DataError if a folder holds itself by a link: its images would count many times."""
    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder}: a link to a folder that holds it", "remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                refuse_circles(entry.path, (*above, here))


def read_images(paths: Sequence[str], side: int) -> Tensor:
    """Read image files as (N,3,side,side) uint8."""
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    for image, path in zip(images, paths, strict=True):
        image.copy_(read_image(path, side))
    return images


def read_image(path: str, side: int) -> Tensor:
    """Read an image file as (3,side,side) uint8."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    try:
        image: Tensor = resize(pil_to_tensor(default_loader(path)), [side, side])
    except Exception as error:  # Pillow raises many kinds, and seldom names the file
        raise DataError(f"cannot read {path}: {error}", "remove it or save it anew") from error
    return image
