"""Random numbers from keys: no draw depends on what was drawn before, here or elsewhere.

A key names what is drawn, as in `("student", epoch, step)`. A run that is interrupted continues
with the very numbers it would have had, and other code using torch's global state changes nothing.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Key = tuple[int | str, ...]


def generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` whose state is a function of `key` alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big"))


@contextmanager
def global_generator(*key: int | str) -> Iterator[None]:
    """Inside, torch's own initialisation draws from `key`; outside, its state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator(*key).get_state())
        yield
