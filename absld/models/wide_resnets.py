"""WideResNets of any depth and width."""

from torch import nn

from absld.models.layers import average_pool, chain, conv
from absld.models.resnets import PreActBlock


def wide_group(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    """Build a group of WideResNet: blocks of one width, the first with a stride."""
    layer = nn.Sequential(PreActBlock(width_in, width, stride, projection="convShortcut"))
    layer.extend(PreActBlock(width, width, 1) for _ in range(blocks - 1))
    return chain(layer=layer)


def wide_resnet(depth: int, widening: int, num_classes: int, in_channels: int = 3) -> nn.Sequential:
    """Build WideResNet-depth-widening (arXiv 1605.07146); depth: 6n + 4."""
    blocks, width = (depth - 4) // 6, 16 * widening
    return chain(
        conv1=conv(in_channels, 16),
        block1=wide_group(blocks, 16, width, stride=1),
        block2=wide_group(blocks, width, 2 * width, stride=2),
        block3=wide_group(blocks, 2 * width, 4 * width, stride=2),
        bn1=nn.BatchNorm2d(4 * width),
        relu=nn.ReLU(),
        pool=average_pool(),
        fc=nn.Linear(4 * width, num_classes),
    )
