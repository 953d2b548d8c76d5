"""Networks by name. Inputs are pixels in [0,1]; weights are named as in published checkpoints.

Each network takes images (N,3,H,W) of any size and gives logits (N,C).
"""

from collections.abc import Callable
from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from absld.errors import UsageError
from absld.seeding import Key, global_generator

T = TypeVar("T")


def conv(width_in: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=False)


def convnet(num_classes: int) -> nn.Sequential:
    """Three convolutions: for the 8x8 digits, and for quick runs on larger images."""
    net = nn.Sequential()
    for width_in, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        net.extend([conv(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    net.add_module("linear", nn.Linear(64, num_classes))
    return net


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(width_in, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if width_in != width:
            resize = conv(width_in, width, stride, size=1)
            self.shortcut.extend([resize, nn.BatchNorm2d(width)])

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem, and no pooling behind it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        self.layer1 = self.stage(64, 64, stride=1)
        self.layer2 = self.stage(64, 128, stride=2)
        self.layer3 = self.stage(128, 256, stride=2)
        self.layer4 = self.stage(256, 512, stride=2)
        self.linear = nn.Linear(512, num_classes)

    @staticmethod
    def stage(width_in: int, width: int, stride: int) -> nn.Sequential:
        first = ResidualBlock(width_in, width, stride)
        return nn.Sequential(first, ResidualBlock(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class WideBlock(nn.Module):
    """Normalised before the convolutions; a shortcut that resizes starts after the first."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.convShortcut = conv(width_in, width, stride, size=1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(out)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + shortcut


class WideGroup(nn.Module):
    def __init__(self, blocks: int, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(WideBlock(width_in, width, stride))
        self.layer.extend(WideBlock(width, width, 1) for _ in range(blocks - 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WideResNet-34-10: three groups of five blocks, ten times the usual width."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 16)
        self.block1 = WideGroup(5, 16, 160, stride=1)
        self.block2 = WideGroup(5, 160, 320, stride=2)
        self.block3 = WideGroup(5, 320, 640, stride=2)
        self.bn1 = nn.BatchNorm2d(640)
        self.fc = nn.Linear(640, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "convnet": convnet,
    "resnet18": ResNet18,
    "wrn-34-10": WideResNet,
}


def build_model(name: str, num_classes: int, *key: int | str) -> nn.Module:
    """The network `name` with torch's own initial weights, drawn from `key` alone.

    Raises UsageError for a name that is not in MODELS.
    """
    if name not in MODELS:
        raise UsageError(f"there is no network {name!r}", f"there are: {', '.join(MODELS)}")
    return seeded(lambda: MODELS[name](num_classes), key)


def seeded(build: Callable[[], T], key: Key) -> T:
    """What `build` makes, with initial weights from `key`."""
    with global_generator(*key):
        return build()
