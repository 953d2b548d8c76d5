"""ResNets, with a stem for small images or for large ones, and pre-activation ResNets."""

import torch.nn.functional as F
from torch import Tensor, nn

from absld.models.layers import average_pool, chain, conv, projection


def first_conv(in_channels: int, large: bool) -> nn.Conv2d:
    """Build the first convolution: 3x3, or for large images 7x7 with stride 2."""
    return conv(in_channels, 64, stride=2, size=7) if large else conv(in_channels, 64)


def max_pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, padding=1)


def resnet(
    block: str,
    depths: tuple[int, ...],
    num_classes: int,
    in_channels: int = 3,
    *,
    large: bool = False,
) -> nn.Sequential:
    """Build a ResNet (arXiv 1512.03385).

    Args:
        block: name of the block in torchvision.
        depths: blocks of each stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        large: the stem and the names of ImageNet's ResNets: a 7x7 convolution with stride 2 and
            max pooling, and `fc` at the end; else of those for small images: 3x3, `linear`.
    """
    from torchvision.models import resnet as torchvision_resnet  # slow to import

    kind = getattr(torchvision_resnet, block)
    net = chain(conv1=first_conv(in_channels, large), bn1=nn.BatchNorm2d(64), relu=nn.ReLU())
    if large:
        net.add_module("maxpool", max_pool())
    width_in = 64
    for number, depth in enumerate(depths):
        width, stride = 64 * 2**number, 2 if number else 1
        wide = width * kind.expansion
        resize = projection(width_in, wide, stride)
        stage = nn.Sequential(kind(width_in, width, stride, resize if len(resize) else None))
        stage.extend(kind(wide, width) for _ in range(depth - 1))
        net.add_module(f"layer{number + 1}", stage)
        width_in = wide
    net.add_module("pool", average_pool())
    net.add_module("fc" if large else "linear", nn.Linear(width_in, num_classes))
    return net


class PreActBlock(nn.Module):
    """Pre-activation block (arXiv 1603.05027).

    projection: name of the shortcut's 1x1 convolution: `shortcut.0` in published ResNets,
        `convShortcut` in WideResNets.
    of_input: that convolution takes the input of the block, not the first activation.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        stride: int,
        *,
        projection: str = "shortcut.0",
        of_input: bool = False,
    ) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width_in), conv(width_in, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv(width, width)
        self.projection, self.of_input = "", of_input
        if stride != 1 or width_in != width:
            self.projection, in_chain, _ = projection.partition(".")
            resize = conv(width_in, width, stride, size=1)
            self.add_module(self.projection, nn.Sequential(resize) if in_chain else resize)

    def forward(self, x: Tensor) -> Tensor:
        out = passed = F.relu(self.bn1(x))
        if self.of_input or not self.projection:
            passed = x
        if self.projection:
            passed = self.get_submodule(self.projection)(passed)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + passed


def preactresnet18(
    num_classes: int,
    in_channels: int = 3,
    *,
    large: bool = False,
    last_norm: bool = True,
    of_input: bool = False,
) -> nn.Sequential:
    """Build ResNet-18 of pre-activation blocks.

    large: the stem of ImageNet's ResNets. last_norm: batch norm and ReLU before the average.
    of_input: as in `PreActBlock`.
    """
    net = chain(conv1=first_conv(in_channels, large))
    if large:
        net.add_module("maxpool", max_pool())
    widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
    for number, (width_in, width, stride) in enumerate(widths, 1):
        first = PreActBlock(width_in, width, stride, of_input=of_input)
        stage = nn.Sequential(first, PreActBlock(width, width, stride=1))
        net.add_module(f"layer{number}", stage)
    if last_norm:
        net.add_module("bn", nn.BatchNorm2d(512))
        net.add_module("relu", nn.ReLU())
    net.add_module("pool", average_pool())
    net.add_module("linear", nn.Linear(512, num_classes))
    return net
