"""Expected faults, each kind with its exit code.

The message is one line with the cause; `hint` is one line with what to do.
"""

import re


def in_words(error: BaseException | str) -> str:
    """Return a message on one line, without the number of a system's error, such as [Errno 2]."""
    return re.sub(r"\[(Errno|WinError) -?\d+\] ", "", " ".join(str(error).split()))


class AbsldError(Exception):
    """An expected fault. The command line prints both lines and ends with `exit_code`."""

    exit_code = 1

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(in_words(cause))
        self.hint = hint


class UsageError(AbsldError, ValueError):
    """A setting that does not exist, or has no such value."""

    exit_code = 2


class DataError(AbsldError, ValueError):
    """Images or labels that are missing, unreadable or not what they should be."""

    exit_code = 3


class CheckpointError(AbsldError, ValueError):
    """A teacher, a checkpoint or a run that cannot be used."""

    exit_code = 4


class BusyError(CheckpointError):
    """A run in which another process is at work."""

    exit_code = 7


class NonFiniteError(AbsldError, ArithmeticError):
    """Training has reached NaN or infinity; raised before the optimiser takes the step."""

    exit_code = 5


class Interrupted(AbsldError):
    """A request to stop, raised between two steps; what was trained so far has been saved."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"interrupted by signal {signal_number}", "--resume continues this run")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class Stopped(SystemExit):
    """A signal ends the process at once; told apart from what somebody's code may raise."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class UnreliableError(AbsldError):
    """An evaluation whose checks warn, where they are to be strict."""

    exit_code = 6
