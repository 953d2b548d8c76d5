"""The command line in this process, on few images."""

import functools
import re
import signal
import sys
from pathlib import Path

import typer.main

from absld.cli import app as cli
from absld.data.dataset import InMemoryImages, Splits
from absld.data.sources import load_data

# The program has one command line, which is built once and not at each call.
typer.main.get_command = functools.cache(typer.main.get_command)
QUICK = ["--epochs", "1", "--teacher-epochs", "1", "--max-steps", "1", "--allow-weak-teacher"]
QUICK += ["--device", "cpu", "--batch-size", "32"]


@functools.cache
def few_digits():
    return Splits(
        *(
            InMemoryImages(part.images[:n], part.labels[:n], part.classes)
            for part, n in zip(load_data("digits", ""), (64, 40, 40), strict=True)
        )
    )


def load_few(dataset, folder, image_size, resize, channels, placement, columns):
    """The data, but of the digits only a few: what is tested here is not how well they learn."""
    if dataset == "digits":
        return Splits(*map(placement.place, few_digits()))
    return load_data(dataset, folder, image_size, resize, channels, placement, columns)


def load_few_split(dataset, folder, form, name, placement, columns):
    """One set of them."""
    few = load_few(dataset, folder, form.size, form.resize, form.channels, placement, columns)
    return getattr(few, name)


def use_few_digits(monkeypatch):
    """Let every command read only a few of the digits."""
    monkeypatch.setattr("absld.runs.planning.load_data", load_few)
    for module in ("evaluation.images", "runs.comparison", "runs.logit_caches"):
        monkeypatch.setattr(f"absld.{module}.load_split", load_few_split)


def main(*flags):
    """The program in this process: its exit code."""
    argv, pipe = sys.argv, signal.getsignal(signal.SIGPIPE)
    sys.argv = ["absld", *map(str, flags)]
    try:
        cli.main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGPIPE, pipe)


def refused(capfd, code, cause, hint, *flags):
    """Two lines on stderr and nothing else there, and no result."""
    assert main(*flags) == code, capfd.readouterr().err
    printed = capfd.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1], printed.err
    assert cause in lines[0] and hint in lines[1], printed.err
    assert not digests(printed.out)
    return printed.out


def digests(text):
    return dict(re.findall(r"^(teacher|student) sha256: ([0-9a-f]{64})\r?$", text, re.MULTILINE))


def the_run(kind="absld", out="runs"):
    (path,) = Path(out).glob(f"digits-{kind}-*")
    return path
