"""Small networks to attack."""

import torch
from torch import nn

from helpers import strategies as draw

C = 3


def network(seed=0, dtype=draw.DTYPE, classes=C):
    """Return a frozen convolutional network: neither linear nor smooth."""
    random = torch.Generator().manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, classes)]
    net = nn.Sequential(*layers).to(dtype)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=dtype) / 3
    return net.eval().requires_grad_(False)


class Cut(nn.Module):
    """Cuts the gradient to its input."""

    def forward(self, x):
        return network()(x.detach())
