"""The floating point operations of a training step."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from absld.bench.contenders import PARTS, Contender


class OperationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types there
    """A counter by torch's formulas: a multiplication and an addition are two operations.

    torch's own counter follows modules, and an attack's gradients do not pass through them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            formula = flop_registry[func.overloadpacket]
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


def count_operations(contender: Contender) -> dict[str, int]:
    """Return the operations of the parts of one step: its timer marks them instead of seconds."""
    timer, clock = contender.timer, contender.timer.now
    with OperationCounter() as counter:
        timer.now = lambda: float(counter.total)
        contender.step()
    timer.now = clock
    return dict(zip(PARTS, map(int, timer.spans()), strict=True))
