"""Layers that several networks share."""

from collections import OrderedDict

from torch import Tensor, nn


def conv(width_in: int, width: int, stride: int = 1, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2, bias=False)


def chain(**layers: nn.Module) -> nn.Sequential:
    """Chain layers under these names."""
    return nn.Sequential(OrderedDict(layers))


def average_pool() -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())


def projection(width_in: int, width: int, stride: int) -> nn.Sequential:
    """Build the shortcut of a block: empty where it changes neither width nor size."""
    if stride == 1 and width_in == width:
        return nn.Sequential()
    return nn.Sequential(conv(width_in, width, stride, size=1), nn.BatchNorm2d(width))


def for_channels(of_rgb: Tensor, channels: int) -> Tensor:
    """Return values of RGB for other channels: their average."""
    return of_rgb if channels == 3 else of_rgb.mean().repeat(channels)


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
