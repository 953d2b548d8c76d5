"""A pretend CUDA device: real values on the CPU behind tensors that say `cuda:0` or `cuda:1`.

The code under test runs on it as it is, to the same numbers as on the CPU. What CUDA would refuse
raises DeviceFault: tensors of two devices in one operation, a generator of another device,
`.numpy()`, a wait inside the capture of a graph. What CUDA would do without a word is recorded
(`Record`): above all waits of the host for the device.

    with PretendCuda() as cuda:  # "cuda" is a device inside
        student.to(cuda.device)
        with cuda.step() as record:
            train_step(...)
    assert not record.waits

Not seen: memory, speed, what streams do at the same time, cuDNN's choices, TF32, and what CUDA
kernels compute otherwise than CPU kernels.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import optimizer
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.cuda_device import Record, place
from helpers.pretend_operations import (
    INDEXED,
    NO_WORK,
    ON_CPU,
    RANDOM,
    UNREPEATABLE,
    WAITS,
    takes_cpu_scalar,
)
from helpers.pretend_tensors import CudaTensor, leaves, mapped, values_of
from helpers.pretend_torch_cuda import Graph, Stream, stand_ins

aten = torch.ops.aten


class DeviceFault(RuntimeError):
    """An operation that CUDA would refuse."""


HALVED = {torch.conv2d, F.conv2d, F.linear, torch.matmul}


class TorchCalls(TorchFunctionMode):
    """Sees calls of torch's functions, where generators, devices and autocast are still known."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, cuda = dict(kwargs or {}), self.cuda
        if kwargs.get("generator") is not None:
            self.check_generator(func, args, kwargs)
        if func is Tensor.to:
            return cuda.moved(*args, **kwargs)
        if func is Tensor.cuda:
            return cuda.moved(args[0], *(args[1:] or ("cuda",)), **kwargs)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            return cuda.moved(func(*args, **kwargs | {"device": None}), kwargs["device"])
        if func is Tensor.pin_memory:
            return cuda.pin(args[0].clone())
        if func is Tensor.is_pinned:
            return cuda.is_pinned(args[0])
        if kwargs.pop("pin_memory", False):
            return cuda.pin(func(*args, **kwargs))
        if func in HALVED and torch.is_autocast_enabled("cuda"):  # C++ asks for real CUDA tensors
            args = mapped(lambda x: halved(x, torch.get_autocast_dtype("cuda")), args)
        if func is F.one_hot and isinstance(args[0], CudaTensor):  # C++ would make it on the CPU
            classes = torch.arange(args[1], device=args[0].device)
            return (args[0].unsqueeze(-1) == classes).long()
        return func(*args, **kwargs)

    def check_generator(self, func, args, kwargs):
        tensor = next((each for each in args if isinstance(each, Tensor)), None)
        default = "cpu" if tensor is None else tensor.device
        device = self.cuda.with_index(kwargs.get("device") or default)
        if kwargs["generator"].device != device:
            given = kwargs["generator"].device
            self.cuda.fault(f"{func.__name__}: a generator of {given} for {device}")
        if device.type == "cuda":
            self.cuda.refuse_in_capture(f"{func.__name__} with a generator")


def halved(value, dtype):
    is_float = isinstance(value, CudaTensor) and value.dtype == torch.float32
    return value.to(dtype) if is_float else value


class PretendCuda(TorchDispatchMode):
    """Two pretend devices; inside the context, torch takes them for the machine's.

    `faults`: all that was refused, also where the code under test caught the error.
    """

    device = "cuda:0"
    is_pretend = True

    def __init__(self):
        super().__init__()
        self.faults: list[str] = []
        self.record = Record()
        self.current = 0
        self.graph: Graph | None = None  # the one that is captured at the moment
        self.default_capture_stream: Stream | None = None
        self.pinned: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def step(self) -> Iterator[Record]:
        """Keep a record of what happens inside."""
        outer, self.record = self.record, Record()
        try:
            yield self.record
        finally:
            self.record = outer

    def wait(self, what, times=1):
        self.refuse_in_capture(f"{what}, a wait")
        self.record.waits += [f"{what} at {place()}"] * times

    def fault(self, what):
        self.faults.append(f"{what} at {place()}")
        raise DeviceFault(self.faults[-1])

    def refuse_in_capture(self, what):
        if self.graph is not None:
            self.fault(f"{what}, inside the capture of a CUDA graph")

    # --- Devices and copies between them ---

    def with_index(self, device):
        device = torch.device(device)
        known = device.type != "cuda" or device.index is not None
        return device if known else torch.device("cuda", self.current)

    def pin(self, tensor):
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self.pinned

    def moved(self, tensor, *args, copy=False, **kwargs):
        """Do `Tensor.to`."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        device = self.with_index(device or tensor.device)
        form = {"dtype": dtype or tensor.dtype, "memory_format": layout or torch.preserve_format}
        with torch._C.DisableTorchFunction():
            if device == tensor.device:
                return Tensor.to(tensor, copy=copy, **form)
            if tensor.requires_grad and torch.is_grad_enabled() and tensor.grad_fn:
                raise NotImplementedError("a gradient from one pretend device to another")
            self.refuse_in_capture("a copy to a new tensor on another device")
            self.count_copy(tensor, device, non_blocking)
            values = tensor.values if isinstance(tensor, CudaTensor) else tensor.detach()
            values = Tensor.to(values, copy=True, **form)
        if device.type == "cpu":
            return self.pin(values) if non_blocking else values
        return CudaTensor(values, device.index).requires_grad_(tensor.requires_grad)

    def count_copy(self, source, target_device, non_blocking, target=None):
        """Record a copy: the host need not wait for those of pinned memory.

        Those of other memory count also with `non_blocking`, which it makes no promise for.
        """
        kinds = source.device.type, target_device.type
        in_memory = source if kinds[0] == "cpu" else target
        pinned = in_memory is None or self.is_pinned(in_memory)
        if "cpu" in kinds and source.numel() and not (non_blocking and pinned):
            self.wait(f"copy from {kinds[0]} to {kinds[1]}")
        elif "cuda" in kinds:
            self.record.operations += 1

    # --- Operations ---

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Do an operation on the CPU, on behalf of the device of its tensors."""
        flat = [*leaves(args), *leaves(list(kwargs.values()))]
        ours = [each for each in flat if isinstance(each, CudaTensor)]
        device = self.device_of(func, ours, kwargs.get("device"))
        if device is None:
            return func(*args, **kwargs)
        self.judge(func, args, kwargs, flat, device)
        args, kwargs = mapped(values_of, args), {k: mapped(values_of, v) for k, v in kwargs.items()}
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        call = ON_CPU.get(func.overloadpacket, func)
        result = call(*args, **kwargs)
        if self.graph is not None and not func.is_view and func.overloadpacket not in NO_WORK:
            self.graph.add(call, args, kwargs, None if func._schema.is_mutable else result)
        owners = {id(each.values): each for each in ours}
        if func.overloadpacket is aten.copy_:
            owners[id(args[0])] = owners.get(id(args[0]), args[0])  # which may be on the CPU

        def on_device(value):
            if id(value) in owners:
                return owners[id(value)]
            return CudaTensor(value, device.index) if isinstance(value, Tensor) else value

        return mapped(on_device, result)

    def device_of(self, func, ours, named):
        """Return the device that does an operation; None for the CPU."""
        devices = {each.device for each in ours}
        if named is not None and not devices:
            devices = {self.with_index(named)} - {torch.device("cpu")}
        if len(devices) > 1 and func.overloadpacket is not aten.copy_:
            self.fault(f"{func.overloadpacket.__name__}: tensors of {sorted(map(str, devices))}")
        return next(iter(devices), None)

    def judge(self, func, args, kwargs, flat, device):
        """Refuse what CUDA refuses, and record the rest."""
        op, name = func.overloadpacket, func.overloadpacket.__name__
        tensors = [each for each in flat if isinstance(each, Tensor)]
        on_cpu = [each for each in tensors if not isinstance(each, CudaTensor)]
        if self.graph is not None and device != self.graph.device:
            self.fault(f"{name} on {device} in a capture on {self.graph.device}")
        if op in RANDOM and not any(isinstance(each, torch._C.Generator) for each in flat):
            self.record.global_draws.append(f"{name} at {place()}")
        if op is aten.copy_:
            return self.count_copy(args[1], args[0].device, args[2:] == (True,), args[0])
        if op is aten._to_copy and on_cpu:
            return self.count_copy(args[0], device, kwargs.get("non_blocking", False))
        if op in INDEXED:
            self.judge_indices(op, name, args)
        elif any(each.dim() or not takes_cpu_scalar(func) for each in on_cpu):
            self.fault(f"{name}: a CPU tensor among tensors of {device}")
        if op in UNREPEATABLE and tensors[0].is_floating_point():
            self.record.unrepeatable.append(f"{name} at {place()}")
        if op in WAITS:
            self.wait(name, WAITS[op])
        self.record.operations += not func.is_view and op not in NO_WORK

    def judge_indices(self, op, name, args):
        """Record masks, whose number of elements the host has to know, and indices on the CPU."""
        target, indices, *values = args[:3]
        value = values[0] if values else target
        if isinstance(value, CudaTensor) != isinstance(target, CudaTensor) and value.dim():
            self.fault(f"{name}: target and values are on two devices")
        for index in indices:
            if index is None:
                continue
            if not isinstance(target, CudaTensor):
                self.fault(f"{name}: indices of a CPU tensor on a CUDA device")
            if not isinstance(index, CudaTensor):
                self.refuse_in_capture(f"{name} with CPU indices")
                self.record.cpu_indices.append(f"{name} at {place()}")
            elif index.dtype == torch.bool:
                is_fill = values and value.numel() == 1 and not isinstance(value, CudaTensor)
                if not is_fill:
                    self.wait(f"{name} with a mask")

    # --- torch.cuda ---

    def __enter__(self):
        CudaTensor.machine = self
        self.undo = contextlib.ExitStack()
        for owner, replaced in stand_ins(self).items():
            for name, stand_in in replaced.items():
                self.undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, stand_in)
        for module in (optimizer, _foreach_utils):
            module._foreach_supported_types.append(CudaTensor)
            self.undo.callback(module._foreach_supported_types.remove, CudaTensor)
        # Module.to cannot turn a parameter into one of another type: it makes a new one.
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.undo.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        self.undo.enter_context(TorchCalls(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.undo.close()

    def exchange(self, device):
        """Make another device the current one; return the index of the one before."""
        before, self.current = self.current, self.with_index(device).index
        return before
