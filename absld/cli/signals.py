"""SIGINT and SIGTERM, and the exit codes they lead to."""

import signal
import sys

from absld.errors import Interrupted, Stopped


class Stop:
    """Ctrl-C and SIGTERM. While a training runs, the first asks it to stop after its step, when
    it saves itself; at other times, and the second time, the process ends at once."""

    def __init__(self, *, patient: bool = False) -> None:
        self.training = False
        self.received = 0
        self.patient = patient  # torchrun passes on what the terminal has sent already

    def __enter__(self) -> "Stop":
        self.before = {n: signal.signal(n, self.hear) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number: int, frame: object) -> None:
        if self.received and self.patient:
            return
        if self.received or not self.training:
            raise Stopped(128 + number)
        self.received = number
        print("stopping after this step; a second signal stops at once", file=sys.stderr)

    def check(self) -> None:
        """Raises Interrupted if the process has been asked to stop."""
        if self.received:
            raise Interrupted(self.received)


def exit_code_of_a_signal(error: BaseException | None) -> int | None:
    """That of the signal an error comes from: what it interrupts, such as an import, may make
    another error of it."""
    while error is not None:
        if isinstance(error, Stopped):
            return error.exit_code
        if isinstance(error, KeyboardInterrupt):
            return 130
        error = error.__cause__ or error.__context__
    return None
