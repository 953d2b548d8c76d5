"""Opening the files of a run, which may be somebody else's.

Only regular files are opened, and nothing is written through a link.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO

from absld.errors import CheckpointError

MOST_BYTES = 2**26  # of a text that is read whole
# Without O_NONBLOCK, opening a FIFO would wait for its other end. Windows has none of these.
AT_ONCE = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
NO_LINK = AT_ONCE | getattr(os, "O_NOFOLLOW", 0)
FLAGS = {
    "rb": os.O_RDONLY | AT_ONCE,
    "r+b": os.O_RDWR | NO_LINK,
    "ab": os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_LINK,
}
COPY_AGAIN = "copy it again from where it came from"


def open_regular(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a regular file. To write to it, it must have no other name.

    mode: rb, r+b or ab.

    Raises:
        CheckpointError: `path` is something else, for which this never waits.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, FLAGS[mode], 0o666)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise irregular(path, mode) from error
        raise
    status = os.fstat(descriptor)  # of what was opened, whatever has the name now
    if not stat.S_ISREG(status.st_mode) or (mode != "rb" and status.st_nlink > 1):
        os.close(descriptor)
        raise irregular(path, mode)
    return os.fdopen(descriptor, mode)


def file_size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def irregular(path: Path, mode: str) -> CheckpointError:
    """Build the error for a path that is not a regular file, or has another name."""
    if mode != "rb" and (path.is_symlink() or path.is_file()):
        return CheckpointError(
            f"{path}: a link; files of a run are not written through links",
            "put the file itself there",
        )
    kind = "a directory, not a file" if path.is_dir() else "not a regular file"
    return CheckpointError(f"{path}: {kind}", "remove it, or give the path of a file")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file whole.

    Raises:
        CheckpointError: it is not a regular file, or has more than `most` bytes.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        size = file_size(file)
        if size > most:
            raise CheckpointError(f"{path}: {size:,} bytes, at most {most:,} are read", COPY_AGAIN)
        return file.read(size)


def read_of_run(path: Path, most: int = MOST_BYTES) -> bytes:
    """Read a file of a run whole. Raises CheckpointError, also if there is none."""
    try:
        return read_bytes(path, most)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}", COPY_AGAIN) from error


def make_folder(path: Path, root: Path | None = None) -> None:
    """Make a folder and those above it, where there are none.

    root: a folder above it that the user gave; below it, no folder may be a link.

    Raises:
        CheckpointError: something else is in the place of one.
        OSError: it cannot be made.
    """
    if root:
        refuse_links(path, root)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for part in (path, *path.parents):
            if os.path.lexists(part) and not os.path.isdir(part):
                raise CheckpointError(
                    f"{part}: not a directory", "remove it, or give another --out"
                ) from error
        raise


def make_private_folder(path: Path, root: Path) -> None:
    """Make a folder that nobody else may enter, where there is none; see `make_folder`.

    Raises CheckpointError if it is somebody else's.
    """
    make_folder(path, root)
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        raise CheckpointError(
            f"{path}: belongs to somebody else", "remove it, or give another --out"
        )
    path.chmod(0o700)


def refuse_links(path: Path, root: Path) -> None:
    """Raise CheckpointError if `path` or a folder between it and `root` is a link.

    root: a folder that the user gave, which may be one.
    """
    for part in (path, *path.parents):
        if part == root:
            break
        if part.is_symlink():
            raise CheckpointError(
                f"{part}: a link; files of a run are not written through links",
                "put the folder itself there",
            )
