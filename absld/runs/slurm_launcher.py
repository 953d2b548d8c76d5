"""Jobs of Slurm, by submitit: one for each training, teachers first.

Slurm's queue is asked by the names of the jobs, which hold the path of the run. So any command finds
them, and none is submitted twice.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from absld.config.launcher_settings import LauncherSettings
from absld.errors import AbsldError, UsageError
from absld.progress import Observer
from absld.runs.jobs import FOLDER, Job, fail, job_folder, log_of
from absld.storage.files import key_of
from absld.storage.opening import make_private_folder, open_regular

POLL = 5.0  # seconds between two looks at the queue
AGAIN = 60.0  # seconds before a queue that did not answer is asked again
LAG = 20.0  # seconds after which what a node has written is seen on a network file system
SUBMISSION = "submission-"  # begins the name of a folder that submitit writes into
MOST_RESTARTS = 1000  # of a job, after as many time limits
KILL_WAIT = 600.0  # seconds in which Slurm kills a job that it asked to stop
STOPPED = {128 + 15, 128 + 10, 128 + 12}  # by SIGTERM, SIGUSR1 and SIGUSR2, which Windows lacks


class Queued(NamedTuple):
    """A job in Slurm's queue."""

    id: str
    state: str
    reason: str


class NodeJob:
    """The processes of a job on its node, which submitit starts and requeues."""

    def __init__(self, commands: tuple[tuple[str, ...], ...], log: str) -> None:
        self.commands, self.log = commands, log
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        # submitit has set what happens at SIGUSR2: `checkpoint`, then a requeue.
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
        for command in self.commands:
            with open_regular(Path(self.log), "ab") as log:  # for srun gives it a terminal
                self.process = subprocess.Popen(command, stdout=log, stderr=log)
            code = self.process.wait()
            if code in STOPPED:  # by Slurm, which may requeue the job unless it ends by itself
                time.sleep(KILL_WAIT)
            if code:
                raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Wait until the process has saved its state; return what the requeued job runs."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            # Amid a `wait` of the process another one would wait for ever.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.process.pid, signal.SIGUSR1)  # where Slurm signals its parent alone
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(NodeJob(self.commands, self.log))


class SlurmLauncher:
    """Runs jobs on the nodes of a cluster; they go on when this process stops."""

    def __init__(self, settings: LauncherSettings) -> None:
        """Raises AbsldError if no Slurm answers, or submitit is missing."""
        try:
            import submitit
        except ImportError as error:
            raise UsageError(
                "--launcher slurm needs submitit", "pip install 'absld[slurm]'"
            ) from error
        self.submitit, self.settings = submitit, settings
        read_queue()

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """Submit the jobs, and wait until all have ended. Raises AbsldError that names the failed."""
        left, states = list(jobs), dict.fromkeys(jobs, "")
        failed: dict[Job, str] = {}
        ended: dict[Job, float] = {}  # when a job was first missing from the queue
        with self.going_on(left, observer):
            self.submit_missing(jobs, observer)
            while left:
                time.sleep(POLL)
                try:
                    queue = read_queue()
                except AbsldError as error:  # Slurm's controller may be restarting
                    observer.wait(f"{error}; asked again in {AGAIN:.0f} s")
                    time.sleep(AGAIN)
                    continue
                for job in [*left]:
                    entry, now = queue.get(name_of(job)), time.monotonic()
                    if entry:
                        if entry.state not in (states[job], "COMPLETING"):
                            observer.wait(f"{job.title}: job {entry.id}, {describe(entry)}")
                            states[job] = entry.state
                        ended.pop(job, None)
                    elif job.is_finished():
                        left.remove(job)
                        observer.wait(f"{job.title}: finished")
                    elif now - ended.setdefault(job, now) > LAG:
                        left.remove(job)
                        failed[job] = self.cause(job, failed)
                        observer.wait(f"{job.title}: failed, {failed[job]}, log {log_of(job)}")
        fail(failed, len(jobs))

    def submit_missing(self, jobs: Sequence[Job], observer: Observer) -> None:
        """Submit the jobs that are not in the queue."""
        folder = jobs[0].run.path.parent / FOLDER
        make_private_folder(folder, folder.parent)
        open_regular(folder / ".lock", "ab").close()
        with FileLock(folder / ".lock"):  # two commands at once do not both submit a job
            queue = read_queue()
            ids: dict[Job, str] = {}
            for job in jobs:
                entry = queue.get(name_of(job))
                after = [ids[needed] for needed in job.needs if needed in ids]
                ids[job] = entry.id if entry else self.submit(job, after)
                how = "is in the queue" if entry else "submitted"
                observer.wait(f"{job.title}: {how} as job {ids[job]}, log {log_of(job)}")
                queue[name_of(job)] = Queued(ids[job], "PENDING", "")

    def submit(self, job: Job, after: Sequence[str]) -> str:
        """Submit a job that starts once those of `after` have succeeded; return its number."""
        settings, log = self.settings, str(log_of(job).absolute())
        if "%" in log:
            raise UsageError(f"{log}: Slurm replaces % in a path", "an --out without it")
        given: dict[str, Any] = {
            "partition": settings.partition,
            "account": settings.account,
            "qos": settings.qos,
            "constraint": settings.constraint,
            "gpus_per_node": "" if settings.gpus == "0" else settings.gpus,
            "mem": settings.memory,
            "dependency": ":".join(["afterok", *after]) if after else "",
        }
        for old in job_folder(job).glob(f"{SUBMISSION}*"):
            shutil.rmtree(old, ignore_errors=True)
        # A new folder: the node runs what is in it.
        folder = tempfile.mkdtemp(prefix=SUBMISSION, dir=job_folder(job))
        executor = self.submitit.SlurmExecutor(folder, max_num_timeout=MOST_RESTARTS)
        # As they are: the executor's own method knows memory in GB only.
        executor.parameters = {
            "job_name": name_of(job),
            "time": settings.minutes(),
            "cpus_per_task": settings.cpus,
            "ntasks_per_node": 1,
            "signal_delay_s": settings.notice,
            "stderr_to_stdout": True,
            "wckey": None,
            "srun_args": ["--output", log, "--open-mode", "append"],
            "additional_parameters": {
                "output": log,
                "requeue": True,
                "kill-on-invalid-dep": "yes",
            },
            **{name: value for name, value in given.items() if value},
        }
        try:
            return str(executor.submit(NodeJob(job.commands, log)).job_id)
        except self.submitit.core.utils.FailedJobError as error:
            raise UsageError(
                f"Slurm refused the job of {job.title}: {error}", "`sinfo` lists the partitions"
            ) from error

    def cause(self, job: Job, failed: dict[Job, str]) -> str:
        """Return why a job failed, as far as it is known."""
        for needed in job.needs:
            if needed in failed:
                return f"not started, {needed.title} failed"
        status = job.run.status() if job.run.exists() else ""
        words = {"": "ended before it began", "running": "killed", "finished": "not evaluated"}
        return words.get(status, status.removeprefix("failed: "))

    @contextlib.contextmanager
    def going_on(self, left: list[Job], observer: Observer) -> Iterator[None]:
        """Say that the jobs go on if this process is stopped."""
        try:
            yield
        except BaseException as error:
            if not isinstance(error, AbsldError):
                observer.wait(
                    f"{len(left)} jobs go on: --status shows them, and the same command waits for "
                    "them again; `scancel NUMBER` stops one"
                )
            raise


def name_of(job: Job) -> str:
    """Return the name of a job in the queue: that of the run, and a digest of its path."""
    path = str(job.run.path.resolve())
    return f"{Path(path).name}-{key_of({'path': path})}"


def read_queue() -> dict[str, Queued]:
    """Return the user's jobs in Slurm's queue, by name. Raises UsageError if it cannot be asked."""
    command = ["squeue", "--me", "--noheader", "--format=%i|%T|%r|%j"]
    # SQUEUE_STATES and the like would hide jobs, which then count as ended.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SQUEUE_")}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=120, env=environment
        )
    except FileNotFoundError as error:
        raise UsageError(
            "--launcher slurm: there is no squeue on this machine",
            "run it where jobs are submitted, or use --launcher local",
        ) from error
    except (subprocess.SubprocessError, OSError) as error:
        text = getattr(error, "stderr", "") or str(error)
        raise AbsldError(f"squeue: {text}", "jobs in the queue go on") from error
    entries = (line.split("|", 3) for line in done.stdout.splitlines())
    return {entry[3]: Queued(*entry[:3]) for entry in entries if len(entry) == 4}


def describe(entry: Queued) -> str:
    """Return the state of a job in words, with the reason for which it waits."""
    state = entry.state.lower().replace("_", " ")
    return f"{state} ({entry.reason})" if entry.state == "PENDING" else state
