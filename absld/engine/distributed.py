"""The processes that train together: the rank of this one, and reductions over all of them.

Started by torchrun, srun or mpirun, each process has a device of its own and a part of every batch.
Nothing here acts by itself: what has to be reduced is given to `Distributed`, at no cost in a single
process.
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

from absld.engine.launchers import find_launch, launch_hint
from absld.engine.precision import parse_device, resolve_device
from absld.errors import AbsldError, UsageError


@dataclass(frozen=True)
class Distributed:
    """The ranks of this process, among all and on its machine, and the number of processes."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Return the device of this process, where all were given the device `name`."""
        if self.world_size == 1 or parse_device(name) != torch.device("cuda"):
            return name
        return f"cuda:{self.local_rank}"

    def key(self) -> tuple[str, ...]:
        """Return the part of a generator's key that differs between processes."""
        return (f"rank {self.rank}",) if self.rank else ()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes, in each."""
        if self.world_size > 1:
            tensor = tensor.clone()
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_reduce_mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each floating tensor by its mean over all processes."""
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        if self.world_size > 1 and floating:
            flat = torch.cat([tensor.flatten() for tensor in floating])  # one message for all
            means = self.all_reduce_sum(flat) / self.world_size
            parts = torch.split(means, [tensor.numel() for tensor in floating])
            for tensor, mean in zip(floating, parts, strict=True):
                tensor.copy_(mean.view_as(tensor))

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum over all processes, in each; no process waits for its GPU."""
        if self.world_size > 1:
            tensor = torch.tensor(number)
            torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
            number = int(tensor)
        return number

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return the network with its gradients averaged over all processes.

        Buffers are not broadcast: a step has two forwards, and those of the first one must not be
        overwritten.
        """
        if self.world_size == 1:
            return network
        parallel = nn.parallel.DistributedDataParallel
        newer = "forward_sync_buffers" in inspect.signature(parallel.__init__).parameters
        buffers: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
        return parallel(network, **buffers)


SINGLE_PROCESS = Distributed()


def check_devices(device: torch.device, processes: int) -> None:
    """Raise UsageError if the processes of this machine cannot each have a device of their own."""
    if processes > 1 and device.type != "cpu":
        if device != torch.device("cuda"):
            raise UsageError(
                f"--device {device}: {processes} processes would share it",
                "--device cuda: each process gets a GPU of its own",
            )
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise UsageError(
                f"{processes} processes need a GPU each, and this machine has {gpus}",
                "torchrun with a smaller --nproc-per-node, or --device cpu",
            )


@contextmanager
def init_distributed(device: str) -> Iterator[Distributed]:
    """Join the processes that torchrun, srun or mpirun started; else be a single process.

    device: the kind of device of them all.

    Raises:
        UsageError: they cannot join, or cannot each have a device of their own.
        AbsldError: another process has ended before this one.
    """
    launch = find_launch(os.environ)
    if launch.world_size == 1:
        yield SINGLE_PROCESS
        return
    count = launch.world_size
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UsageError(
            f"started as one of {count} processes, without {' and '.join(missing)}",
            launch_hint(count),
        )
    kind = parse_device(device)
    local_rank = launch.local_rank
    if kind.type != "cpu" and (local_rank is None or launch.local_world_size is None):
        raise UsageError(
            f"started as one of {count} processes, without LOCAL_RANK and LOCAL_WORLD_SIZE: each "
            "process's GPU is unknown",
            launch_hint(count),
        )
    local_rank = local_rank or 0
    check_devices(kind, launch.local_world_size or 1)
    backend = "gloo"
    if kind.type == "cuda":
        # Flags of the host are reduced among CPUs, so that they do not wait for the GPUs.
        backend = "cpu:gloo,cuda:nccl"
        index = local_rank if kind.index is None else kind.index
        torch.cuda.set_device(resolve_device(f"cuda:{index}"))
    try:
        torch.distributed.init_process_group(backend, rank=launch.rank, world_size=count)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UsageError(
            f"{count} processes cannot join at {address}: {error}", launch_hint(count)
        ) from error
    try:
        yield Distributed(launch.rank, count, local_rank)
    except RuntimeError as error:
        # Gloo's errors have no class of their own, but the path of its source.
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        raise AbsldError(
            f"another of the {count} processes is gone: {error}", "--resume continues this run"
        ) from error
    finally:
        torch.distributed.destroy_process_group()
