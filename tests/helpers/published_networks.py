"""Published networks in plain functions of a state dict, written from their names and shapes.

They build no module: each reads the tensors that it needs from `state` by the published names, so
that a network of the package with the same state dict must give the same logits. `train` takes the
statistics of the batch in batch norm.
"""

import torch
import torch.nn.functional as F

CIFAR10 = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2471, 0.2435, 0.2616])
CIFAR100 = torch.tensor([0.5071, 0.4865, 0.4409]), torch.tensor([0.2673, 0.2564, 0.2762])


class Reader:
    """Layers whose tensors are found by name."""

    def __init__(self, state, train=False):
        self.state, self.train = state, train

    def has(self, name):
        return any(key.startswith(f"{name}.") for key in self.state)

    def norm(self, name, x):
        weight, bias = (self.state[f"{name}.{end}"] for end in ("weight", "bias"))
        mean, var = (self.state[f"{name}.running_{end}"] for end in ("mean", "var"))
        if self.train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, var, weight, bias = (v.view(1, -1, 1, 1) for v in (mean, var, weight, bias))
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, name, x, stride=1, padding=0, groups=1):
        return F.conv2d(x, self.state[f"{name}.weight"], None, stride, padding, 1, groups)

    def linear(self, name, x):
        return x.mean((2, 3)) @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]


def deepmind_wide(state, x, depth, activation=F.silu, of_data=CIFAR10, train=False):
    """DeepMind's WideResNet: strides pad below and to the right, shortcuts are activated."""
    net, (mean, std) = Reader(state, train), of_data
    out = net.conv("init_conv", (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), padding=1)
    for group in range(3):
        for block in range((depth - 4) // 6):
            at, stride = f"layer.{group}.block.{block}", 2 if group and not block else 1
            first = activation(net.norm(f"{at}.batchnorm_0", out))
            padded = F.pad(first, (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1))
            inner = net.conv(f"{at}.conv_0", padded, stride)
            inner = activation(net.norm(f"{at}.batchnorm_1", inner))
            passed = out
            if net.has(f"{at}.shortcut"):
                passed = net.conv(f"{at}.shortcut", first, stride)
            out = passed + net.conv(f"{at}.conv_1", inner, padding=1)
    return net.linear("logits", activation(net.norm("batchnorm", out)))


def deepmind_preact(state, x, activation=F.silu, of_data=CIFAR10, train=False):
    """DeepMind's pre-activation ResNet-18: shortcuts are 3x3 convolutions of the block's input."""
    net, (mean, std) = Reader(state, train), of_data
    out = net.conv("conv_2d", (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), padding=1)
    for stage in range(4):
        for block in range(2):
            at, stride = f"layer_{stage}.{block}", 2 if stage and not block else 1
            sides = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
            inner = F.pad(activation(net.norm(f"{at}.batchnorm_0", out)), sides)
            inner = net.conv(f"{at}.conv_2d_1", inner, stride)
            inner = activation(net.norm(f"{at}.batchnorm_1", inner))
            passed = out
            if net.has(f"{at}.shortcut"):
                passed = net.conv(f"{at}.shortcut", F.pad(out, sides), stride)
            out = passed + net.conv(f"{at}.conv_2d_2", inner, padding=1)
    return net.linear("logits", activation(net.norm("batchnorm", out)))


def wide(state, x, depth, train=False):
    """WideResNet of TRADES' and RobustBench's names."""
    net = Reader(state, train)
    out = net.conv("conv1", x, padding=1)
    for group in range(3):
        for block in range((depth - 4) // 6):
            at, stride = f"block{group + 1}.layer.{block}", 2 if group and not block else 1
            first = net.norm(f"{at}.bn1", out).relu()
            inner = net.norm(f"{at}.bn2", net.conv(f"{at}.conv1", first, stride, 1)).relu()
            passed = out
            if net.has(f"{at}.convShortcut"):
                passed = net.conv(f"{at}.convShortcut", first, stride)
            out = passed + net.conv(f"{at}.conv2", inner, padding=1)
    return net.linear("fc", net.norm("bn1", out).relu())


def preact(state, x, activated_shortcut, large=False, train=False):
    """Pre-activation ResNet-18; a last norm where the state dict has one."""
    net = Reader(state, train)
    out = net.conv("conv1", x, 2 if large else 1, 3 if large else 1)
    out = F.max_pool2d(out, 3, 2, 1) if large else out
    for stage in range(4):
        for block in range(2):
            at, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            first = net.norm(f"{at}.bn1", out).relu()
            inner = net.norm(f"{at}.bn2", net.conv(f"{at}.conv1", first, stride, 1)).relu()
            passed = out
            if net.has(f"{at}.shortcut"):
                passed = net.conv(f"{at}.shortcut.0", first if activated_shortcut else out, stride)
            out = passed + net.conv(f"{at}.conv2", inner, padding=1)
    return net.linear("linear", net.norm("bn", out).relu() if net.has("bn") else out)


def resnet(state, x, depths, train=False):
    """ResNet for small images; blocks of two convolutions, or of three where there is a third."""
    net = Reader(state, train)
    out = net.norm("bn1", net.conv("conv1", x, padding=1)).relu()
    for stage, depth in enumerate(depths):
        for block in range(depth):
            at, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            three = net.has(f"{at}.conv3")
            first = net.conv(f"{at}.conv1", out, *((1, 0) if three else (stride, 1)))
            inner = net.conv(
                f"{at}.conv2", net.norm(f"{at}.bn1", first).relu(), stride if three else 1, 1
            )
            inner = net.norm(f"{at}.bn2", inner)
            if three:
                inner = net.norm(f"{at}.bn3", net.conv(f"{at}.conv3", inner.relu()))
            passed = out
            if net.has(f"{at}.downsample"):
                passed = net.norm(f"{at}.downsample.1", net.conv(f"{at}.downsample.0", out, stride))
            out = (inner + passed).relu()
    return net.linear("linear", out)


def mobilenet(state, x, strides, train=False):
    """MobileNetV2; strides: of the stem, and of the first block of each of the seven stages."""
    net = Reader(state, train)
    out = net.norm("bn1", net.conv("conv1", x, strides[0], 1)).relu()
    number = 0
    for blocks, first in zip((1, 2, 3, 4, 3, 3, 1), strides[1:], strict=True):
        for block in range(blocks):
            at, stride = f"layers.{number}", 1 if block else first
            wide = net.norm(f"{at}.bn1", net.conv(f"{at}.conv1", out)).relu()
            wide = net.conv(f"{at}.conv2", wide, stride, 1, groups=wide.shape[1])
            inner = net.norm(f"{at}.bn2", wide).relu()
            inner = net.norm(f"{at}.bn3", net.conv(f"{at}.conv3", inner))
            if stride == 1:
                passed = out
                if net.has(f"{at}.shortcut"):
                    passed = net.norm(f"{at}.shortcut.1", net.conv(f"{at}.shortcut.0", out))
                inner = inner + passed
            out, number = inner, number + 1
    return net.linear("linear", net.norm("bn2", net.conv("conv2", out)).relu())
