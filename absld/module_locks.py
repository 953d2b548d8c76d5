"""Locks of modules: one thread at a time changes the mode of a network."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

_released = threading.Condition()
_holders: dict[int, int] = {}  # the thread that holds a module, by the id of the module


@contextmanager
def hold(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Hold modules for this thread inside the context; wait while another thread holds one of them.

    All are taken at once, so that two threads cannot wait for each other.
    """
    thread = threading.get_ident()
    with _released:
        _released.wait_for(lambda: all(_holders.get(id(m), thread) == thread for m in modules))
        taken = [id(module) for module in modules if id(module) not in _holders]
        _holders.update(dict.fromkeys(taken, thread))
    try:
        yield
    finally:
        with _released:
            for module in taken:
                del _holders[module]
            _released.notify_all()
