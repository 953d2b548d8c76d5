"""Random generators from keys: no draw depends on earlier draws.

A key names what is drawn, as in `("student", epoch, step)`. A resumed run continues with the
numbers it would have had, and code that uses torch's global state changes nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Key = tuple[int | str, ...]


def seed_of(*key: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Make a generator on `device` whose state is a function of `key` alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@contextmanager
def global_generator(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators from `key` inside the context, and restore them after it."""
    device = torch.device(device)
    used = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(used):
        for each in (torch.default_generator, *(torch.cuda.default_generators[i] for i in used)):
            each.manual_seed(seed_of(*key))
        yield
