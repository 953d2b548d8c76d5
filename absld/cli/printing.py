"""Lines on the standard streams. Nothing else in the package prints, but for JSON.

Texts from outside, such as class names and paths, are made printable here.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import IO

from absld.text import printable

Line = str | Sequence[tuple[str, str]]  # a text, or texts with a style each, such as "bold"
CODES = {"bold": "\x1b[1m", "underline": "\x1b[4m"}


def say(line: Line, stream: IO[str]) -> None:
    """Print a line. Styles are for a stream that shows them."""
    parts = [(line, "")] if isinstance(line, str) else line
    texts = (f"{CODES[s]}{printable(t)}\x1b[0m" if s else printable(t) for t, s in parts)
    print("".join(texts), file=stream, flush=True)


def shows_styles(stream: IO[str]) -> bool:
    """Return whether a stream is a terminal that shows bold and underlined text."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def say_aside(text: str) -> None:
    """Print a line on stderr, if that can be: its reader may be gone, as after SIGHUP."""
    with contextlib.suppress(OSError, RuntimeError):  # the latter in a handler amid a print
        say(text, sys.stderr)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Have all three standard streams, for any letter.

    One that is closed becomes the null device: a file would get its number, and what a library
    writes to stderr would be in a checkpoint. A pipe that nobody reads ends the process quietly, as
    in `| head`. In the end, what cannot be written is dropped, for Python's own exit would fail.
    """
    handle_pipes(signal.SIG_DFL)
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # it stays open until the process ends
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        handle_pipes(signal.SIG_IGN)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def handle_pipes(handler: signal.Handlers) -> None:
    """Set what happens when a pipe that is written to has no reader."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, handler)
