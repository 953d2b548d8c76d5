"""Batch norm folded into the convolutions before it, in a copy of a network that attacks use.

In eval mode batch norm is an affine map of each channel, and a convolution with other weights does
both at once. The weights of a student change in every step, so its copy is rewritten in place in
every step: what has been compiled or captured of it stays valid.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from absld.errors import UsageError

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class Pair(NamedTuple):
    """A convolution, the batch norm behind it, and the convolution that does the work of both."""

    conv: nn.Conv2d
    norm: Norm
    both: nn.Conv2d


class Folded(nn.Module):
    """What `network` computes in eval mode, in fewer operations. Asks for no gradient of weights.

    Shares the modules that are not folded, so it follows their weights at once; `rewrite` makes
    it follow the others. Raises UsageError for a network that torch.fx cannot trace.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        modes = [(module, module.training) for module in network.modules()]
        try:
            # What depends on the mode, such as dropout, is traced as it is in eval mode.
            self.net = fx.symbolic_trace(network.eval())
        except Exception as error:  # whatever somebody's forward raises when it sees no tensor
            raise UsageError(
                f"batch norm cannot be folded, torch.fx does not trace this network: {error}",
                "leave out --fold-batch-norm",
            ) from error
        finally:
            for module, training in modes:
                module.training = training
        self.pairs = [self.fold(*found) for found in foldable(self.net)]
        self.net.delete_all_unused_submodules()
        self.net.recompile()
        self.rewrite()

    def fold(self, first: fx.Node, second: fx.Node) -> Pair:
        """Put one convolution in the place of a convolution and a batch norm."""
        conv, norm = (self.net.get_submodule(str(node.target)) for node in (first, second))
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, Norm)
        both = copy.deepcopy(conv).requires_grad_(False)
        both.bias = nn.Parameter(torch.zeros_like(both.weight[:, 0, 0, 0]), requires_grad=False)
        name = f"folded_{str(first.target).replace('.', '_')}"
        self.net.add_submodule(name, both)
        first.target = name
        second.replace_all_uses_with(first)
        self.net.graph.erase_node(second)
        return Pair(conv, norm, both)

    def rewrite(self) -> None:
        """Take over the network's present weights and statistics."""
        with torch.no_grad():
            for conv, norm, both in self.pairs:
                assert norm.running_mean is not None and norm.running_var is not None
                weight, bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                both.weight.copy_(weight)
                both.bias.copy_(bias)  # type: ignore[union-attr]  # every copy has one

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits


def foldable(net: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Each convolution whose output goes to a batch norm with running statistics, and nowhere else;
    neither of them is called twice."""
    calls = [node for node in net.graph.nodes if node.op == "call_module"]
    times = [node.target for node in calls]
    found = []
    for second in calls:
        norm = net.get_submodule(str(second.target))
        first = second.args[0] if second.args else None
        if not (isinstance(norm, Norm) and norm.running_mean is not None):
            continue
        if not (isinstance(first, fx.Node) and first.op == "call_module" and len(first.users) == 1):
            continue
        # Not a subclass: that may compute something else.
        if type(net.get_submodule(str(first.target))) is nn.Conv2d and (
            times.count(first.target) == times.count(second.target) == 1
        ):
            found.append((first, second))
    return found
