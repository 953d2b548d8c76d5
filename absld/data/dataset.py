"""Image sets as tensors, their splits, and stratified subsets.

A set lies whole on the device as uint8: no worker processes, no global random state.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from absld.errors import DataError
from absld.seeding import generator
from absld.shapes import describe_kind, is_dense
from absld.storage.files import raw_bytes
from absld.text import first_of, printable

SHOWN = 20  # classes in a line


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N,channels,H,W), uint8 or floating in [0,1]; labels (N,) int64; names of the classes.

    Floating images become torch's default dtype, float32, as networks have; their gradient is not
    needed. notes: what reading the images changed or left out, in lines. Raises DataError, a
    ValueError, for anything else.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_classes(self.classes)
        object.__setattr__(self, "classes", tuple(self.classes))  # a list is equal to no tuple
        for name, value in (("images", self.images), ("labels", self.labels)):
            if not is_dense(value):
                raise DataError(f"{name} must be a dense tensor, not {describe_kind(value)}")
        if self.images.ndim != 4 or not self.images.numel():
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
            images = self.images.detach().to(torch.get_default_dtype())
            object.__setattr__(self, "images", images)
            ends = self.images.aminmax()
            if not (ends.min >= 0 and ends.max <= 1):  # NaN is neither
                raise DataError(f"pixels must be in [0,1], not {ends.min:g}..{ends.max:g}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device | str) -> "ImageSet":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Int[Tensor, " m"]) -> "ImageSet":
        """Return the images of these numbers, in this order."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def class_counts(self) -> list[int]:
        """Count the images of each class."""
        counts: list[int] = self.labels.bincount(minlength=self.num_classes).tolist()
        return counts

    def digest(self) -> str:
        """Compute the SHA-256 of type, shape and bytes of images and labels, and of class names."""
        sha = hashlib.sha256(repr(self.classes).encode())
        for tensor in (self.images, self.labels):
            sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            sha.update(raw_bytes(tensor))
        return sha.hexdigest()


def check_classes(classes: Sequence[str]) -> None:
    """Raise DataError unless classes are two different names or more, in a tuple or list."""
    if not isinstance(classes, (tuple, list)) or not all(isinstance(c, str) for c in classes):
        raise DataError(f"classes must be a tuple of names, not {classes!r}")
    if len(classes) < 2:
        raise DataError(f"two classes or more are needed, not {classes}")
    if len(set(classes)) < len(classes):
        repeated = next(name for name in classes if classes.count(name) > 1)
        raise DataError(f"two classes have the name {repeated!r}", "another name for each class")


class Splits(NamedTuple):
    """Three sets of the same classes, without common images."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet

    def to(self, device: torch.device | str) -> "Splits":
        return Splits(*(part.to(device) for part in self))

    def class_counts(self) -> dict[str, list[int]]:
        """Count the images of each class in each set."""
        return {name: part.class_counts() for name, part in self._asdict().items()}

    def describe(self) -> list[str]:
        """Describe the images in lines; see `describe_images`."""
        return describe_images(self._asdict())


def describe_images(sets: Mapping[str, ImageSet]) -> list[str]:
    """Describe sets of the same classes in lines: sizes, images of each class, and their notes."""
    channels, height, width = next(iter(sets.values())).image_shape
    classes = next(iter(sets.values())).classes
    kind = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    lines = [f"images of {len(classes)} classes, {height}x{width}, {kind}"]
    lines += [f"{name}: {len(data)} images; {describe_counts(data)}" for name, data in sets.items()]
    for name, data in sets.items():
        absent = [printable(classes[k]) for k, count in enumerate(data.class_counts()) if not count]
        if absent:
            lines.append(
                f"warning: no {name} images of {first_of(absent, SHOWN)}: "
                "accuracy there is NaN, and does not count"
            )
    notes = (note for data in sets.values() for note in data.notes)
    return [*lines, *dict.fromkeys(notes)]


def describe_counts(data: ImageSet) -> str:
    """Describe the images of each class; of many classes the rarest and the most frequent."""
    counts = data.class_counts()
    if min(counts) == max(counts):
        return f"{counts[0]} of each class"
    of_class = [
        f"{printable(name)} {count}" for name, count in zip(data.classes, counts, strict=True)
    ]
    if len(counts) > SHOWN:
        by_count = sorted(range(len(counts)), key=counts.__getitem__)
        ends = [of_class[k] for k in by_count[: SHOWN // 2] + by_count[-SHOWN // 2 :]]
        of_class = [*ends[: SHOWN // 2], "...", *ends[SHOWN // 2 :]]
    return ", ".join(of_class)


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
    """Return images as floating pixels in [0,1], in new storage: a network may write to it."""
    return images.clone() if images.is_floating_point() else images / 255
