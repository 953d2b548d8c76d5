"""Signals that ask a command to stop, and the exit codes they lead to."""

import signal
from types import FrameType

from absld.cli.printing import handle_pipes, say_aside
from absld.errors import Interrupted, Stopped

AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # if they come second
# Sent when the terminal is gone, and by schedulers before a job's time is up. Some come repeatedly.
ONCE = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPIPE")


class StopRequest:
    """A context that turns signals into a request to stop after the current step.

    While a training runs, the first signal is kept until `check`, so that a checkpoint of the step
    can be saved; at other times, and by a second Ctrl-C or SIGTERM, the process ends at once. A
    signal that was ignored before, as nohup does with SIGHUP, stays ignored.

    Attributes:
        training: whether a training runs now.
        role: of the network of the latest training.
        epoch: the epoch of that training; 0 before one.
        unread: whether nobody reads the output any more, as after `| head`.
    """

    def __init__(self, *, once: bool = False, ignore_pipes: bool = False) -> None:
        self.training = False
        self.role = "student"
        self.epoch = 0
        self.received = 0
        self.unread = False
        self.once = once  # torchrun sends again what the terminal has sent already
        self.ignore_pipes = ignore_pipes

    def __enter__(self) -> "StopRequest":
        found = (getattr(signal, name, None) for name in ONCE)  # Windows has none of them
        numbers = [n for n in found if n and signal.getsignal(n) != signal.SIG_IGN]
        self.before = {n: signal.signal(n, self.receive) for n in (*AT_ONCE, *numbers)}
        if self.ignore_pipes:
            handle_pipes(signal.SIG_IGN)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not set

    def receive(self, number: int, frame: FrameType | None) -> None:
        self.unread |= number == getattr(signal, "SIGPIPE", None)
        if self.received and (self.once or number not in AT_ONCE):
            return
        if self.received or not self.training:
            raise Stopped(128 + number)
        self.received = number
        if not self.unread:
            say_aside("stopping after this step; a second signal stops at once")

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
