"""Decoding: images of files or of a dataset become an image set, in memory or mapped."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, NamedTuple, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor

from absld.config.datasets import Channels, InMemory, Resize
from absld.config.settings import Config
from absld.data.dataset import ImageSet, InMemoryImages, check_classes, size_text
from absld.data.image_files import describe_files, fit_size
from absld.data.mapped import Header, MappedImages, cache_folder, open_or_write
from absld.data.placement import LARGE, Placement
from absld.data.readers import DatasetReader, IndexedImages, Picture, Reader
from absld.errors import DataError
from absld.progress import Observer
from absld.storage.files import raw_bytes
from absld.text import first_of, printable

VERSION = 1  # of what decoding computes
SHOWN = 10  # names in a message
TOGETHER = 2**24  # bytes that are decoded before they are written
THREADS = min(4, os.cpu_count() or 1)  # each may hold a photograph


@dataclass(frozen=True)
class Form:
    """The form in which images are decoded; size: None keeps that of the images."""

    size: int | None = 32
    resize: Resize = "squash"
    channels: Channels = 3

    @classmethod
    def of(cls, config: Config) -> "Form":
        """Return the form of a run's images."""
        return cls(config.image_size, config.resize, config.channels)


def decode(
    source: IndexedImages,
    classes: Sequence[str],
    *,
    size: int | None = None,
    resize: Resize = "squash",
    channels: Channels = 3,
    in_memory: InMemory = "auto",
    key: str = "",
    part: str = "images",
    device: torch.device | str = "cpu",
    observer: Observer | None = None,
) -> ImageSet:
    """Make an image set of a torch Dataset, or of anything that gives (image, label) by index.

    Args:
        source: its images are of PIL, arrays (H,W) or (H,W,channels) uint8, or tensors
            (channels,H,W), uint8 or floating in [0,1]; its labels are numbers of classes.
        classes: their names.
        size: resize images to squares of this side; None: all have one shape, and keep it.
        resize: squash them, or resize the shorter side and take the centre.
        channels: 3 for RGB, 1 for grey.
        in_memory: keep the images in memory, or in a memory-mapped file; see `--in-memory`.
        key: names the content, such as a fingerprint, so that its file is used again: one key for
            each set. Without one, the content is found by decoding.
        part: names the set in messages.
        device: of the batches.
        observer: receives the progress.

    Raises:
        DataError: with the option or the images at fault.
    """
    check_classes(classes)
    form = Form(size, resize, channels)
    check_options(form, in_memory)
    placement = Placement(in_memory, torch.device(device), observer or Observer())
    # Two sets by mistake of one key mostly differ in these, and in what the reader adds.
    content = repr((key, part, tuple(classes))) if key else ""
    reader = DatasetReader(source, len(classes), channels, content)
    return placement.place(decode_all(reader, classes, form, part, placement)).to(device)


def check_options(form: Form, in_memory: str) -> None:
    """Raise DataError for values that options of `decode` cannot have."""
    for name, value, known in (
        ("resize", form.resize, get_args(Resize)),
        ("channels", form.channels, get_args(Channels)),
        ("in_memory", in_memory, get_args(InMemory)),
    ):
        if value not in known:
            raise DataError(f"{name}={value!r}", f"one of {', '.join(map(repr, known))}")
    if form.size is not None and (type(form.size) is not int or form.size < 1):
        raise DataError(f"size={form.size!r}", "a number of pixels, 1 or more, or None")


def decode_all(
    reader: Reader, classes: Sequence[str], form: Form, part: str, placement: Placement
) -> InMemoryImages | MappedImages:
    """Decode all images of a reader, on the CPU.

    The set is in memory if it is small and is to be there; else in a file, decoded only if there is
    none of the same content. Raises DataError.
    """
    decoding = Decoding(reader, form, part, placement.observer)
    size = len(reader) * math.prod(decoding.shape)
    if placement.fits(size) and size < LARGE:
        images, done = torch.empty((len(reader), *decoding.shape), dtype=torch.uint8), 0
        for chunk in decoding.chunks():
            images[done : done + len(chunk)] = chunk
            done += len(chunk)
        header = decoding.header()
        notes = (f"{part}: {header.description}",)
        return InMemoryImages(images, header.labels, tuple(classes), notes)
    observer = placement.observer
    path = cache_folder() / f"{decoding.key()}.images"
    file_name = f"{path.parent}/{path.stem[:8]}..."
    observer.note(f"{part}: {len(reader):,} images, {size_text(size)} in {file_name}")

    def write(file: IO[bytes]) -> Header:
        for chunk in decoding.chunks():
            file.write(raw_bytes(chunk))
        return decoding.header()

    mapped, header = open_or_write(path, write, observer)
    notes = (f"{part}: {header.description}",)
    return MappedImages(mapped, torch.arange(len(reader)), header.labels, tuple(classes), notes)


class Decoded(NamedTuple):
    """An image in the form of its set, what it was read from, and what is wrong with it."""

    pixels: UInt8[Tensor, "channels height width"] | None
    picture: Picture | None
    fault: str = ""


class UnreadableError(DataError):
    """Images that cannot be read; faults: what is wrong with each, in a line."""

    faults: Sequence[str] = ()


def unreadable(faults: Sequence[str], reader: Reader) -> UnreadableError:
    """Return the error for images that cannot be read: the first ten, and their number."""
    number = f"{len(faults)} {reader.noun}: " if len(faults) > 1 else ""
    error = UnreadableError(f"cannot read {number}{first_of(faults, SHOWN, '; ')}", reader.hint)
    error.faults = faults
    return error


class Decoding:
    """The decoding of a reader's images: passes over all of them, and what the last one found."""

    def __init__(self, reader: Reader, form: Form, part: str, observer: Observer) -> None:
        self.reader, self.form, self.part, self.observer = reader, form, part, observer
        self.passes: set[str] | None = None  # digests of what was decoded; None if nobody asks
        if not len(reader):
            raise DataError(f"{part}: no images", reader.hint)
        size = form.size
        self.shape: tuple[int, ...] = (form.channels, size, size) if size else ()
        self.start()
        if not size:
            self.shape = tuple(self.found(self.decode_one(0), 0).shape)
            self.refuse_faults()

    def start(self) -> None:
        """Forget what was found."""
        self.faults: list[str] = []
        self.traits: Counter[str] = Counter()
        self.sizes: set[tuple[int, int]] = set()
        self.labels = torch.zeros(len(self.reader), dtype=torch.long)
        self.colours = set[tuple[int, ...]]()  # the least and the greatest values: one, if constant

    def chunks(self) -> Iterator[UInt8[Tensor, "n channels height width"]]:
        """Decode all images in order, some at a time; zeros stand for those at fault."""
        self.start()
        sha = hashlib.sha256()
        count, together = len(self.reader), max(1, TOGETHER // math.prod(self.shape))
        with ThreadPoolExecutor(THREADS if self.reader.parallel else 1) as threads:
            for start in range(0, count, together):
                numbers = range(start, min(start + together, count))
                decoded = threads.map(self.decode_one, numbers)
                images = torch.stack([*map(self.found, decoded, numbers)])
                low, high = images.amin((2, 3)), images.amax((2, 3))
                self.traits["of one constant colour"] += int((low == high).all(1).sum())
                self.colours |= {tuple(low.amin(0).tolist()), tuple(high.amax(0).tolist())}
                if self.passes is not None:
                    sha.update(raw_bytes(images))
                self.observer.load(f"reading {self.part}", numbers.stop, count, "images")
                yield images
        if self.passes is not None:
            sha.update(raw_bytes(self.labels))
            self.passes.add(sha.hexdigest())

    def decode_one(self, number: int) -> Decoded:
        """Decode an image; called by several threads."""
        try:
            picture = self.reader.read(number)
            pixels = fit_size(picture.image, self.form.size, self.form.resize)
            if self.shape and pixels.shape != self.shape:
                raise ValueError(
                    f"{'x'.join(map(str, pixels.shape[1:]))} pixels, the first image has "
                    f"{'x'.join(map(str, self.shape[1:]))}: a size is needed"
                )
        except Exception as error:  # Pillow raises many kinds, and seldom names the file
            name = self.reader.name(number)
            cause = str(error)
            if isinstance(error, LookupError) or not cause:  # a key alone, or nothing, says little
                cause = f"{type(error).__name__}: {cause}".removesuffix(": ")
            return Decoded(None, None, f"{printable(name)}: {cause.replace(f' {name!r}', '')}")
        return Decoded(pixels, picture)

    def found(self, decoded: Decoded, number: int) -> UInt8[Tensor, "channels height width"]:
        """Note what was found in an image; return its pixels."""
        pixels, picture, fault = decoded
        if pixels is None or picture is None:
            self.faults.append(fault)
            return torch.zeros(self.shape or (self.form.channels, 1, 1), dtype=torch.uint8)
        self.sizes.add((picture.image.height, picture.image.width))
        self.traits.update(picture.traits)
        self.labels[number] = picture.label
        return pixels

    def header(self) -> Header:
        """Describe the images of a whole pass.

        Raises DataError if some could not be read, two passes differ, or all images are of one
        constant colour.
        """
        self.refuse_faults()
        if self.passes is not None and len(self.passes) > 1:
            raise DataError(
                f"{self.part}: the images differ each time they are read",
                "leave random transforms out of the dataset",
            )
        count, form = len(self.reader), self.form
        if len(self.colours) == 1:
            raise DataError(
                f"{self.part}: all {count} images are one constant colour",
                "check how they were saved: their pixels are lost",
            )
        found = describe_files(self.traits, self.sizes, form.size, form.resize)
        description = f"{count} {self.reader.noun}, images {found}"
        return Header((count, *self.shape), self.labels, description)

    def refuse_faults(self) -> None:
        """Raise UnreadableError if images of the last pass could not be read."""
        if self.faults:
            raise unreadable(self.faults, self.reader)

    def key(self) -> str:
        """Compute what names the cache: the content, the form, and the versions that decode it."""
        import PIL
        import torchvision

        name, count = f"reading {self.part}", len(self.reader)
        content = self.reader.key(lambda n: self.observer.load(name, n, count, "files"))
        if not content:
            self.passes = set()
            for _ in self.chunks():
                pass
            self.header()
            (content,) = self.passes
        what = (VERSION, self.form, PIL.__version__, torchvision.__version__, content)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:32]
