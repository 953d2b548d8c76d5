"""Where the images of a set are kept: in memory, or in a memory-mapped file."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from absld.config.datasets import InMemory
from absld.data.dataset import ImageSet, InMemoryImages, size_text
from absld.data.mapped import Header, MappedImages, cache_folder, open_or_write
from absld.errors import DataError
from absld.progress import Observer
from absld.storage.files import raw_bytes

OF_MEMORY, OF_DEVICE = 0.5, 0.25  # of what is available, for `auto`
# Sets from this size on are decoded into a file, and read from there when they are to be in memory.
LARGE = 2**28
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Placement:
    """Where images are to be kept, and the device of their batches; see `--in-memory`."""

    in_memory: InMemory = "auto"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    observer: Observer = field(default_factory=Observer)

    def fits(self, size: int) -> bool:
        """Return whether images of this size are to be in memory.

        Raises DataError if they are to be, and more than the memory that is available.
        """
        host, device = available_memory(), device_memory(self.device)
        if self.in_memory == "yes" and size > min(host, device):
            raise DataError(
                f"images of {size_text(size)} do not fit in {size_text(min(host, device))} of memory",
                "--in-memory no, or a smaller --image-size",
            )
        small = size <= OF_MEMORY * host and size <= OF_DEVICE * device
        return self.in_memory == "yes" or (self.in_memory == "auto" and small)

    def place(self, data: ImageSet) -> ImageSet:
        """Return the set in memory or mapped, as it is to be."""
        if isinstance(data, MappedImages):
            if not self.fits(data.size):
                return data
            self.observer.note(f"reading {size_text(data.size)} into memory")
            return data.in_memory()
        if isinstance(data, InMemoryImages) and self.in_memory == "no":
            return map_images(data, self.observer)
        return data


def map_images(data: InMemoryImages, observer: Observer) -> MappedImages:
    """Write a set of uint8 images into a cache, and return it mapped from there."""
    path = cache_folder() / f"{data.digest()}.images"
    labels = data.labels.cpu()

    def write(file: IO[bytes]) -> Header:
        file.write(raw_bytes(data.images))
        return Header(tuple(data.images.shape), labels, "")

    source, _ = open_or_write(path, write, observer)
    return MappedImages(source, torch.arange(len(data)), labels, data.classes, data.notes)


def available_memory() -> int:
    """Return how many bytes of memory the host can still give, as far as the system tells."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux
        names = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")
        known = hasattr(os, "sysconf") and all(name in os.sysconf_names for name in names)
        available = os.sysconf(names[0]) * os.sysconf(names[1]) if known else 2**33
    for limit in LIMITS:  # of a container
        try:
            available = min(available, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none, or "max"
            continue
    return available


def device_memory(device: torch.device) -> int:
    """Return how many bytes a CUDA device has free; without bound for any other."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 2**63
