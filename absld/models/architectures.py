"""Networks by name: pixels (N,channels,H,W) in [0,1] of any size to logits (N,C).

Weights are named as in published checkpoints, those of ResNets as in torchvision.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from torch import nn

from absld.errors import UsageError
from absld.models.deepmind import deepmind_preactresnet18, deepmind_wide_resnet
from absld.models.layers import average_pool, conv
from absld.models.mobilenet import mobilenetv2
from absld.models.resnets import preactresnet18, resnet
from absld.models.wide_resnets import wide_resnet
from absld.seeding import Key, global_generator

T = TypeVar("T")
Builder = Callable[..., nn.Module]
"""A function of the number of classes and of `in_channels`, 3 by default."""

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

SMALL_RGB: Shape = (3, 32, 32)
LARGE = 96  # pixels of the shorter side, from which a network gets the stem for large images
OF_LARGE, OF_SMALL = "-imagenet", "-cifar"  # ends of names that choose the stem


def convnet(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Build three convolutions: for the 8x8 digits, and for quick runs on larger images."""
    return plain_convolutions((16, 32, 64), 1, num_classes, in_channels)


def convnet_wide(num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Build three stages of two convolutions: a teacher for the 8x8 digits, of 47 times the
    parameters of `convnet`."""
    return plain_convolutions((64, 128, 256), 2, num_classes, in_channels)


def plain_convolutions(
    widths: Sequence[int], depth: int, num_classes: int, in_channels: int
) -> nn.Sequential:
    """Build stages of `depth` convolutions without shortcuts; each but the first halves the image.

    widths: channels of each stage.
    """
    net, width_in = nn.Sequential(), in_channels
    for number, width in enumerate(widths):
        for layer in range(depth):
            stride = 2 if number and not layer else 1
            net.extend([conv(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
            width_in = width
    net.extend(average_pool())
    net.add_module("linear", nn.Linear(width_in, num_classes))
    return net


STEMS: dict[str, Builder] = {
    "resnet18": partial(resnet, "BasicBlock", (2, 2, 2, 2)),
    "resnet34": partial(resnet, "BasicBlock", (3, 4, 6, 3)),
    "resnet50": partial(resnet, "Bottleneck", (3, 4, 6, 3)),
    "preactresnet18": preactresnet18,
    "mobilenetv2": mobilenetv2,
}
"""The networks that have a stem for small images and, as `NAME-imagenet`, one for large ones."""

MODELS: dict[str, Builder] = {
    "convnet": convnet,
    "convnet-wide": convnet_wide,
    **STEMS,
    **{name + OF_LARGE: partial(build, large=True) for name, build in STEMS.items()},
    "preactresnet18-no-norm": partial(preactresnet18, last_norm=False, of_input=True),
    "preactresnet18-no-norm-activated": partial(preactresnet18, last_norm=False),
    "dm-preactresnet18": deepmind_preactresnet18,
    "dm-preactresnet18-relu": partial(deepmind_preactresnet18, activation=nn.ReLU),
}

WIDE: dict[str, Builder] = {
    "wrn": wide_resnet,
    "dm-wrn": deepmind_wide_resnet,
    "dm-wrn-relu": partial(deepmind_wide_resnet, activation=nn.ReLU),
}
"""Networks of a depth and a width, by their names without these numbers."""

KNOWN = (*MODELS, "wrn-DEPTH-WIDTH", "dm-wrn-DEPTH-WIDTH and dm-wrn-DEPTH-WIDTH-relu")


def find_model(name: str) -> Builder | None:
    """Return the function that builds the network `name`; None if there is none."""
    wide = re.fullmatch(r"(wrn|dm-wrn)-([1-9]\d{1,2})-([1-9]\d?)(-relu)?", name)
    if not wide:
        return MODELS.get(name)
    kind, depth, widening = wide[1] + (wide[4] or ""), int(wide[2]), int(wide[3])
    if kind not in WIDE or depth < 10 or depth % 6 != 4:
        return None
    return partial(WIDE[kind], depth, widening)


def name_for(name: str, image_shape: Shape) -> str:
    """Return the name of the network to build for images: one of two stems, by their size.

    Leaves names that choose the stem, and those of networks with one stem, as they are.
    """
    if (small := name.removesuffix(OF_SMALL)) in STEMS and small != name:
        return small
    return name + OF_LARGE if name in STEMS and min(image_shape[1:]) >= LARGE else name


def build_model(
    name: str, num_classes: int, *key: int | str, image_shape: Shape = SMALL_RGB
) -> nn.Module:
    """Build the network `name` with torch's default initial weights, drawn from `key` alone.

    image_shape: of the images. ResNets and MobileNetV2 have another stem for large ones, with a
    shorter side of 96 pixels or more; `NAME-cifar` and `NAME-imagenet` choose it.

    Raises UsageError for a name that is not known.
    """
    return build_exactly(name_for(name, image_shape), num_classes, image_shape[0], key)


def build_exactly(name: str, num_classes: int, in_channels: int, key: Key) -> nn.Module:
    """Build the network `name` whatever the size of the images; see `build_model`."""
    build = find_model(name)
    if not build:
        raise UsageError(
            f"there is no network {name!r}", f"there are: {', '.join(KNOWN)}; depth: 6n + 4"
        )
    return seeded(lambda: build(num_classes, in_channels), key)


def seeded(build: Callable[[], T], key: Key) -> T:
    """Call `build` with torch's random numbers, and so initial weights, drawn from `key`."""
    with global_generator(*key):
        return build()
