"""Stand-ins for the functions of `torch.cuda`, and its streams, events and graphs.

A graph records the operations of its capture and does them again, on the same memory: what Python
computed meanwhile, such as a number that an operation was given, stays what it was.
"""

import contextlib
from types import SimpleNamespace

import torch

from helpers.pretend_tensors import CudaTensor, Generator, leaves

CUDA_GRAPH = torch.cuda.CUDAGraph
PROPERTIES = SimpleNamespace(
    name="pretend device", major=9, minor=0, total_memory=2**34, multi_processor_count=1
)


class Stream:
    """A stream of a device; all work is done at once."""

    def __init__(self, cuda, device):
        self.cuda, self.device = cuda, cuda.with_index(device or "cuda")

    def synchronize(self):
        self.cuda.wait("synchronize")

    def wait_stream(self, other):
        if other.device != self.device:
            self.cuda.fault(f"a stream of {self.device} waits for one of {other.device}")

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return event or Event(self.cuda)


class Event:
    """An event, which has happened as soon as it is recorded."""

    def __init__(self, cuda):
        self.cuda = cuda

    def record(self, stream=None): ...

    def wait(self, stream=None): ...

    def query(self):
        return True

    def synchronize(self):
        self.cuda.wait("synchronize")

    def elapsed_time(self, other):
        return 1.0


class Graph:
    """The operations of a capture, to be done again."""

    # To isinstance, as annotations of `torch.cuda.CUDAGraph` are checked in the tests.
    __class__ = property(lambda self: CUDA_GRAPH)

    def __init__(self, cuda):
        self.cuda, self.device, self.calls = cuda, None, []

    def add(self, call, args, kwargs, result):
        """Record an operation; result: None if it has written to its arguments."""
        self.calls.append((call, args, kwargs, result))

    def replay(self):
        if not self.calls:
            self.cuda.fault("replay of an empty graph")
        self.cuda.record.operations += 1
        for call, args, kwargs, result in self.calls:
            again = call(*args, **kwargs)
            if result is not None:
                for old, new in zip(leaves(result), leaves(again), strict=True):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)


@contextlib.contextmanager
def capture(cuda, graph, stream=None, **settings):
    """Do `torch.cuda.graph`: record in `graph` what happens inside.

    Without a stream, torch captures on one that it makes once, on the device that is then current.
    """
    if stream is None:
        cuda.default_capture_stream = cuda.default_capture_stream or Stream(cuda, "cuda")
        stream = cuda.default_capture_stream
    graph.device = stream.device
    cuda.graph = graph
    try:
        yield
    finally:
        cuda.graph = None
    if not graph.calls:
        cuda.fault("the capture of an empty graph")


def stand_ins(cuda):
    """Return what replaces attributes of torch's modules while a pretend device is there."""
    generators = (Generator("cuda:0"), Generator("cuda:1"))
    seeding = {
        "manual_seed": lambda seed: global_of("cuda").manual_seed(seed),
        "manual_seed_all": lambda seed: [g.manual_seed(seed) for g in generators],
    }
    return {
        torch: {"Generator": Generator},
        torch.cuda.random: seeding,
        torch.cuda: seeding
        | {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 2,
            "current_device": lambda: cuda.current,
            "set_device": cuda.exchange,
            "_exchange_device": cuda.exchange,
            "_maybe_exchange_device": cuda.exchange,
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: PROPERTIES,
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "synchronize": lambda device=None: cuda.wait("synchronize"),
            "default_generators": generators,
            "get_rng_state": lambda device="cuda": global_of(device).get_state(),
            "set_rng_state": lambda s, device="cuda": global_of(device).set_state(s),
            "Stream": lambda device="cuda", priority=0: Stream(cuda, device),
            "current_stream": lambda device="cuda": Stream(cuda, device),
            "stream": lambda stream: contextlib.nullcontext(),
            "Event": lambda **settings: Event(cuda),
            "CUDAGraph": lambda **settings: Graph(cuda),
            "graph": lambda graph, **settings: capture(cuda, graph, **settings),
        },
    }


def global_of(device):
    """Return the global generator of a device."""
    machine = CudaTensor.machine
    return torch.cuda.default_generators[machine.with_index(device).index]
