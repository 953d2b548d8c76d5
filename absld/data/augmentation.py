"""Augmented views of images: random crops and mirror images, drawn by number."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from absld.data.dataset import ImageSet, pixels
from absld.seeding import generator


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
