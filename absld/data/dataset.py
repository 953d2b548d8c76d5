"""Images as tensors: sets, their splits, and random views of them.

A set lies whole on the device as uint8; a view of an image (crop, mirror) is a tensor operation
with explicit offsets. No worker processes, no global random state.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
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


def pixels(images: Tensor) -> Tensor:
    """Images as floating pixels in [0,1]."""
    return images if images.is_floating_point() else images / 255


# --- Views ---


class Batch(NamedTuple):
    """x_nat (n,channels,H,W) in [0,1], labels (n,), and the noise that starts the attack."""

    x_nat: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    noise: Float[Tensor, "n channels height width"]


class Draw(NamedTuple):
    """What a batch is made of: numbers of images (n,), offsets of their crops (n,), which are
    mirrored (n,), and the noise."""

    images: Int[Tensor, " n"]
    dy: Int[Tensor, " n"]
    dx: Int[Tensor, " n"]
    mirror: Bool[Tensor, " n"]
    noise: Float[Tensor, "n channels height width"]


def view_count(images: int, padding: int) -> int:
    """How many views so many images have: crops at every offset, and their mirrors."""
    return 2 * (2 * padding + 1) ** 2 * images


class Views:
    """The views of a set: every crop of the zero-padded image at its own size, and its mirror."""

    def __init__(self, data: ImageSet, padding: int) -> None:
        self.data, self.padding = data, padding
        self.side = 2 * padding + 1  # offsets of a crop in each direction
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

    def batch(self, draw: Draw) -> Batch:
        """The batch of a draw."""
        images, dy, dx, mirror, noise = draw
        return Batch(self(images, dy, dx, mirror), self.data.labels[images], noise)

    def __len__(self) -> int:
        """The number of all views of all images."""
        return view_count(len(self.data), self.padding)

    def numbers(self, draw: Draw) -> Int[Tensor, " n"]:
        """The number of each view of a draw: mirrors come last, and those of an image together."""
        place = (draw.images * self.side + draw.dy) * self.side + draw.dx
        return draw.mirror * (len(self) // 2) + place

    def of_numbers(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, "n channels height width"]:
        """The views of these numbers."""
        mirror, place = numbers >= len(self) // 2, numbers % (len(self) // 2)
        dx, dy = place % self.side, place // self.side % self.side
        return self(place // self.side**2, dy, dx, mirror)


def steps_per_epoch(images: int, batch_size: int, max_steps: int | None = None) -> int:
    """Whole batches in so many images; a short last batch is dropped."""
    steps = images // batch_size
    return steps if max_steps is None else min(steps, max_steps)


def draws(
    views: Views,
    *key: int | str,
    batch_size: int,
    flip: float,
    start: Literal["normal", "uniform"] = "normal",
    radius: float,
    steps: int,
    first_step: int = 0,
) -> Iterator[Draw]:
    """The draws of an epoch from `first_step` on; each is a function of `key` and its number.

    flip: probability of a mirror image. start: how the noise is distributed; radius: its deviation
    if normal, its greatest value if uniform, in pixels.
    """
    data, device = views.data, views.data.labels.device
    order = torch.randperm(len(data), generator=generator(*key, device=device), device=device)
    for step in range(first_step, steps):
        random = generator(*key, step, device=device)
        index = order[step * batch_size : (step + 1) * batch_size]
        n = len(index)
        dy, dx = torch.randint(views.side, (2, n), generator=random, device=device)
        mirror = torch.rand(n, generator=random, device=device) < flip
        kind = data.images.dtype if data.images.is_floating_point() else torch.get_default_dtype()
        shape, source = (
            (n, *data.images.shape[1:]),
            torch.randn if start == "normal" else torch.rand,
        )
        noise = source(shape, generator=random, device=device, dtype=kind)
        if start == "uniform":
            noise = 2 * noise - 1
        yield Draw(index, dy, dx, mirror, radius * noise)


def batches(views: Views, *key: int | str, **settings: Any) -> Iterator[Batch]:
    """The batches of an epoch; key and settings are those of `draws`."""
    for draw in draws(views, *key, **settings):
        yield views.batch(draw)
