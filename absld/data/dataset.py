"""Image sets as tensors, their splits, and stratified subsets.

A set lies whole on the device as uint8: no worker processes, no global random state.
"""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from absld.errors import DataError
from absld.seeding import generator
from absld.storage.files import raw_bytes


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N,channels,H,W), uint8 or floating in [0,1]; labels (N,) int64; names of the classes.

    Raises DataError, a ValueError, for anything else.
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
        """Return the images of these numbers, in this order."""
        index = index.to(self.labels.device)
        return ImageSet(self.images[index], self.labels[index], self.classes)

    def digest(self) -> str:
        """Compute the SHA-256 of type, shape and bytes of images and labels, and of class names."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for tensor in (self.images, self.labels):
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(raw_bytes(tensor))
        return sha.hexdigest()


class Splits(NamedTuple):
    """Three sets of the same classes, without common images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device | str) -> "Splits":
        return Splits(*(part.to(device) for part in self))


def stratified(
    labels: Int[Tensor, " n"], num_classes: int, size: int | None, *key: int | str
) -> Int[Tensor, " m"]:
    """Choose `size` images, stratified by class, with random numbers from `key`.

    Returns their numbers, ascending: in proportion to the classes, with one of each class as far as
    there is room; all if `size` is None or not smaller.
    """
    labels = labels.cpu()
    if size is None or size >= len(labels):
        return torch.arange(len(labels))
    # Each class spreads its images evenly over [0,1] in random order, the first one at 0; the images
    # that come first are chosen.
    place = torch.zeros(len(labels), dtype=torch.float64)
    drawn = torch.randperm(len(labels), generator=generator(*key))
    for k in range(num_classes):
        of_class = drawn[labels[drawn] == k]
        place[of_class] = (torch.arange(len(of_class)).double() + 0.5) / len(of_class)
        place[of_class[:1]] = 0.0
    return place.argsort(stable=True)[:size].sort().values


def pixels(images: Tensor) -> Tensor:
    """Return images as floating pixels in [0,1]."""
    return images if images.is_floating_point() else images / 255
