"""MobileNetV2, with strides for small images or for large ones."""

import torch.nn.functional as F
from torch import Tensor, nn

from absld.models.layers import average_pool, chain, conv, projection


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
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(num_classes: int, in_channels: int = 3, *, large: bool = False) -> nn.Sequential:
    """Build MobileNetV2 with the paper's strides, or for small images.

    There the strides of the stem and of the second stage are 1.
    """
    first = conv(in_channels, 32, stride=2 if large else 1)
    layers, width_in = nn.Sequential(), 32
    stem = {"conv1": first, "bn1": nn.BatchNorm2d(32), "relu1": nn.ReLU()}
    for widening, width, blocks, stride in STAGES:
        for k in range(blocks):
            down = 1 if k or (width == 24 and not large) else stride
            layers.append(InvertedBlock(width_in, width, widening, down))
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
