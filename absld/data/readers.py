"""Readers: pictures by number, from image files or from somebody's dataset."""

import hashlib
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from absld.config.datasets import Channels
from absld.data.image_files import FORMATS, convert, open_image
from absld.shapes import describe_kind
from absld.storage.opening import open_regular
from absld.text import printable

if TYPE_CHECKING:
    from PIL import Image

READ = 2**20  # bytes of a file at once
OnRead = Callable[[int], None]  # receives the number of files that were read


class IndexedImages(Protocol):
    """A torch Dataset, or anything else that gives (image, label) for an index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Picture(NamedTuple):
    """An image of 8 bits, RGB or grey, its label, and what reading it changed."""

    image: "Image.Image"
    label: int
    traits: list[str]


class Reader(Protocol):
    """Pictures by number.

    noun: what they are read from. hint: what to do where some cannot be read. parallel: whether
    several threads may read at once.
    """

    @property
    def noun(self) -> str: ...
    @property
    def hint(self) -> str: ...
    @property
    def parallel(self) -> bool: ...
    def __len__(self) -> int: ...
    def read(self, number: int) -> Picture: ...
    def name(self, number: int) -> str:
        """Name an image in a message."""
        ...

    def key(self, on_read: OnRead) -> str:
        """Return what identifies the content; "" if nothing does."""
        ...


@dataclass(frozen=True)
class FileReader:
    """Reads image files with their labels; `folder` is above them all."""

    folder: str
    files: Sequence[tuple[str, int]]
    channels: Channels
    noun = "files"
    hint = f"remove it (or all of them), or save it anew as {', '.join(FORMATS)}"
    parallel = True

    def __len__(self) -> int:
        return len(self.files)

    def read(self, number: int) -> Picture:
        """Read a file. Raises whatever Pillow raises."""
        path, label = self.files[number]
        image, traits = open_image(path, self.channels)
        return Picture(image, label, traits)

    def name(self, number: int) -> str:
        return self.files[number][0]

    def key(self, on_read: OnRead) -> str:
        """Compute the SHA-256 of names, labels and bytes of all files."""
        sha = hashlib.sha256()
        for number, (path, label) in enumerate(self.files, 1):
            name = os.fsencode(os.path.relpath(path, self.folder))
            sha.update(f"{len(name)} {label} {os.path.getsize(path)} ".encode() + name)
            with open_regular(Path(path)) as file:
                while part := file.read(READ):
                    sha.update(part)
            on_read(number)
        return sha.hexdigest()


@dataclass(frozen=True)
class DatasetReader:
    """Reads somebody's dataset; content: what identifies it."""

    source: IndexedImages
    num_classes: int
    channels: Channels
    content: str
    noun = "images"
    hint = (
        "needed: (image, label), of PIL, uint8 (H,W,channels), or a tensor (channels,H,W) in [0,1]"
    )
    parallel = False  # nobody says that it may be

    def __len__(self) -> int:
        return len(self.source)

    def read(self, number: int) -> Picture:
        """Read an image. Raises whatever the dataset raises, and ValueError."""
        item = self.source[number]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
            raise ValueError(f"{printable(type(item).__name__)}{size}, not (image, label)")
        image, given = item
        try:
            label = operator.index(given)
        except TypeError as error:
            shown = printable(repr(given)[:40])
            raise ValueError(f"label {shown} is not a whole number") from error
        if not 0 <= label < self.num_classes:
            raise ValueError(f"label {label} is not in 0..{self.num_classes - 1}")
        converted, traits = convert(to_picture(image), self.channels)
        if isinstance(image, Tensor) and image.is_floating_point():
            traits.append("of floats, rounded to 8 bits")
        return Picture(converted, label, traits)

    def name(self, number: int) -> str:
        return f"image {number}"

    def key(self, on_read: OnRead) -> str:
        """Compute the SHA-256 of `content`, the number of images, and the first and last of them."""
        if not self.content:
            return ""
        sha = hashlib.sha256(f"{self.content} {len(self)}".encode())
        try:
            for number in (0, len(self) - 1):
                image, label, _ = self.read(number)
                sha.update(f"{label} {image.size} ".encode() + image.tobytes())
        except Exception:  # a dataset raises anything; decoding it names the images at fault
            return ""
        return sha.hexdigest()


def to_picture(image: Any) -> "Image.Image":
    """Return an image of PIL, an array or a tensor as one of PIL. Raises ValueError."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Tensor):
        values = image.detach().cpu()
        if values.is_floating_point():
            if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
                raise ValueError(f"pixels in {values.min():g}..{values.max():g}, not in [0,1]")
            values = (255 * values).round().to(torch.uint8)
        image = (values.movedim(0, -1) if values.ndim == 3 else values).numpy()
    if not (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.size
        and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4)))
    ):
        kind = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else ""
        raise ValueError(f"{kind or printable(describe_kind(image))} is not an image")
    return Image.fromarray(
        np.ascontiguousarray(image[..., 0] if image.shape[2:] == (1,) else image)
    )
