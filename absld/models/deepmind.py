"""The pre-activation networks of DeepMind's robust models (arXiv 2010.03593).

They differ from other WideResNets and ResNets in names, padding, activation and shortcuts, and they
normalise the pixels themselves.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from absld.models.layers import average_pool, chain, conv, for_channels

Activation = Callable[[Tensor], Tensor]

# Mean and standard deviation of the channels, as published: those of the training images.
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class HalvingConv(nn.Conv2d):
    """3x3 convolution with stride 2, padded as TensorFlow's SAME: even sizes only at their end."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, 3, stride=2, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[2], input.shape[3]
        return super().forward(F.pad(input, (width % 2, 1, height % 2, 1)))


def padded_conv(width_in: int, width: int, stride: int) -> nn.Conv2d:
    """Build a 3x3 convolution padded as TensorFlow's SAME; stride: 1 or 2."""
    return conv(width_in, width) if stride == 1 else HalvingConv(width_in, width)


class WideBlock(nn.Module):
    """Block of the WideResNets: a 1x1 shortcut of the first activation, where the width changes."""

    def __init__(self, width_in: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = nn.BatchNorm2d(width_in)
        self.conv_0 = padded_conv(width_in, width, stride)
        self.batchnorm_1 = nn.BatchNorm2d(width)
        self.conv_1 = conv(width, width)
        self.shortcut = conv(width_in, width, stride, size=1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.activation(self.batchnorm_0(x))
        passed = self.shortcut(out) if self.shortcut else x
        residual: Tensor = self.conv_1(self.activation(self.batchnorm_1(self.conv_0(out))))
        return residual + passed


class PreActBlock(nn.Module):
    """Block of the ResNets: a 3x3 shortcut of the block's input, where width or size change."""

    def __init__(self, width_in: int, width: int, stride: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = nn.BatchNorm2d(width_in)
        self.conv_2d_1 = padded_conv(width_in, width, stride)
        self.batchnorm_1 = nn.BatchNorm2d(width)
        self.conv_2d_2 = conv(width, width)
        changes = stride != 1 or width_in != width
        self.shortcut = padded_conv(width_in, width, stride) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_2d_1(self.activation(self.batchnorm_0(x)))
        residual: Tensor = self.conv_2d_2(self.activation(self.batchnorm_1(out)))
        return residual + (self.shortcut(x) if self.shortcut else x)


class DeepMindNet(nn.Sequential):
    """Layers behind their normalisation of the pixels, and the head that all these networks have.

    The normalisation is CIFAR-100's where there are 100 classes, else CIFAR-10's; of images that
    are not RGB the average over the channels. A file may hold another.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        layers: dict[str, nn.Module],
        width: int,
        activation: type[nn.Module],
        num_classes: int,
        in_channels: int,
    ) -> None:
        head = {
            "batchnorm": nn.BatchNorm2d(width),
            "relu": activation(),
            "pool": average_pool(),
            "logits": nn.Linear(width, num_classes),
        }
        super().__init__(OrderedDict(layers | head))
        for name, of_rgb in zip(
            ("mean", "std"), CIFAR100 if num_classes == 100 else CIFAR10, strict=True
        ):
            values = for_channels(torch.tensor(of_rgb), in_channels)
            self.register_buffer(name, values.view(in_channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        logits: Tensor = super().forward(  # type: ignore[no-untyped-call]
            (input - self.mean) / self.std
        )
        return logits


def stage(
    kind: type[WideBlock] | type[PreActBlock],
    blocks: int,
    widths: tuple[int, int],
    stride: int,
    activation: type[nn.Module],
) -> nn.Sequential:
    """Build blocks of one width, the first with a stride. widths: before and behind them."""
    width_in, width = widths
    layers = nn.Sequential(kind(width_in, width, stride, activation()))
    layers.extend(kind(width, width, 1, activation()) for _ in range(blocks - 1))
    return layers


def deepmind_wide_resnet(
    depth: int,
    widening: int,
    num_classes: int,
    in_channels: int = 3,
    *,
    activation: type[nn.Module] = nn.SiLU,
) -> nn.Sequential:
    """Build DeepMind's WideResNet-depth-widening; depth: 6n + 4. SiLU is also named Swish."""
    widths, groups = (16, *(16 * widening * 2**number for number in range(3))), nn.Sequential()
    for number, pair in enumerate(itertools.pairwise(widths)):
        stride = 2 if number else 1
        groups.append(chain(block=stage(WideBlock, (depth - 4) // 6, pair, stride, activation)))
    layers = {"init_conv": conv(in_channels, 16), "layer": groups}
    return DeepMindNet(layers, widths[-1], activation, num_classes, in_channels)


def deepmind_preactresnet18(
    num_classes: int, in_channels: int = 3, *, activation: type[nn.Module] = nn.SiLU
) -> nn.Sequential:
    """Build DeepMind's pre-activation ResNet-18."""
    layers: dict[str, nn.Module] = {"conv_2d": conv(in_channels, 64)}
    for number, pair in enumerate(itertools.pairwise((64, 64, 128, 256, 512))):
        stride = 2 if number else 1
        layers[f"layer_{number}"] = stage(PreActBlock, 2, pair, stride, activation)
    return DeepMindNet(layers, 512, activation, num_classes, in_channels)
