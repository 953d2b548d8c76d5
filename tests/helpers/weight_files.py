"""Contents of weight files: their equality, and one that runs code."""

import os

import torch


def same(a, b):
    """Return whether both are equal in type and value, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and (a.dtype, a.shape) == (b.dtype, b.shape)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
