"""Image sets, their splits, and stratified subsets.

`ImageSet` is what trainings and evaluations take. `InMemoryImages` holds its images as a tensor;
`absld.data.mapped` reads them from a file.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from absld.errors import DataError
from absld.seeding import generator
from absld.shapes import describe_kind, is_dense
from absld.storage.files import raw_bytes
from absld.text import first_of, printable

SHOWN = 20  # classes in a line


@runtime_checkable
class ImageSet(Protocol):
    """Images with labels (N,) int64 in 0..C-1, and the names of the C classes.

    Images are uint8, or floating in [0,1].

    Attributes:
        notes: what reading the images changed or left out, in lines.
        device: where labels and images are given.
        index_device: where `rows` takes an index without a wait for the device.
    """

    @property
    def labels(self) -> Tensor: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def index_device(self) -> torch.device: ...
    @property
    def storage(self) -> str:
        """Where the images are, in words."""
        ...

    def __len__(self) -> int: ...

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return the images of these numbers (n,channels,H,W), on `device`."""
        ...

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all images with their labels, `size` at a time, in order."""
        ...

    def subset(self, index: Int[Tensor, " m"]) -> "ImageSet":
        """Return the images of these numbers, in this order."""
        ...

    def to(self, device: torch.device | str) -> "ImageSet":
        """Return the set with its labels, and from now on its images, on a device."""
        ...

    def class_counts(self) -> list[int]:
        """Count the images of each class."""
        ...

    def digest(self) -> str:
        """Compute the SHA-256 of type, shape and bytes of images and labels, and of class names."""
        ...


class Labelled:
    """The part of an image set that its labels and classes decide."""

    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def device(self) -> torch.device:
        return self.labels.device

    def class_counts(self) -> list[int]:
        """Count the images of each class."""
        counts: list[int] = self.labels.bincount(minlength=self.num_classes).tolist()
        return counts


@dataclass(frozen=True, eq=False)
class InMemoryImages(Labelled):
    """Images (N,channels,H,W), uint8 or floating in [0,1]; labels (N,) int64; names of the classes.

    Floating images become torch's default dtype, float32, as networks have; their gradient is not
    needed.

    Attributes:
        images: (N,channels,H,W).
        labels: (N,) in 0..C-1.
        classes: names of the C classes, in the order of a network's logits.
        notes: what reading the images changed or left out, in lines.

    Raises:
        DataError: for anything else; it is a ValueError.
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
        check_labels(self.labels, len(self.images), len(self.classes))
        if self.images.dtype != torch.uint8:
            if not self.images.is_floating_point():
                raise DataError(f"images must be uint8 or floating, not {self.images.dtype}")
            images = self.images.detach().to(torch.get_default_dtype())
            object.__setattr__(self, "images", images)
            ends = self.images.aminmax()
            if not (ends.min >= 0 and ends.max <= 1):  # NaN is neither
                raise DataError(f"pixels must be in [0,1], not {ends.min:g}..{ends.max:g}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def dtype(self) -> torch.dtype:
        return self.images.dtype

    @property
    def index_device(self) -> torch.device:
        """The device of the images: an index elsewhere is copied to it."""
        return self.images.device

    @property
    def storage(self) -> str:
        """Where the images are, in words."""
        return "in memory"

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return the images of these numbers (n,channels,H,W), on their device."""
        return self.images[index if isinstance(index, slice) else index.to(self.images.device)]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all images with their labels, `size` at a time, in order."""
        return zip(torch.split(self.images, size), torch.split(self.labels, size), strict=True)

    def to(self, device: torch.device | str) -> "InMemoryImages":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, index: Int[Tensor, " m"]) -> "InMemoryImages":
        """Return the images of these numbers, in this order."""
        index = index.to(self.labels.device)
        return replace(self, images=self.images[index], labels=self.labels[index])

    def digest(self) -> str:
        """Compute the SHA-256 of type, shape and bytes of images and labels, and of class names."""
        return digest_images(
            self.classes,
            self.images.dtype,
            self.images.shape,
            [raw_bytes(self.images)],
            self.labels,
        )


def digest_images(
    classes: tuple[str, ...],
    dtype: torch.dtype,
    shape: Sequence[int],
    images: Iterable[bytes | memoryview],
    labels: Tensor,
) -> str:
    """Compute the SHA-256 of an image set; images: their bytes, in any parts."""
    sha = hashlib.sha256(repr(classes).encode())
    sha.update(f"{dtype}{tuple(shape)}".encode())
    for part in images:
        sha.update(part)
    sha.update(f"{labels.dtype}{tuple(labels.shape)}".encode())
    sha.update(raw_bytes(labels))
    return sha.hexdigest()


def size_text(size: int) -> str:
    """Return a number of bytes as text, in MiB or GiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    """Raise DataError unless labels are int64 of shape (count,) in 0..num_classes-1."""
    if labels.dtype != torch.long or labels.shape != (count,):
        raise DataError(
            f"labels must be int64 of shape ({count},), "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise DataError(f"labels must be in 0..{num_classes - 1}, not {low}..{high}")


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
    size = sum(
        len(data) * channels * height * width * data.dtype.itemsize for data in sets.values()
    )
    where = " and ".join(dict.fromkeys(data.storage for data in sets.values()))
    lines = [
        f"images of {len(classes)} classes, {height}x{width}, {kind}; {size_text(size)} {where}"
    ]
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
