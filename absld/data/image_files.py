"""Image files: their pixels as RGB of 8 bits.

Only this module opens images. What it changes or skips is said in the notes of a set.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from absld.errors import DataError
from absld.text import first_of, printable

if TYPE_CHECKING:
    from PIL import Image

# Pillow goes by the content, whatever the suffix, and opens PostScript by running it.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Reading takes up to 15 bytes a pixel, 1 GiB. Cameras of 61 megapixels are within.
MOST_PIXELS, MOST_SIDE = 2**26, 2**16
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF
SHOWN = 10  # names in a message


class ImageReader:
    """Reads the files of a data set as squares of `side` pixels.

    Files that are not images are remembered, and refused together by `check`.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.faults: list[str] = []

    def read(self, part: str, paths: Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
        """Read files as (N,3,side,side) uint8, and describe what was read, for `part` of a set."""
        from torchvision.transforms.v2.functional import pil_to_tensor, resize

        images = torch.zeros(len(paths), 3, self.side, self.side, dtype=torch.uint8)
        traits: Counter[str] = Counter()
        sizes: set[tuple[int, int]] = set()
        for image, path in zip(images, paths, strict=True):
            try:
                picture, found = open_image(path)
                image.copy_(resize(pil_to_tensor(picture), [self.side, self.side]))
            except Exception as error:  # Pillow raises many kinds, and seldom names the file
                cause = str(error) or type(error).__name__  # a MemoryError says nothing
                self.faults.append(f"{printable(path)}: {cause.replace(f' {path!r}', '')}")
                continue
            sizes.add((picture.height, picture.width))
            traits.update(found)
        traits["of one constant colour"] = int(
            (images.amin((2, 3)) == images.amax((2, 3))).all(1).sum()
        )
        return images, (f"{part}: {len(paths)} files, images {self.describe(sizes, traits)}",)

    def describe(self, sizes: set[tuple[int, int]], traits: Counter[str]) -> str:
        """Describe the sizes of image files, and how many had traits that reading changed."""
        ends = [min(sizes, key=area), max(sizes, key=area)] if sizes else []
        text = " to ".join(dict.fromkeys(f"{height}x{width}" for height, width in ends))
        text = f"from {text}" if len(sizes) > 1 else f"of {text}"
        if sizes != {(self.side, self.side)}:
            text += f", resized to {self.side}x{self.side}"
        if any(height != width for height, width in sizes):
            text += " whatever their aspect ratio"
        return "; ".join([text, *(f"{n} {trait}" for trait, n in traits.items() if n)])

    def check(self) -> None:
        """Raise DataError for all files that could not be read: the first ten, and the number."""
        if self.faults:
            files = f"{len(self.faults)} files: " if len(self.faults) > 1 else ""
            raise DataError(
                f"cannot read {files}{first_of(self.faults, SHOWN, '; ')}",
                f"remove it (or all of them), or save it anew as {', '.join(FORMATS)}",
            )


def area(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return size[0] * size[1], size


def open_image(path: str) -> tuple["Image.Image", list[str]]:
    """Open an image file as RGB, upright; and name what this changed or left out.

    path: of a regular file, as `list_files` lists them; opening a pipe would wait for ever.
    """
    from PIL import Image, ImageOps

    traits = []
    with Image.open(path, formats=FORMATS) as image:
        check_size(*image.size)  # before the pixels are decoded
        if getattr(image, "is_animated", False):
            traits.append("of several frames, of which the first is read")
        if image.getexif().get(ORIENTATION) in range(2, 9):  # others mean nothing
            ImageOps.exif_transpose(image, in_place=True)
            traits.append("turned upright, as EXIF says")
        if Image.getmodebase(image.mode) == "L":
            traits.append("grey, read as RGB")
        elif image.mode != "RGB":
            traits.append(f"{image.mode}, read as RGB")
        if image.mode.endswith("A") or "transparency" in image.info:
            traits.append("whose transparency is dropped")
        if image.mode[0] in "IF":
            traits.append(f"of more than 8 bits ({image.mode}), scaled to 8")
            return to_8_bits(image).convert("RGB"), traits
        return image.convert("RGB"), traits


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image that would take too much memory."""
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        limits = f"{MOST_PIXELS:,} pixels, or {MOST_SIDE:,} a side"
        raise ValueError(f"{height}x{width} pixels, more than {limits}")


def to_8_bits(image: "Image.Image") -> "Image.Image":
    """Scale a grey image of 16 bits, or of floats in [0,1], to 8 bits.

    By the range of its type, not that of its values: the same for every image of a set. Raises
    ValueError for types without a range, and for values outside it.
    """
    import numpy as np
    from PIL import Image

    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "I" and tags:
        raise ValueError("mode I, integers of 32 bits, which have no range of grey")
    values = np.array(image, dtype=np.float64)
    # Integers are of 16 bits but in a TIFF, which may have 12.
    top = 1.0 if image.mode == "F" else 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    if not (values.min() >= 0 and values.max() <= top):  # NaN is neither
        raise ValueError(
            f"mode {image.mode} with {values.min():g}..{values.max():g}, not 0..{top:g}"
        )
    if tags.get(PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds in 8 bits only
        np.subtract(top, values, out=values)
    values *= 255 / top  # in place: eight bytes a pixel
    return Image.fromarray(values.round(out=values).astype(np.uint8))
