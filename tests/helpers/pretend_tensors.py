"""Tensors and generators that say they are on a CUDA device, and have their values on the CPU."""

from typing import Any

import torch
from torch import Tensor


class CudaTensor(Tensor):
    """A tensor on a pretend device; `values` is the same memory as a tensor on the CPU."""

    machine: Any = None  # the PretendCuda whose context is entered

    @staticmethod
    def __new__(cls, values, index=0):
        # In C++ it is a CPU tensor with CUDA's dispatch keys. So autograd needs neither device nor
        # streams, and batch norm makes the choice that it makes on CUDA.
        key = torch.device("cuda:0")
        made = torch.Tensor._make_subclass(cls, values, device_for_backend_keys=key)
        made.values, made.index = values, index
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", self.index))
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return CudaTensor.machine.run(func, args, kwargs or {})

    def to(self, *args, **kwargs):
        return CudaTensor.machine.moved(self, *args, **kwargs)

    def cpu(self):
        return self.to("cpu")

    def cuda(self, device="cuda", non_blocking=False):
        return self.to(device, non_blocking=non_blocking)

    def tolist(self):
        CudaTensor.machine.wait("tolist")
        return self.values.tolist()

    def numpy(self, *args, **kwargs):
        CudaTensor.machine.fault("numpy() of a CUDA tensor")

    def __array__(self, *args, **kwargs):
        CudaTensor.machine.fault("numpy array of a CUDA tensor")

    def __repr__(self):
        return f"cuda:{self.index} {self.values!r}"

    def __format__(self, form):
        return format(self.item(), form) if self.dim() == 0 else repr(self)

    def __reduce_ex__(self, protocol):
        CudaTensor.machine.wait("pickle")
        return self.values.detach().clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        twin = CudaTensor(self.values.detach().clone(), self.index)
        twin.requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            twin._is_param = True  # all that makes it a parameter
        memo[id(self)] = twin
        return twin


class Generator(torch.Generator):
    """A generator of the CPU that says it is on `device`."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls, "cpu")
        made.location = CudaTensor.machine.with_index(device)
        return made

    @property
    def device(self):
        return self.location

    def manual_seed(self, seed):
        CudaTensor.machine.refuse_in_capture("a generator is seeded")
        return super().manual_seed(seed)


def values_of(value):
    return value.values if isinstance(value, CudaTensor) else value


def mapped(change, value):
    """Change what is in nested lists and tuples, such as the arguments of an operation."""
    if isinstance(value, list | tuple):
        return type(value)([mapped(change, each) for each in value])
    return change(value)


def leaves(value):
    """Return what is in nested lists and tuples."""
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in leaves(each)]
    return [value]
