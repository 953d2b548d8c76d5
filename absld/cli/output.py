"""Where a command prints, for all commands: --json, signals, other people's prints."""

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from absld.cli.printing import Line, say, say_aside
from absld.cli.signals import StopRequest, signal_exit_code

SAME_COMMAND = "Continue with the same command."


class Output:
    """The output of a command.

    Attributes:
        stream: takes progress and tables: stderr with --json, else stdout.
        stop: the request to stop.
        document: the JSON document, printed at the end of the command; empty without --json.
    """

    def __init__(self, stream: IO[str], stop: StopRequest, *, as_json: bool) -> None:
        self.stream, self.stop, self.as_json = stream, stop, as_json
        self.document = ""

    def present(self, results: Mapping[str, Any], lines: Iterable[Line]) -> None:
        """Print the results: one JSON document with --json, else the lines."""
        if self.as_json:
            text = json.dumps(results, indent=1, allow_nan=False)
            self.document = text.replace("\x7f", r"\u007f")  # now printable ASCII throughout
        else:
            for line in lines:
                say(line, self.stream)


@contextlib.contextmanager
def command_output(
    as_json: bool, *, continue_with: str = "", world_size: int = 1, is_main: bool = True
) -> Iterator[Output]:
    """Open the output of a command, and handle signals until it ends.

    What other people's networks print goes where the progress goes. After a signal, one line on
    stderr says where the command was interrupted, and the process ends with the signal's code.

    Args:
        as_json: print one JSON document on stdout, and the progress on stderr.
        continue_with: how to continue after a signal; empty: with --resume, if a training began.
        world_size: number of processes that run this command; all but the main one are silent.
    """
    with contextlib.ExitStack() as stack:
        stream = sys.stderr if as_json else sys.stdout
        if as_json:
            stack.enter_context(stdout_into_stderr())
        if not is_main:
            stream = stack.enter_context(open(os.devnull, "w"))
        stop = stack.enter_context(StopRequest(once=world_size > 1, ignore_pipes=as_json))
        stack.enter_context(contextlib.redirect_stdout(stream))
        output = Output(stream, stop, as_json=as_json)
        try:
            yield output
        except BaseException as error:
            if (exit_code := signal_exit_code(error)) is None:
                raise
            if is_main and not stop.unread:
                continue_with = continue_with or resume_command(stop, world_size)
                of = " of the teacher" if stop.role == "teacher" else ""
                where = f" in epoch {stop.epoch}{of}" if stop.training else ""
                say_aside(f"Interrupted{where}. {continue_with}".strip())
            raise SystemExit(exit_code) from error
    if output.document and is_main:
        print(output.document, flush=True)


@contextlib.contextmanager
def stdout_into_stderr() -> Iterator[None]:
    """Send to stderr what libraries in C and child processes write to stdout."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def resume_command(stop: StopRequest, world_size: int) -> str:
    """Return how to continue a training; empty if none began."""
    if not stop.epoch:
        return ""
    if world_size > 1:
        return "Continue with the same command and --resume."
    arguments = [argument for argument in sys.argv[1:] if argument != "--resume"]
    return f"Continue with: {shlex.join(['absld', *arguments, '--resume'])}"
