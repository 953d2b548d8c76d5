"""The files of one run, and the lock that one process holds on them."""

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from absld.errors import BusyError, CheckpointError, Interrupted, in_words
from absld.storage.checkpoint import save
from absld.storage.files import write_text
from absld.storage.json_files import parse_json
from absld.storage.opening import COPY_AGAIN, make_folder, open_regular, read_of_run

MOST_RECORDS = 2**28  # bytes of metrics.jsonl: a thousand epochs of a thousand classes
# Lists of a value for each class; their items are checked by `parse_record`, which is faster.
OF_CLASSES = ("clean", "robust", "temperature_adv", "temperature_nat", "class_risk_adv",
              "class_risk_nat")  # fmt: skip
RECORD = {
    "type": "object",
    "required": ["epoch"],
    "properties": {
        "epoch": {"type": "integer", "minimum": 1},
        "is_best": {"type": "boolean"},
        "seconds": {"type": "number", "minimum": 0},
        **{name: {"type": "array"} for name in OF_CLASSES},
    },
    # What else a method records.
    "additionalProperties": {"type": ["number", "null", "array"]},
}
A_MOMENT = 0.2  # seconds; `is_busy` of another process holds the lock for less
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class RunDirectory:
    """The files of one run: config.toml, environment.json, metrics.jsonl, best.pt, last.pt, STATUS.

    As a context it is locked, a second process gets BusyError, and STATUS records how the run
    ended. The lock of a process that was killed is free.
    """

    def __init__(self, path: str | Path, root: Path | None = None) -> None:
        """Name the directory.

        Args:
            path: of the directory; it need not exist.
            root: a folder above it that the user gave; below it, no folder may be a link.
        """
        self.path, self.root = Path(path), root
        self.best, self.last = self.path / "best.pt", self.path / "last.pt"
        self.metrics = self.path / "metrics.jsonl"
        self._lock = FileLock(self.path / ".lock", timeout=A_MOMENT, poll_interval=A_MOMENT / 4)
        self._held = 0  # times; that of the library is of one thread

    @property
    def is_locked(self) -> bool:
        """Whether this process may write here."""
        return self._held > 0

    def lock(self) -> bool:
        """Lock the directory; return False if another process has. Locks of one process nest."""
        make_folder(self.path, self.root)
        if not self._lock.is_locked:
            open_regular(self.path / ".lock", "ab").close()  # the library may write through links
        try:
            self._lock.acquire()
        except Timeout:
            return False
        except (NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in NO_LOCKS:
                raise
            raise CheckpointError(
                f"{self.path}: its file system has no file locks ({error})",
                "give an --out on another file system",
            ) from error
        self._held += 1
        return True

    def unlock(self) -> None:
        """Undo a `lock`."""
        self._lock.release()
        self._held -= 1

    def is_busy(self) -> bool:
        """Return whether another process is at work here."""
        if not self.lock():
            return True
        self.unlock()
        return False

    def __enter__(self) -> "RunDirectory":
        if not self.lock():
            raise BusyError(
                f"{self.path}: another process is at work in this run",
                "wait for it, or give another --out",
            )
        self.set_status("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        try:
            if kind is None:
                self.set_status("finished")
            elif issubclass(kind, Interrupted) or not issubclass(kind, Exception):
                self.set_status("interrupted")
            else:
                self.set_status(f"failed: {in_words(str(error))}")
        except OSError:
            if error is None:
                raise
        finally:
            self.unlock()

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return (self.path / "STATUS").exists()

    def status(self) -> str:
        return read_of_run(self.path / "STATUS").decode(errors="replace").strip()

    def set_status(self, status: str) -> None:
        self.write("STATUS", status + "\n")

    def write(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def write_checkpoint(self, content: dict[str, Any], path: Path) -> None:
        save(content, path)

    def append_record(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl; it is on the disk when this returns."""
        with open_regular(self.metrics, "ab") as file:
            file.write((json.dumps(record) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """Read the records of metrics.jsonl; a last line that was cut off is left out.

        Raises CheckpointError for a line that is not the record of the next epoch.
        """
        if not self.metrics.exists():
            return []
        *whole, _ = read_of_run(self.metrics, MOST_RECORDS).split(b"\n")
        try:
            return [parse_record(line, epoch) for epoch, line in enumerate(whole, 1)]
        except ValueError as error:
            raise CheckpointError(f"{self.metrics}: damaged ({error})", COPY_AGAIN) from error

    def drop_records_after(self, epochs: int) -> None:
        """Drop the records of later epochs, which the checkpoint does not contain.

        Raises CheckpointError if there are fewer.
        """
        kept = [record for record in self.records() if record["epoch"] <= epochs]
        if len(kept) < epochs:
            raise CheckpointError(f"{self.metrics}: ends before epoch {epochs}", COPY_AGAIN)
        self.write(self.metrics.name, "".join(json.dumps(record) + "\n" for record in kept))


class ReadOnlyRunDirectory(RunDirectory):
    """A run directory in a process that leaves the lock and all writing to another one."""

    is_locked = True

    def lock(self) -> bool:
        return True

    def unlock(self) -> None:
        pass

    def __enter__(self) -> "ReadOnlyRunDirectory":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def write(self, name: str, text: str) -> None:
        pass

    def write_checkpoint(self, content: dict[str, Any], path: Path) -> None:
        pass

    def append_record(self, record: Mapping[str, Any]) -> None:
        pass


def parse_record(line: bytes, epoch: int) -> dict[str, Any]:
    """Parse a line of metrics.jsonl. Raises ValueError that names the field which is wrong."""
    record: dict[str, Any] = parse_json(line, RECORD)
    if record["epoch"] != epoch:
        raise ValueError(f"epoch: {record['epoch']} in line {epoch}")
    for name, value in record.items():
        if isinstance(value, list) and not {*map(type, value)} <= {int, float, type(None)}:
            raise ValueError(f"{name}: not a list of numbers")
    return record
