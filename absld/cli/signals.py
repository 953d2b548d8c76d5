"""SIGINT and SIGTERM: a request to stop, and the exit codes they lead to."""

import signal
import sys

from absld.errors import Interrupted, Stopped


class StopRequest:
    """A context that turns Ctrl-C and SIGTERM into a request to stop after the current step.

    While a training runs, the first signal is kept until `check`, so that a checkpoint of the step
    can be saved; at other times, and the second time, the process ends at once.

    Attributes:
        training: whether a training runs now.
        epoch: the epoch of the latest training; 0 before one.
    """

    def __init__(self, *, once: bool = False) -> None:
        self.training = False
        self.epoch = 0
        self.received = 0
        self.once = once  # torchrun sends again what the terminal has sent already

    def __enter__(self) -> "StopRequest":
        signals = (signal.SIGINT, signal.SIGTERM)
        self.before = {number: signal.signal(number, self.receive) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: object) -> None:
        if self.received and self.once:
            return
        if self.received or not self.training:
            raise Stopped(128 + number)
        self.received = number
        print("stopping after this step; a second signal stops at once", file=sys.stderr)

    def check(self) -> None:
        """Raise Interrupted if a signal has been received."""
        if self.received:
            raise Interrupted(self.received)


def signal_exit_code(error: BaseException | None) -> int | None:
    """Return the exit code of the signal behind an error; None if there is none.

    The error may be another one: of an import that a signal interrupts, for example.
    """
    while error is not None:
        if isinstance(error, (Interrupted, Stopped)):
            return error.exit_code
        if isinstance(error, KeyboardInterrupt):
            return 130
        error = error.__cause__ or error.__context__
    return None
