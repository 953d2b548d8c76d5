"""Jobs: trainings as processes that a launcher runs, with a folder for their logs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from absld.errors import AbsldError
from absld.progress import Observer
from absld.storage.opening import make_private_folder
from absld.storage.run_directory import RunDirectory

FOLDER = "jobs"  # in --out


@dataclass(frozen=True, eq=False)
class Job:
    """A training, and the evaluation of its student, as processes one after the other.

    Attributes:
        title: names it for people.
        run: its run directory, which it resumes.
        epochs: of the training.
        commands: of its processes.
        is_finished: tells whether nothing is left to do.
        needs: the jobs of its teacher and its robust start, which have to be finished first.
    """

    title: str
    run: RunDirectory
    epochs: int
    commands: tuple[tuple[str, ...], ...]
    is_finished: Callable[[], bool]
    needs: "tuple[Job, ...]" = ()


class Launcher(Protocol):
    """Runs jobs somewhere, several at a time."""

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """Run the jobs, and wait until all have ended.

        Those that another command has started are waited for. Raises AbsldError that names those
        which failed, and their logs.
        """


def job_folder(job: Job) -> Path:
    """Return the folder of a job's log, which nobody else may enter; it is made if need be.

    Raises CheckpointError if it is a link, or somebody else's.
    """
    out = job.run.path.parent
    for folder in (out / FOLDER, out / FOLDER / job.run.path.name):
        make_private_folder(folder, out)
    return folder


def log_of(job: Job) -> Path:
    return job_folder(job) / "log.txt"


def fail(failed: Mapping[Job, str], total: int) -> None:
    """Raise AbsldError if jobs failed, with the log of the first."""
    if not failed:
        return
    first = next(iter(failed))
    names = ", ".join(f"{job.title} ({cause})" for job, cause in failed.items())
    raise AbsldError(
        f"{len(failed)} of {total} jobs failed: {names}; log of the first: {log_of(first)}",
        "the same command starts them again; what is finished is kept",
    )
