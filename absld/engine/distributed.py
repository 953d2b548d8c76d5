"""The processes that train together: who this one is, and sums over all of them.

Started by torchrun, each process has a device of its own and a part of every batch. Nothing here
acts by itself: what has to be summed is given `Ranks`, and alone it costs nothing.
"""

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process is number `rank` of `count`, and number `local` of those on its machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Is this the process that writes and speaks?"""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device that `name`, as given to all, is for this process."""
        return f"cuda:{self.local}" if self.count > 1 and is_cuda(name) else name

    def key(self) -> tuple[str, ...]:
        """What sets the random numbers of this process apart from the first one's."""
        return (f"rank {self.rank}",) if self.rank else ()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in each."""
        if self.count > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Put the mean over all processes in place of each floating tensor."""
        if self.count > 1:
            floating = [tensor for tensor in tensors if tensor.is_floating_point()]
            if floating:
                together = self.total(torch.cat([each.flatten() for each in floating])) / self.count
                parts = torch.split(together, [each.numel() for each in floating])
                for tensor, mean in zip(floating, parts, strict=True):
                    tensor.copy_(mean.view_as(tensor))

    def greatest(self, number: int, device: torch.device) -> int:
        """The greatest of the numbers that the processes bring."""
        if self.count > 1:
            held = torch.tensor(number, device=device)
            torch.distributed.all_reduce(held, torch.distributed.ReduceOp.MAX)
            number = int(held)
        return number

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            torch.distributed.barrier()

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, with its gradients averaged over all processes. Its buffers are not sent
        about: a step has two forwards, and the first one's must not be overwritten."""
        if self.count == 1:
            return network
        parallel = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(parallel.__init__).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return parallel(network, **buffers)


ALONE = Ranks()


def is_cuda(device: str) -> bool:
    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


@contextmanager
def launched(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, on devices of this kind; alone without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield ALONE
        return
    local = int(os.environ["LOCAL_RANK"])
    if is_cuda(device):
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if is_cuda(device) else "gloo")
    try:
        yield Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local)
    finally:
        torch.distributed.destroy_process_group()
