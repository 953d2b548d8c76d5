"""Data augmentation: random crops and horizontal flips, as numbered views of images."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from absld.attack import uniform_noise_
from absld.data.dataset import ImageSet, pixels
from absld.norms import Norm
from absld.seeding import generator

Start = Literal["normal", "uniform"]


class Batch(NamedTuple):
    """Images with what a training step needs beside them.

    Attributes:
        x_nat: (n,channels,H,W), clean augmented images in [0,1].
        labels: (n,) in 0..C-1.
        noise: where the attack starts, relative to x_nat.
        views: (n,) numbers of the augmented views (`Views.numbers`), for a teacher whose logits
            are cached; None for any other.
    """

    x_nat: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    noise: Float[Tensor, "n channels height width"]
    views: Int[Tensor, " n"] | None = None


class Draw(NamedTuple):
    """The random choices of a batch (n,): images, offsets of crops, flips, and the noise.

    rows: the numbers of the images once more, where the set reads them without a wait.
    """

    images: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    dy: Int[Tensor, " n"]
    dx: Int[Tensor, " n"]
    mirror: Bool[Tensor, " n"]
    noise: Float[Tensor, "n channels height width"]


def view_count(images: int, padding: int) -> int:
    """Count the views of a number of images: crops at every offset, and their mirror images."""
    return 2 * (2 * padding + 1) ** 2 * images


class Views:
    """The augmented views of a set: crops of the zero-padded images, and their mirror images."""

    def __init__(self, data: ImageSet, padding: int) -> None:
        self.data, self.padding = data, padding
        self.side = 2 * padding + 1  # offsets of a crop in each direction

    def __call__(
        self,
        index: Int[Tensor, " n"],
        dy: Int[Tensor, " n"],
        dx: Int[Tensor, " n"],
        mirror: Tensor,
    ) -> Float[Tensor, "n channels height width"]:
        """Crop images at row `dy`, column `dx` (0 to twice the padding); flip where `mirror`."""
        _, height, width = self.data.image_shape
        padded = F.pad(self.data.rows(index), [self.padding] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # shares the memory
        crop = pixels(windows[torch.arange(len(dy), device=dy.device), :, dy, dx])
        return torch.where(mirror.view(-1, 1, 1, 1), crop.flip(3), crop)

    def batch(self, draw: Draw) -> Batch:
        """Make the batch of a draw."""
        images, rows, dy, dx, mirror, noise = draw
        return Batch(self(rows, dy, dx, mirror), self.data.labels[images], noise)

    def __len__(self) -> int:
        """Count all views of all images."""
        return view_count(len(self.data), self.padding)

    def numbers(self, draw: Draw) -> Int[Tensor, " n"]:
        """Return the number of each view of a draw: by flip, image, row and column."""
        place = (draw.images * self.side + draw.dy) * self.side + draw.dx
        return draw.mirror * (len(self) // 2) + place

    def of_numbers(self, numbers: Int[Tensor, " n"]) -> Float[Tensor, "n channels height width"]:
        """Return the views of these numbers."""
        mirror, place = numbers >= len(self) // 2, numbers % (len(self) // 2)
        dx, dy = place % self.side, place // self.side % self.side
        return self(place // self.side**2, dy, dx, mirror)


def steps_per_epoch(images: int, batch_size: int, max_steps: int | None = None) -> int:
    """Count the whole batches in a number of images; a short last batch is dropped."""
    steps = images // batch_size
    return steps if max_steps is None else min(steps, max_steps)


def draws(
    views: Views,
    *key: int | str,
    batch_size: int,
    flip: float,
    start: Start = "normal",
    radius: float,
    norm: Norm = "linf",
    steps: int,
    first_step: int = 0,
) -> Iterator[Draw]:
    """Draw the augmentations and noises of an epoch; each depends on `key` and its step alone.

    flip: probability of a horizontal flip. start, radius: see `draw_noise`.
    """
    data, device = views.data, views.data.device
    dtype = data.dtype if data.dtype.is_floating_point else torch.get_default_dtype()
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    order = torch.randperm(len(data), generator=generator(*key, device=device), device=device)
    rows = order.to(data.index_device)  # once an epoch, not once a step
    for step in range(first_step, steps):
        random = generator(*key, step, device=device)
        batch = slice(step * batch_size, (step + 1) * batch_size)
        index = order[batch]
        n = len(index)
        dy, dx = torch.randint(views.side, (2, n), generator=random, device=device)
        mirror = torch.rand(n, generator=random, device=device) < flip
        noise = draw_noise(torch.empty(n, *data.image_shape, **kind), start, radius, norm, random)
        yield Draw(index, rows[batch], dy, dx, mirror, noise)


def draw_noise(
    like: Float[Tensor, "n channels height width"],
    start: Start,
    radius: float,
    norm: Norm,
    random: torch.Generator,
) -> Float[Tensor, "n channels height width"]:
    """Draw the starts of an attack, relative to the images, of the shape and type of `like`.

    start: their distribution; radius: its standard deviation if normal, the radius of its ball in
    the norm if uniform, in pixels.
    """
    source = torch.randn if start == "normal" else torch.rand
    noise = source(like.shape, generator=random, device=like.device, dtype=like.dtype)
    if start == "uniform":
        noise = 2 * noise - 1 if norm == "linf" else uniform_noise_(noise, 1.0, norm, random)
    return radius * noise


def held_out_batches(
    data: ImageSet, *key: int | str, batch_size: int, start: Start, radius: float, norm: Norm
) -> Iterator[Batch]:
    """Make batches of all images of a set as they are, in order, with starts of an attack.

    The noise of a batch depends on `key` and its number alone; start, radius: see `draw_noise`.
    """
    for number, (images, labels) in enumerate(data.batches(batch_size)):
        x_nat, random = pixels(images), generator(*key, number, device=data.device)
        # Clones: the set may have been made in inference mode, and a method needs gradients.
        yield Batch(x_nat, labels.clone(), draw_noise(x_nat, start, radius, norm, random))


def batches(views: Views, *key: int | str, **settings: Any) -> Iterator[Batch]:
    """Make the batches of an epoch; key and settings are those of `draws`."""
    for draw in draws(views, *key, **settings):
        yield views.batch(draw)
