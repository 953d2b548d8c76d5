"""CIFAR-10, CIFAR-100 and SVHN from their published archives, read by torchvision."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from absld.data.archives import provide, refuse_irregular, unpack_tar
from absld.data.dataset import InMemoryImages
from absld.progress import Observer

Part = Literal["train", "test"]


def load_whole(load: Callable[[], list[Any]], get: Callable[[], None]) -> list[Any]:
    """Load by torchvision, which checks the MD5 of files; get them if one is missing or not whole."""
    with suppress(RuntimeError, OSError):
        return load()
    get()
    return load()


def cifar(
    dataset: str, folder: str, parts: Sequence[Part], observer: Observer
) -> list[InMemoryImages]:
    """Load CIFAR-10 or CIFAR-100, unpacked or in its archive, which is downloaded if missing.

    Its batches are pickles; torchvision reads none whose MD5 is not that of the published file.
    """
    from torchvision import datasets

    source = getattr(datasets, dataset.upper())
    names = [name for name, _ in [*source.train_list, *source.test_list]]
    names.append(source.meta["filename"])

    unpacked = Path(folder, source.base_folder)

    def get() -> None:
        refuse_irregular([unpacked, *(unpacked / name for name in names)])
        provide([dataset], folder, observer, lambda path: unpack_tar(path, unpacked.name, names))

    found = load_whole(lambda: [source(folder, train=part == "train") for part in parts], get)
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in found]
    return [image_set(x, part.targets, part.classes) for x, part in zip(images, found, strict=True)]


def svhn(folder: str, parts: Sequence[Part], observer: Observer) -> list[InMemoryImages]:
    """Load Street View House Numbers from train_32x32.mat and test_32x32.mat in `folder`.

    They are downloaded if missing. The extra training images are not used.
    """
    from torchvision import datasets

    found = load_whole(
        lambda: [datasets.SVHN(folder, split=part) for part in parts],
        lambda: provide([f"svhn-{part}" for part in parts], folder, observer),
    )
    return [image_set(part.data, part.labels, "0123456789") for part in found]


def image_set(images: Any, labels: Any, classes: Iterable[str]) -> InMemoryImages:
    """Make a set of arrays or lists."""
    return InMemoryImages(torch.as_tensor(images), torch.as_tensor(labels).long(), tuple(classes))
