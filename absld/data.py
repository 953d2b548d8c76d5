"""Images as tensors: sets, their splits, random views of them, and where they come from.

A set lies whole on the device as uint8; a view of an image (crop, mirror) is a tensor operation
with explicit offsets. No worker processes, no global random state.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from absld.errors import DataError
from absld.seeding import generator


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N,channels,H,W), uint8 or floating in [0,1]; labels (N,) int64; class names.

    Raises DataError, a ValueError, if they are anything else.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(f"two classes or more are needed, not {self.classes}")
        if self.images.ndim != 4 or not len(self.images):
            raise DataError(f"images must be (N,channels,H,W), not {tuple(self.images.shape)}")
        if self.labels.dtype != torch.long or self.labels.shape != self.images.shape[:1]:
            raise DataError(
                f"labels must be int64 of shape ({len(self.images)},), "
                f"not {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        low, high = (int(end) for end in self.labels.aminmax())
        if low < 0 or high >= len(self.classes):
            raise DataError(f"labels must be in 0..{len(self.classes) - 1}, not {low}..{high}")
        if self.images.dtype != torch.uint8:
            if not self.images.is_floating_point():
                raise DataError(f"images must be uint8 or floating, not {self.images.dtype}")
            ends = self.images.aminmax()
            if not (ends.min >= 0 and ends.max <= 1):  # NaN is neither
                raise DataError(f"pixels must be in [0,1], not {ends.min:g}..{ends.max:g}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def to(self, device: torch.device | str) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, index: Int[Tensor, " m"]) -> "ImageSet":
        """The images of these numbers, in this order."""
        index = index.to(self.labels.device)
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def digest(self) -> str:
        """SHA-256 over type, shape and bytes of images and labels, and the names of the classes."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for tensor in (self.images, self.labels):
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()


class Splits(NamedTuple):
    """Three sets of the same classes; no image is in two of them."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device | str) -> "Splits":
        return Splits(*(part.to(device) for part in self))


def pixels(images: Tensor) -> Tensor:
    """Images as floating pixels in [0,1]."""
    return images if images.is_floating_point() else images / 255


# --- Views ---


class Batch(NamedTuple):
    """x_nat (n,channels,H,W) in [0,1], labels (n,), and the noise that starts the attack."""

    x_nat: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    noise: Float[Tensor, "n channels height width"]


class Views:
    """The views of a set: every crop of the zero-padded image at its own size, and its mirror."""

    def __init__(self, data: ImageSet, padding: int) -> None:
        self.data, self.padding = data, padding
        height, width = data.images.shape[2:]
        padded = F.pad(data.images, [padding] * 4)
        self.windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # shares the memory

    def __call__(
        self,
        index: Int[Tensor, " n"],
        dy: Int[Tensor, " n"],
        dx: Int[Tensor, " n"],
        mirror: Tensor,
    ) -> Float[Tensor, "n channels height width"]:
        """Images `index`, cropped at row `dy`, column `dx` (0 to twice the padding), and mirrored
        where `mirror` (n,) is true."""
        crop = pixels(self.windows[index, :, dy, dx])
        return torch.where(mirror.view(-1, 1, 1, 1), crop.flip(3), crop)


def steps_per_epoch(images: int, batch_size: int, max_steps: int | None = None) -> int:
    """Whole batches in so many images; a short last batch is dropped."""
    steps = images // batch_size
    return steps if max_steps is None else min(steps, max_steps)


def batches(
    views: Views,
    *key: int | str,
    batch_size: int,
    flip: float,
    start_noise: float,
    steps: int,
    first_step: int = 0,
) -> Iterator[Batch]:
    """The batches of an epoch from `first_step` on; each is a function of `key` and its number.

    flip: probability of a mirror image; start_noise: deviation of the normal noise, in pixels.
    """
    device = views.data.labels.device
    order = torch.randperm(len(views.data), generator=generator(*key, device=device), device=device)
    for step in range(first_step, steps):
        random = generator(*key, step, device=device)
        index = order[step * batch_size : (step + 1) * batch_size]
        n = len(index)
        dy, dx = torch.randint(2 * views.padding + 1, (2, n), generator=random, device=device)
        mirror = torch.rand(n, generator=random, device=device) < flip
        x_nat = views(index, dy, dx, mirror)
        noise = torch.randn(x_nat.shape, generator=random, device=device, dtype=x_nat.dtype)
        yield Batch(x_nat, views.data.labels[index], start_noise * noise)


# --- Sources ---


def load_data(dataset: str, folder: str) -> Splits:
    """Training, validation and test set of a data set, on the CPU.

    dataset: digits, cifar10, cifar100 or folder. folder: where its files are; CIFAR's archive is
    downloaded to it if it is not there. Validation is split off the training images by class, alike for all seeds: 5 % (digits 15 %),
    and so many that each class has one. Raises DataError, with the file or class at fault.
    """
    try:
        if dataset == "digits":
            return digits()
        if dataset == "folder":
            return from_folder(folder)
        if dataset in ("cifar10", "cifar100"):
            return cifar(dataset, folder)
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, ImportError, EOFError) as error:
        raise DataError(str(error), WAY_OUT.format(folder=folder)) from error
    raise DataError(f"there is no data set {dataset!r}", "digits, cifar10, cifar100 or folder")


WAY_OUT = "needed in {folder}: train/CLASS/* and test/CLASS/*, or the tar.gz archive of CIFAR"


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


def stratified(
    labels: Int[Tensor, " n"], num_classes: int, size: int | None, *key: int | str
) -> Int[Tensor, " m"]:
    """The numbers of `size` images, ascending, in proportion to the classes, and one of each class
    as far as there is room; all of them if size is None or as large as that. Drawn from `key`."""
    labels = labels.cpu()
    if size is None or size >= len(labels):
        return torch.arange(len(labels))
    # Each class lays its images out evenly over [0,1], in random order, the first one at 0; taken
    # are those that come first.
    place = torch.zeros(len(labels), dtype=torch.float64)
    drawn = torch.randperm(len(labels), generator=generator(*key))
    for k in range(num_classes):
        of_class = drawn[labels[drawn] == k]
        place[of_class] = (torch.arange(len(of_class)).double() + 0.5) / len(of_class)
        place[of_class[:1]] = 0.0
    return place.argsort(stable=True)[:size].sort().values


def hold_out(train: ImageSet, test: ImageSet, share: float) -> Splits:
    """Split validation images off the training images: a share, and one of each class."""
    rarest = max(2, int(train.labels.bincount(minlength=train.num_classes).min()))
    size = max(round(share * len(train)), -(-len(train) // rarest))
    return Splits(*split(train, size), test)


def digits() -> Splits:
    """scikit-learn's 1,797 digits of 8x8 pixels, grey as RGB; a third is the test set."""
    from sklearn.datasets import load_digits

    grey, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = (grey * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8).repeat(1, 3, 1, 1)
    train, test = split(ImageSet(images, labels, tuple("0123456789")), 599)
    return hold_out(train, test, 0.15)


def cifar(dataset: str, folder: str) -> Splits:
    """CIFAR-10 or CIFAR-100 from its archive in `folder`, downloaded if it is not there."""
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that never answers is none
    try:
        source = getattr(datasets, dataset.upper())
        parts = [source(folder, train=train, download=True) for train in (True, False)]
    finally:
        socket.setdefaulttimeout(timeout)
    train, test = (
        ImageSet(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
            tuple(part.classes),
        )
        for part in parts
    )
    return hold_out(train, test, 0.05)


def from_folder(folder: str) -> Splits:
    """Images in `folder`/{train,test}/CLASS/, of any format Pillow reads, resized to 32x32."""
    from torchvision import datasets

    # isfile: a file that is no image is an error, not passed over.
    train, test = (
        datasets.ImageFolder(os.path.join(folder, part), None, None, read_image, os.path.isfile)
        for part in ("train", "test")
    )
    if len(train.classes) < 2 or train.classes != test.classes:
        raise DataError(
            f"classes in train: {train.classes}, in test: {test.classes}",
            "both need the same folders, two or more, one for each class",
        )
    return hold_out(stacked(train), stacked(test), 0.05)


def stacked(part: Any) -> ImageSet:
    images = torch.stack([image for image, _ in part])
    return ImageSet(images, torch.tensor(part.targets), tuple(part.classes))


def read_image(path: str) -> Tensor:
    """An image file as (3,32,32) uint8."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.v2.functional import pil_to_tensor, resize

    try:
        image: Tensor = resize(pil_to_tensor(default_loader(path)), [32, 32])
    except Exception as error:  # Pillow raises many kinds, and seldom names the file
        raise DataError(f"cannot read {path}: {error}", "remove it or save it anew") from error
    return image
