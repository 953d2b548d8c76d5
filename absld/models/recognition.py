"""The known network whose names and shapes a state dict has."""

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from absld.models.architectures import MODELS, find_model
from absld.models.state_dicts import fits, of_pixels, prefix_levels, read_names

# Where the WideResNets have the first convolution of block {} in their first group.
FIRST_GROUP = {"wrn": "block1.layer.{}.conv1.weight", "dm-wrn": "layer.0.block.{}.conv_0.weight"}


def recognise_architecture(raw: Mapping[str, Tensor]) -> str | None:
    """Return the known network with these names and shapes, but for classes and channels.

    Of those that share names and shapes, the first.
    """
    return next((name for name in candidates(raw) if has_shapes_of(name, raw)), None)


def has_shapes_of(name: str, raw: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has names and shapes of a network, but for classes and channels."""
    shapes = state_shapes(name)
    state = read_names(raw, shapes.keys()).state
    return fits(state, shapes.keys()) and all(
        of_pixels(key) or alike(tensor.shape, shapes[key]) for key, tensor in state.items()
    )


def alike(given: torch.Size, own: torch.Size) -> bool:
    """Return whether shapes are equal but for the classes, in front, and the three channels."""
    of_images = len(own) == 4 and own[1] == 3 and len(given) == 4
    return given[2:] == own[2:] if of_images else given[1:] == own[1:]


def candidates(raw: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the networks that a state dict may be of: WideResNets of its depth and width first."""
    yield from wide_names(raw)
    yield from MODELS


def wide_names(raw: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the WideResNets that have the first group of a state dict."""
    for names in prefix_levels(raw):
        for kind, place in FIRST_GROUP.items():
            blocks = 0
            while place.format(blocks) in names:
                blocks += 1
            if blocks:
                width = (*raw[names[place.format(0)]].shape, 0)[0]
                name = f"{kind}-{6 * blocks + 4}-{width // 16}"
                if width % 16 == 0 and find_model(name):
                    yield name


@functools.cache
def state_shapes(name: str) -> dict[str, torch.Size]:
    """Return the shapes of a known network's state dict, for two classes."""
    build = find_model(name)
    assert build
    with torch.device("meta"):  # no memory, no arithmetic
        return {key: tensor.shape for key, tensor in build(2).state_dict().items()}


def describe_nearest(raw: Mapping[str, Tensor], fitting: int = 0) -> str:
    """Describe the known network that shares most names with a file.

    Returns "" if it does not share more than `fitting` names.
    """
    names = list(candidates(raw))
    states = {name: read_names(raw, state_shapes(name).keys()).state for name in names}
    shared = {name: len(state_shapes(name).keys() & state.keys()) for name, state in states.items()}
    nearest = max(names, key=lambda name: shared[name])
    if shared[nearest] <= fitting:
        return ""
    own, state = state_shapes(nearest).keys(), states[nearest].keys()
    missing, unexpected = sorted(own - state)[:5], sorted(state - own)[:5]
    return f"the nearest known network is {nearest} (missing {missing}, unexpected {unexpected})"
