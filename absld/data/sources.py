"""Where images come from: archives of published data sets, folders, scikit-learn's digits."""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absld.data.dataset import ImageSet, Splits
from absld.errors import DataError

WAYS_OUT = {
    "folder": "needed in {folder}: train/CLASS/* and test/CLASS/*",
    "cifar10": "needed in {folder}: cifar-10-python.tar.gz, or a network to fetch it",
    "cifar100": "needed in {folder}: cifar-100-python.tar.gz, or a network to fetch it",
    "svhn": "needed in {folder}: train_32x32.mat and test_32x32.mat, or a network to fetch them",
    "tiny-imagenet": "needed in {folder}: tiny-imagenet-200/, as tiny-imagenet-200.zip unpacks",
}


def load_data(dataset: str, folder: str, image_size: int = 32) -> Splits:
    """Training, validation and test set of a data set, on the CPU.

    dataset: digits, or one of those in WAYS_OUT. folder: where its files are; archives of CIFAR and
    SVHN are downloaded to it if they are not there. image_size: side in pixels to which images of
    folder and tiny-imagenet are resized. Validation is split off the training images by class, alike
    for all seeds: 5 % (digits 15 %), and so many that each class has one. Raises DataError, with the
    file or class at fault.
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
    except DataError as error:
        if error.way_out:
            raise
        raise DataError(str(error), WAYS_OUT[dataset].format(folder=folder)) from error
    except (OSError, RuntimeError, ValueError, ImportError, EOFError) as error:
        raise DataError(str(error), WAYS_OUT[dataset].format(folder=folder)) from error


def split(data: ImageSet, size: int) -> tuple[ImageSet, ImageSet]:
    """The set in two, the second of `size` images, in proportion to the classes."""
    from sklearn.model_selection import train_test_split

    parts = train_test_split(
        data.images, data.labels, test_size=size, stratify=data.labels, random_state=0
    )
    first, second, first_labels, second_labels = parts
    return (
        ImageSet(first, first_labels, data.classes),
        ImageSet(second, second_labels, data.classes),
    )


def hold_out(train: ImageSet, test: ImageSet, share: float) -> Splits:
    """Split validation images off the training images: a share, and one of each class."""
    rarest = max(2, int(train.labels.bincount(minlength=train.num_classes).min()))
    size = max(round(share * len(train)), -(-len(train) // rarest))
    return Splits(*split(train, size), test)


# --- Published archives ---


def digits() -> Splits:
    """scikit-learn's 1,797 digits of 8x8 pixels, grey as RGB; a third is the test set."""
    from sklearn.datasets import load_digits

    grey, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (grey * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    train, test = split(ImageSet(images, labels, tuple("0123456789")), 599)
    return hold_out(train, test, 0.15)


@contextmanager
def impatient() -> Iterator[None]:
    """Inside, a network that never answers is none."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def cifar(dataset: str, folder: str) -> Splits:
    """CIFAR-10 or CIFAR-100 from its archive in `folder`, downloaded if it is not there."""
    from torchvision import datasets

    source = getattr(datasets, dataset.upper())
    with impatient():
        parts = [source(folder, train=train, download=True) for train in (True, False)]
    train, test = (
        ImageSet(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            tuple(part.classes),
        )
        for part in parts
    )
    return hold_out(train, test, 0.05)


def svhn(folder: str) -> Splits:
    """Street View House Numbers, cropped digits, from train_32x32.mat and test_32x32.mat in
    `folder`, downloaded if they are not there; without the extra training images."""
    from torchvision import datasets

    with impatient():
        parts = [datasets.SVHN(folder, split=part, download=True) for part in ("train", "test")]
    train, test = (
        ImageSet(
            torch.from_numpy(part.data), torch.from_numpy(part.labels).long(), tuple("0123456789")
        )
        for part in parts
    )
    return hold_out(train, test, 0.05)


def tiny_imagenet(folder: str, image_size: int) -> Splits:
    """Tiny ImageNet as its archive unpacks, in `folder` or its subfolder tiny-imagenet-200; its
    labelled validation images are the test set, for those of its test set have no labels."""
    root = Path(folder)
    if (root / "tiny-imagenet-200").is_dir():
        root /= "tiny-imagenet-200"
    ids = lines(root / "wnids.txt")
    names = dict(row.split("\t", 1) for row in lines(root / "words.txt") if "\t" in row)
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    # The first synonym is enough, where no other class has the same.
    short = [names.get(wnid, wnid).split(",")[0] for wnid in ids]
    classes = tuple(
        name if short.count(name) == 1 else f"{name} {wnid}"
        for name, wnid in zip(short, ids, strict=True)
    )

    def images(files: Sequence[tuple[Path, str]], where: Path) -> ImageSet:
        unknown = next((wnid for _, wnid in files if wnid not in label_of), None)
        if unknown or not files:
            what = f"{unknown} is no class of wnids.txt" if unknown else "no images"
            raise DataError(f"{where}: {what}", "unpack the archive anew")
        pictures = read_images([str(path) for path, _ in files], image_size)
        return ImageSet(pictures, torch.tensor([label_of[wnid] for _, wnid in files]), classes)

    train, val = root / "train", root / "val"
    of_train = [(p, wnid) for wnid in ids for p in sorted((train / wnid / "images").iterdir())]
    rows = (row.split("\t") for row in lines(val / "val_annotations.txt"))
    of_val = [(val / "images" / row[0], row[1]) for row in rows if len(row) > 1]
    return hold_out(images(of_train, train), images(of_val, val), 0.05)


def lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# --- Folders of images ---


def from_folder(folder: str, image_size: int) -> Splits:
    """Images in `folder`/{train,test}/CLASS/, and in folders below, of any format Pillow reads,
    resized. Links are followed, but for those that lead round in a circle."""
    from torchvision import datasets

    train_folder, test_folder = (os.path.join(folder, part) for part in ("train", "test"))
    refuse_circles(train_folder)
    refuse_circles(test_folder)
    # isfile: a file that is no image is an error, not passed over.
    train, test = (
        datasets.ImageFolder(part, is_valid_file=os.path.isfile)
        for part in (train_folder, test_folder)
    )
    if len(train.classes) < 2 or train.classes != test.classes:
        raise DataError(
            f"classes in train: {train.classes}, in test: {test.classes}",
            "both need the same folders, two or more, one for each class",
        )
    return hold_out(stacked(train, image_size), stacked(test, image_size), 0.05)


def refuse_circles(folder: str, above: tuple[str, ...] = ()) -> None:
    """Raise DataError if a folder holds, by a link, itself: its images would count many times."""
    here = os.path.realpath(folder)
    if here in above:
        raise DataError(f"{folder}: a link to a folder that holds it", "remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                refuse_circles(entry.path, (*above, here))


def stacked(part: Any, side: int) -> ImageSet:
    """The images that torchvision's ImageFolder found, as a set."""
    images = read_images([path for path, _ in part.samples], side)
    return ImageSet(images, torch.tensor(part.targets), tuple(part.classes))


def read_images(paths: Sequence[str], side: int) -> Tensor:
    """Image files as (N,3,side,side) uint8."""
    images = torch.empty(len(paths), 3, side, side, dtype=torch.uint8)
    for image, path in zip(images, paths, strict=True):
        image.copy_(read_image(path, side))
    return images


def read_image(path: str, side: int) -> Tensor:
    """An image file as (3,side,side) uint8."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    try:
        image: Tensor = resize(pil_to_tensor(default_loader(path)), [side, side])
    except Exception as error:  # Pillow raises many kinds, and seldom names the file
        raise DataError(f"cannot read {path}: {error}", "remove it or save it anew") from error
    return image
