"""Networks by name: pixels (N,3,H,W) in [0,1] of any size to logits (N,C).

Weights are named as in published checkpoints, those of ResNets as in torchvision.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from absld.errors import UsageError
from absld.seeding import Key, global_generator

T = TypeVar("T")


def conv(width_in: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=False)


def chain(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under these names."""
    return nn.Sequential(OrderedDict(layers))


def average_pool() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def convnet(num_classes: int) -> nn.Sequential:
    """Build three convolutions: for the 8x8 digits, and for quick runs on larger images."""
    net = nn.Sequential()
    for width_in, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        net.extend([conv(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
    net.extend(average_pool())
    net.add_module("linear", nn.Linear(64, num_classes))
    return net


def projection(width_in: int, width: int, stride: int) -> nn.Sequential:
    """Build the shortcut of a block: empty where it changes neither width nor size."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    return nn.Sequential(conv(width_in, width, stride, size=1), nn.BatchNorm2d(width))


def resnet(block: str, depths: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build a ResNet (arXiv 1512.03385) for small images: a 3x3 stem without pooling.

    block: name in torchvision; depths: blocks of each stage.
    """
    from torchvision.models import resnet as torchvision_resnet  # slow to import

    kind = getattr(torchvision_resnet, block)
    net, width_in = chain(conv1=conv(3, 64), bn1=nn.BatchNorm2d(64), relu=nn.ReLU()), 64
    for number, depth in enumerate(depths):
        width, stride = 64 * 2**number, 2 if number else 1
        wide = width * kind.expansion
        resize = projection(width_in, wide, stride)
        stage = nn.Sequential(kind(width_in, width, stride, resize if len(resize) else None))
        stage.extend(kind(wide, width) for _ in range(depth - 1))
        net.add_module(f"layer{number + 1}", stage)
        width_in = wide
    net.add_module("pool", average_pool())
    net.add_module("linear", nn.Linear(width_in, num_classes))
    return net


class PreActBlock(nn.Module):
    """Pre-activation block (arXiv 1603.05027); a projection starts after the first activation.

    wide: name the projection as published WideResNets do, not as published ResNets.
    """

    def __init__(self, width_in: int, width: int, stride: int, wide: bool = False) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.projection = ""
        if stride != 1 or width_in != width:
            self.projection = "convShortcut" if wide else "shortcut"
            resize = conv(width_in, width, stride, size=1)
            self.add_module(self.projection, resize if wide else nn.Sequential(resize))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        passed = self.get_submodule(self.projection)(out) if self.projection else x
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + passed


def preactresnet18(num_classes: int) -> nn.Sequential:
    """Build ResNet-18 of pre-activation blocks, with a batch norm at the end."""
    net = chain(conv1=conv(3, 64))
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    for number, (width_in, width, stride) in enumerate(widths, 1):
        first = PreActBlock(width_in, width, stride)
        stage = nn.Sequential(first, PreActBlock(width, width, stride=1))
        net.add_module(f"layer{number}", stage)
    net.add_module("bn", nn.BatchNorm2d(512))
    net.add_module("relu", nn.ReLU())
    net.add_module("pool", average_pool())
    net.add_module("linear", nn.Linear(512, num_classes))
    return net


class InvertedBlock(nn.Module):
    """Inverted residual block (arXiv 1801.04381): 1x1 widens, depthwise 3x3, linear 1x1 narrows."""

    def __init__(self, width_in: int, width: int, widening: int, stride: int) -> None:
        super().__init__()
        wide = widening * width_in
        self.stride = stride
        self.conv1, self.bn1 = conv(width_in, wide, size=1), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, width, size=1), nn.BatchNorm2d(width)
        self.shortcut = projection(width_in, width, 1) if stride == 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            out = out + self.shortcut(x)
        narrow: Tensor = out
        return narrow


# Widening, width, blocks, stride of the first.
MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(num_classes: int) -> nn.Sequential:
    """Build MobileNetV2 for small images: strides of the stem and the first two stages are 1."""
    stem = {"conv1": conv(3, 32), "bn1": nn.BatchNorm2d(32), "relu1": nn.ReLU()}
    layers, width_in = nn.Sequential(), 32
    for widening, width, blocks, stride in MOBILENET_STAGES:
        for k in range(blocks):
            layers.append(InvertedBlock(width_in, width, widening, 1 if k else stride))
            width_in = width
    return chain(
        **stem,
        layers=layers,
        conv2=conv(320, 1280, size=1),
        bn2=nn.BatchNorm2d(1280),
        relu2=nn.ReLU(),
        pool=average_pool(),
        linear=nn.Linear(1280, num_classes),
    )


def wide_group(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    """Build a group of WideResNet: blocks of one width, the first with a stride."""
    layer = nn.Sequential(PreActBlock(width_in, width, stride, wide=True))
    layer.extend(PreActBlock(width, width, 1, wide=True) for _ in range(blocks - 1))
    return chain(layer=layer)


def wide_resnet(depth: int, widening: int, num_classes: int) -> nn.Sequential:
    """Build WideResNet-depth-widening (arXiv 1605.07146)."""
    blocks, width = (depth - 4) // 6, 16 * widening
    return chain(
        conv1=conv(3, 16),
        block1=wide_group(blocks, 16, width, stride=1),
        block2=wide_group(blocks, width, 2 * width, stride=2),
        block3=wide_group(blocks, 2 * width, 4 * width, stride=2),
        bn1=nn.BatchNorm2d(4 * width),
        relu=nn.ReLU(),
        pool=average_pool(),
        fc=nn.Linear(4 * width, num_classes),
    )


class Normalised(nn.Module):
    """A network with the normalisation it was trained with, for pixels in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1))
        self.register_buffer("std", std.reshape(1, -1, 1, 1))
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "convnet": convnet,
    "resnet18": partial(resnet, "BasicBlock", (2, 2, 2, 2)),
    "resnet34": partial(resnet, "BasicBlock", (3, 4, 6, 3)),
    "resnet50": partial(resnet, "Bottleneck", (3, 4, 6, 3)),
    "preactresnet18": preactresnet18,
    "mobilenetv2": mobilenetv2,
    "wrn-28-4": partial(wide_resnet, 28, 4),
    "wrn-28-10": partial(wide_resnet, 28, 10),
    "wrn-34-10": partial(wide_resnet, 34, 10),
    "wrn-70-16": partial(wide_resnet, 70, 16),
}


def build_model(name: str, num_classes: int, *key: int | str) -> nn.Module:
    """Build the network `name` with torch's default initial weights, drawn from `key` alone.

    Raises UsageError for a name that is not in MODELS.
    """
    if name not in MODELS:
        raise UsageError(f"there is no network {name!r}", f"there are: {', '.join(MODELS)}")
    return seeded(lambda: MODELS[name](num_classes), key)


def seeded(build: Callable[[], T], key: Key) -> T:
    """Call `build` with torch's random numbers, and so initial weights, drawn from `key`."""
    with global_generator(*key):
        return build()
