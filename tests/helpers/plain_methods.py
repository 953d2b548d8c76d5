"""Linear networks, batches and an attack small enough to be followed in NumPy."""

import numpy as np
import torch
from torch import nn

import absld
from absld.data.augmentation import Batch
from helpers import strategies as draw

C, N, D = 3, 9, 12
EPSILON, STEP_SIZE, STEPS = 0.1, 0.03, 4


def softmax(z):
    powers = np.exp(z - z.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def one_hot(labels):
    return np.eye(C)[labels]


def linear(seed, scale=1.0):
    """Return a linear network of D inputs and C classes, in float64."""
    random = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(D, C, dtype=draw.DTYPE))
    for weight in net.parameters():
        weight.data = scale * torch.randn(weight.shape, generator=random, dtype=draw.DTYPE)
    return net


def parameters(net):
    return [weight.detach().numpy().copy() for weight in net.parameters()]


def batch(seed, start="normal"):
    """Return N images of all C classes, in float64."""
    random = torch.Generator().manual_seed(seed)
    x = draw.images(seed, N, side=2)
    labels = torch.arange(N) % C  # each class in each batch
    noise = torch.rand(x.shape, generator=random, dtype=draw.DTYPE) * 2 - 1
    return Batch(x, labels, (EPSILON if start == "uniform" else 0.001) * noise)


ATTACK = absld.TrainingAttack(EPSILON, STEP_SIZE, STEPS)
