"""Image files: their pixels as RGB or grey of 8 bits.

Only this module opens images. What it changes or skips is said in the notes of a set.
"""

import io
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from absld.config.datasets import Resize

if TYPE_CHECKING:
    from PIL import Image

# Pillow goes by the content, whatever the suffix, and opens PostScript by running it.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Reading takes up to 15 bytes a pixel, 1 GiB. Cameras of 61 megapixels are within.
MOST_PIXELS, MOST_SIDE = 2**26, 2**16
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262  # tags of EXIF and TIFF


def area(size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    return size[0] * size[1], size


def open_image(path: str, channels: int = 3) -> tuple["Image.Image", list[str]]:
    """Open an image file as `convert` returns it.

    path: of a regular file, as `list_files` lists them; opening a pipe would wait for ever.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        return convert(image, channels)


def open_encoded(content: bytes) -> "Image.Image":
    """Open the bytes of an image file, for `convert`."""
    from PIL import Image

    return Image.open(io.BytesIO(content), formats=FORMATS)


def convert(image: "Image.Image", channels: int = 3) -> tuple["Image.Image", list[str]]:
    """Return an image as RGB, or grey for one channel, upright; and name what this changed."""
    from PIL import Image, ImageOps

    mode, name = ("RGB", "RGB") if channels == 3 else ("L", "grey")
    traits = []
    check_size(*image.size)  # before the pixels are decoded
    if getattr(image, "is_animated", False):
        traits.append("of several frames, of which the first is read")
    tags = getattr(image, "tag_v2", {})  # of a TIFF; a turned image has none
    if image.getexif().get(ORIENTATION) in range(2, 9):  # others mean nothing
        image = ImageOps.exif_transpose(image)  # a copy: the image may be somebody's
        traits.append("turned upright, as EXIF says")
    if Image.getmodebase(image.mode) == "L":
        if mode != "L":
            traits.append("grey, read as RGB")
    elif image.mode != mode:
        traits.append(f"{image.mode}, read as {name}")
    if image.mode.endswith("A") or "transparency" in image.info:
        traits.append("whose transparency is dropped")
    if image.mode[0] in "IF":
        traits.append(f"of more than 8 bits ({image.mode}), scaled to 8")
        image = to_8_bits(image, tags)
    return image.convert(mode), traits


def fit_size(image: "Image.Image", size: int | None, resize: Resize) -> Tensor:
    """Return an image (channels,H,W) uint8, resized to size x size unless that is None.

    crop: the shorter side to `size`, then the centre. squash: whatever the aspect ratio.
    """
    from torchvision.transforms.v2 import functional

    pixels: Tensor = functional.pil_to_tensor(image)
    if size is None:
        return pixels
    if resize == "squash":
        return functional.resize(pixels, [size, size])  # type: ignore[no-any-return]
    check_size(*(size * side // min(image.size) for side in image.size))
    return functional.center_crop(functional.resize(pixels, [size]), [size, size])  # type: ignore[no-any-return]


def describe_files(
    traits: Mapping[str, int], sizes: Collection[tuple[int, int]], size: int | None, resize: Resize
) -> str:
    """Describe the sizes (H,W) of images, and how many had traits that reading changed."""
    ends = [min(sizes, key=area), max(sizes, key=area)]
    text = " to ".join(dict.fromkeys(f"{height}x{width}" for height, width in ends))
    text = f"from {text}" if len(sizes) > 1 else f"of {text}"
    if size is not None and {*sizes} != {(size, size)}:
        text += f", resized to {size}x{size}"
        if any(height != width for height, width in sizes):
            text += " whatever their aspect ratio" if resize == "squash" else " by their centre"
    return "; ".join([text, *(f"{n} {trait}" for trait, n in traits.items() if n)])


def check_size(width: int, height: int) -> None:
    """Raise ValueError for an image that would take too much memory."""
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        limits = f"{MOST_PIXELS:,} pixels, or {MOST_SIDE:,} a side"
        raise ValueError(f"{height}x{width} pixels, more than {limits}")


def to_8_bits(image: "Image.Image", tags: Mapping[int, Any]) -> "Image.Image":
    """Scale a grey image of 16 bits, or of floats in [0,1], to 8 bits.

    By the range of its type, not that of its values: the same for every image of a set. tags: of a
    TIFF. Raises ValueError for types without a range, and for values outside it.
    """
    import numpy as np
    from PIL import Image

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
