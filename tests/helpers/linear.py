"""A linear network on 4x4 images: attacks on it have closed forms."""

import torch
from torch import nn

import absld

SIDE = 4


class Linear(nn.Module):
    """Logits W x + b of images (N,3,4,4), in float64 or float32."""

    def __init__(self, classes, seed, dtype):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 48, generator=random, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(classes, dtype=dtype))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T + self.bias


def sample(seed, classes, n=80, dtype=torch.float64):
    """Return a network, and images with many pixels at the ends of the box and any labels."""
    random = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, 3, SIDE, SIDE, generator=random, dtype=dtype) * 1.6 - 0.3).clamp(0, 1)
    model = Linear(classes, seed, dtype)
    with torch.no_grad():
        # Centred, so that about all classes occur and the margins are small.
        model.bias -= model(images).mean(0)
        labels = model(images).argmax(1)
    labels[::9] = (labels[::9] + 1) % classes  # and some are wrong from the start
    names = tuple(map(str, range(classes)))
    return model, absld.InMemoryImages(images, labels, names)
