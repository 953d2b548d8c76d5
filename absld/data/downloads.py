"""Downloads of files of known size and hash: whole or not at all."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from absld.errors import CheckpointError
from absld.progress import Observer
from absld.storage.files import replacing
from absld.storage.opening import open_regular

CHUNK = 2**16  # bytes
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two packets
ATTEMPTS = 2  # at a source that breaks off


class Refused(Exception):
    """The answer of a source is not the file."""


class Transfer:
    """A progress bar for pooch: reports the size of the file as it grows, and limits it."""

    def __init__(self, file: IO[bytes], name: str, size: int, observer: Observer) -> None:
        self.file, self.name, self.size, self.observer = file, name, size, observer
        self.total = size  # pooch sets what the server says

    def update(self, _: int) -> None:
        """Report. Raises Refused if there is more than the file can have."""
        done = self.file.tell()
        if done > self.size:
            raise Refused(f"more than {self.size:,} bytes")
        self.observer.load(self.name, done, self.size)

    def reset(self) -> None:
        """Leave the size, which the file knows."""

    def close(self) -> None:
        """Leave the file open."""


def download(source: str, path: Path, size: int, sha256: str, observer: Observer) -> None:
    """Write the file `path` from a source, a URL or the path of a file, whole or not at all.

    Raises:
        Refused: the source has no file of this size and hash.
        OSError: the file cannot be written.
    """
    with replacing(path) as file:
        transfer(source, file, Transfer(file, path.name, size, observer))
        check(Path(file.name), size, sha256)


def transfer(source: str, file: IO[bytes], bar: Transfer) -> None:
    """Copy a source into a file. Raises Refused if it cannot be had."""
    if source.startswith("file://"):
        source = unquote(source.removeprefix("file://"))
    if not source.startswith(("http://", "https://")):
        copy(Path(source).expanduser(), file, bar)
        return
    import requests
    from pooch import HTTPDownloader

    # Some servers name the compression of an archive, which would then be undone on the way.
    headers = {"Accept-Encoding": "identity"}
    get = HTTPDownloader(progressbar=bar, chunk_size=CHUNK, timeout=TIMEOUT, headers=headers)
    attempt = 0
    while True:
        attempt += 1
        file.seek(0)
        file.truncate()
        try:
            get(source, file, None)
            return
        except requests.RequestException as error:
            if not file.tell() or attempt == ATTEMPTS:
                raise Refused(cause_of(error)) from error


def copy(source: Path, file: IO[bytes], bar: Transfer) -> None:
    """Copy a file of a mirror that is a folder. Raises Refused if it cannot be read."""
    try:
        content = open_regular(source)
    except (CheckpointError, OSError) as error:
        raise Refused(getattr(error, "strerror", None) or error) from error
    with content:
        while chunk := content.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    file.flush()


def check(path: Path, size: int, sha256: str) -> None:
    """Raise Refused if a file is not the one of this size and hash."""
    received = path.stat().st_size
    if received != size:
        with open_regular(path) as file:
            is_page = file.read(CHUNK).lstrip().lower().startswith((b"<!doctype html", b"<html"))
        raise Refused("an HTML page" if is_page else f"{received:,} bytes, not {size:,}")
    if (found := hash_of(path)) != sha256:
        raise Refused(f"another file, of SHA-256 {found}")


def is_whole(path: Path, sha256: str) -> bool:
    """Return whether a file is there and has this hash."""
    return path.is_file() and hash_of(path) == sha256


def hash_of(path: Path) -> str:
    from pooch import file_hash

    return str(file_hash(path, alg="sha256"))


@contextlib.contextmanager
def locked(path: Path, observer: Observer) -> Iterator[None]:
    """Let one process after another write a file, where the file system has locks."""
    name = path.with_name(f".{path.name}.lock")
    open_regular(name, "ab").close()  # the library may write through links
    lock = FileLock(name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        observer.wait(f"waiting for another process, which downloads {path.name}")
        lock.acquire()
    except (NotImplementedError, OSError):  # no locks here
        pass
    try:
        yield
    finally:
        lock.release()


def cause_of(error: BaseException) -> str:
    """Describe in a few words why a request failed."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code} {error.response.reason}"
    while inner := error.__cause__ or error.__context__:
        error = inner
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def without_password(source: str) -> str:
    """Return a URL without the name and password that it may have."""
    host = urlsplit(source).netloc
    return source.replace(host, host.rpartition("@")[2], 1) if "@" in host else source
