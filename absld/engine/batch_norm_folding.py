"""Batch norm folded into the convolutions before it, in a copy of a network that attacks use.

In eval mode batch norm is an affine map of each channel, and a convolution with other weights does
both at once. The weights of a student change in every step, so the copy is refreshed in place in
every step: what has been compiled or captured of it stays valid.
"""

import copy
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from absld.attack import frozen_eval
from absld.errors import UsageError

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


class FoldedPair(NamedTuple):
    """A convolution, the batch norm behind it, and the convolution that replaces both."""

    conv: nn.Conv2d
    norm: Norm
    folded: nn.Conv2d


class FoldedNetwork(nn.Module):
    """`net`: a network in eval mode with its batch norms folded; its weights need no gradient.

    Modules that are not folded are shared with `network` and follow its weights at once; the folded
    ones follow at `refresh`. Raises UsageError for a network that torch.fx cannot trace.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        try:
            with frozen_eval(network):  # dropout, for example, is not traced in train mode
                self.net = fx.symbolic_trace(network)
        except Exception as error:  # whatever a user's forward raises when it sees no tensor
            raise UsageError(
                f"batch norm cannot be folded, torch.fx does not trace this network: {error}",
                "--no-fold-batch-norm",
            ) from error
        self.pairs = [self.fold(*nodes) for nodes in foldable_nodes(self.net)]
        self.net.delete_all_unused_submodules()
        self.net.recompile()
        self.refresh()

    def fold(self, conv_node: fx.Node, norm_node: fx.Node) -> FoldedPair:
        """Replace a convolution and a batch norm in the graph by one convolution."""
        conv, norm = (self.net.get_submodule(str(node.target)) for node in (conv_node, norm_node))
        assert isinstance(conv, nn.Conv2d) and isinstance(norm, Norm)
        folded = copy.deepcopy(conv).requires_grad_(False)
        folded.bias = nn.Parameter(torch.zeros_like(conv.weight[:, 0, 0, 0]), requires_grad=False)
        name = f"folded_{str(conv_node.target).replace('.', '_')}"
        self.net.add_submodule(name, folded)
        conv_node.target = name
        norm_node.replace_all_uses_with(conv_node)
        self.net.graph.erase_node(norm_node)
        return FoldedPair(conv, norm, folded)

    def refresh(self) -> None:
        """Recompute the folded weights from the network's present weights and statistics."""
        with torch.no_grad():
            for conv, norm, folded in self.pairs:
                mean, variance = norm.running_mean, norm.running_var
                assert mean is not None and variance is not None and folded.bias is not None
                weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                )
                folded.weight.copy_(weight)
                folded.bias.copy_(bias)


def foldable_nodes(net: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Return the convolutions and batch norms that can be folded.

    The output of the convolution goes to the batch norm alone, which has running statistics, and
    neither module is called twice.
    """
    calls = [node for node in net.graph.nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    pairs = []
    for node in calls:
        norm = net.get_submodule(str(node.target))
        source = node.args[0] if node.args else None
        if not (isinstance(norm, Norm) and norm.running_mean is not None):
            continue
        if not (isinstance(source, fx.Node) and source in calls and len(source.users) == 1):
            continue
        # Not a subclass: that may compute something else.
        is_conv = type(net.get_submodule(str(source.target))) is nn.Conv2d
        if is_conv and targets.count(source.target) == targets.count(node.target) == 1:
            pairs.append((source, node))
    return pairs
