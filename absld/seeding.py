"""Random numbers from keys: no draw depends on what was drawn before, here or elsewhere.

A key names what is drawn, as in `("student", epoch, step)`. A run that is interrupted continues
with the very numbers it would have had, and other code using torch's global state changes nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Key = tuple[int | str, ...]


def seed_of(*key: int | str) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose state is a function of `key` alone."""
    return torch.Generator(device).manual_seed(seed_of(*key))


@contextmanager
def global_generator(*key: int | str, device: torch.device | str = "cpu") -> Iterator[None]:
    """Inside, what draws from torch's global generators draws from `key`; outside, their state is
    as before."""
    device = torch.device(device)
    used = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(used):
        for each in (torch.default_generator, *(torch.cuda.default_generators[i] for i in used)):
            each.manual_seed(seed_of(*key))
        yield
