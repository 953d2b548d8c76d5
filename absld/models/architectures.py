"""Networks by name. Inputs are pixels in [0,1]; weights are named as in published checkpoints,
those of ResNets as in torchvision.

Each network takes images (N,3,H,W) of any size and gives logits (N,C).
"""

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


def convnet(num_classes: int) -> nn.Sequential:
    """Three convolutions: for the 8x8 digits, and for quick runs on larger images."""
    net = nn.Sequential()
    for width_in, width, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        net.extend([conv(width_in, width, stride), nn.BatchNorm2d(width), nn.ReLU()])
    net.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    net.add_module("linear", nn.Linear(64, num_classes))
    return net


def shortcut(width_in: int, width: int, stride: int) -> nn.Sequential:
    """The image as it is, or resized where the block resizes it."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    return nn.Sequential(conv(width_in, width, stride, size=1), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """ResNet of torchvision's blocks for small images: a 3x3 stem, and no pooling behind it."""

    def __init__(self, block: str, blocks: tuple[int, ...], num_classes: int) -> None:
        from torchvision.models import resnet  # takes a second, which other networks need not wait

        super().__init__()
        kind = getattr(resnet, block)
        self.conv1, self.bn1 = conv(3, 64), nn.BatchNorm2d(64)
        stages, width_in = [], 64
        for number, count in enumerate(blocks):
            width, stride = 64 * 2**number, 2 if number else 1
            wide = width * kind.expansion
            resized = shortcut(width_in, wide, stride)
            stages.append(
                nn.Sequential(kind(width_in, width, stride, resized if len(resized) else None))
            )
            stages[-1].extend(kind(wide, width) for _ in range(count - 1))
            width_in = wide
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(width_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class PreActBlock(nn.Module):
    """Normalised before the convolutions; a shortcut that resizes starts after the first."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(conv(width_in, width, stride, size=1))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        passed = self.shortcut(out) if hasattr(self, "shortcut") else x
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + passed


class PreActResNet18(nn.Module):
    """ResNet-18 with its normalisations before the convolutions, and one at the end."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1 = conv(3, 64)
        stages = []
        for width_in, width, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
            first = PreActBlock(width_in, width, stride)
            stages.append(nn.Sequential(first, PreActBlock(width, width, stride=1)))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        out = F.relu(self.bn(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class InvertedBlock(nn.Module):
    """Widened by a 1x1 convolution, filtered channel by channel, narrowed again, not clipped."""

    def __init__(self, width_in: int, width: int, widening: int, stride: int) -> None:
        super().__init__()
        wide = widening * width_in
        self.stride = stride
        self.conv1, self.bn1 = conv(width_in, wide, size=1), nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = conv(wide, width, size=1), nn.BatchNorm2d(width)
        self.shortcut = shortcut(width_in, width, 1) if stride == 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            out = out + self.shortcut(x)
        narrow: Tensor = out
        return narrow


class MobileNetV2(nn.Module):
    """MobileNetV2 for small images: strides of the first two stages are 1."""

    # Widening, width, blocks, stride of the first.
    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 32), nn.BatchNorm2d(32)
        self.layers, width_in = nn.Sequential(), 32
        for widening, width, blocks, stride in self.STAGES:
            for k in range(blocks):
                self.layers.append(InvertedBlock(width_in, width, widening, 1 if k else stride))
                width_in = width
        self.conv2, self.bn2 = conv(320, 1280, size=1), nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
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
        passed = x if self.convShortcut is None else self.convShortcut(out)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + passed


class WideGroup(nn.Module):
    def __init__(self, blocks: int, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(WideBlock(width_in, width, stride))
        self.layer.extend(WideBlock(width, width, 1) for _ in range(blocks - 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WideResNet-depth-widening: three groups of blocks, so many times the usual width."""

    def __init__(self, depth: int, widening: int, num_classes: int) -> None:
        super().__init__()
        blocks, narrow = (depth - 4) // 6, 16 * widening
        self.conv1 = conv(3, 16)
        self.block1 = WideGroup(blocks, 16, narrow, stride=1)
        self.block2 = WideGroup(blocks, narrow, 2 * narrow, stride=2)
        self.block3 = WideGroup(blocks, 2 * narrow, 4 * narrow, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * narrow)
        self.fc = nn.Linear(4 * narrow, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = F.relu(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


class Normalised(nn.Module):
    """A network behind the normalisation it was trained with: pixels in [0,1] stay the input."""

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
    "resnet18": partial(ResNet, "BasicBlock", (2, 2, 2, 2)),
    "resnet34": partial(ResNet, "BasicBlock", (3, 4, 6, 3)),
    "resnet50": partial(ResNet, "Bottleneck", (3, 4, 6, 3)),
    "preactresnet18": PreActResNet18,
    "mobilenetv2": MobileNetV2,
    "wrn-28-4": partial(WideResNet, 28, 4),
    "wrn-28-10": partial(WideResNet, 28, 10),
    "wrn-34-10": partial(WideResNet, 34, 10),
    "wrn-70-16": partial(WideResNet, 70, 16),
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
