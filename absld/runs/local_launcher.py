"""Jobs as processes on this machine, a number of them at a time, on different GPUs where there are."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from absld.errors import BusyError
from absld.progress import Observer
from absld.runs.jobs import Job, fail, log_of
from absld.storage.opening import open_regular

POLL = 0.2  # seconds between two looks at the processes
WAIT = 10.0  # seconds before a run in which another command's process is at work is tried again
# Unlike a SIGTERM, it may come to a process that a scheduler has signalled, too. Windows has neither.
SAVE_AND_STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
IN_ORDER = "PCI_BUS_ID"  # so that CUDA numbers GPUs as nvidia-smi does


@dataclass
class Work:
    """A job that runs: its process, the commands after that one, and the device of both."""

    job: Job
    device: str | None
    process: subprocess.Popen[bytes]
    left: list[tuple[str, ...]] = field(default_factory=list)


class LocalLauncher:
    """Runs jobs as processes of this one; if this one stops, they save their state and stop."""

    def __init__(self, slots: int, devices: Sequence[str]) -> None:
        """Set the number of jobs at a time.

        devices: values of CUDA_VISIBLE_DEVICES among which the jobs are divided; empty: all jobs
        see what this process sees.
        """
        self.devices: list[str | None] = [
            devices[slot % len(devices)] if devices else None for slot in range(slots)
        ]  # that are free
        self.waiting: list[Job] = []
        self.running: list[Work] = []
        self.failed: dict[Job, str] = {}
        self.not_before: dict[Job, float] = {}

    def run(self, jobs: Sequence[Job], observer: Observer) -> None:
        """Run the jobs, and wait until all have ended. Raises AbsldError that names the failed."""
        self.waiting = list(jobs)
        try:
            while self.waiting or self.running:
                while self.devices and (job := self.next_job(observer)):
                    self.start(job, job.commands, self.devices.pop(0))
                    observer.wait(f"{job.title}: started, log {log_of(job)}")
                time.sleep(POLL)
                for work in [*self.running]:
                    if (code := work.process.poll()) is not None:
                        self.running.remove(work)
                        self.end(work, code, observer)
        except BaseException:
            self.stop(observer)
            raise
        fail(self.failed, len(jobs))

    def next_job(self, observer: Observer) -> Job | None:
        """Take the next job that can start; those whose teacher failed fail, too."""
        for job in [*self.waiting]:
            unfinished = {*self.waiting, *(work.job for work in self.running)}
            if failed := [needed for needed in job.needs if needed in self.failed]:
                self.waiting.remove(job)
                self.failed[job] = f"not started, {failed[0].title} failed"
            elif not unfinished.isdisjoint(job.needs):
                continue
            elif self.not_before.get(job, 0.0) <= time.monotonic():
                self.waiting.remove(job)
                return job
        return None

    def start(self, job: Job, commands: Sequence[tuple[str, ...]], device: str | None) -> None:
        environment = dict(os.environ)
        if device is not None:
            environment |= {"CUDA_VISIBLE_DEVICES": device, "CUDA_DEVICE_ORDER": IN_ORDER}
        with open_regular(log_of(job), "ab") as log:
            process = subprocess.Popen(
                commands[0],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C of the terminal is for this process alone
            )
        self.running.append(Work(job, device, process, list(commands[1:])))

    def end(self, work: Work, code: int, observer: Observer) -> None:
        """Go on after the end of a process: with the job's next one, or with the next job."""
        job = work.job
        if code == 0 and work.left:
            self.start(job, work.left, work.device)
            return
        self.devices.append(work.device)
        if code == BusyError.exit_code:
            if job not in self.not_before:
                observer.wait(f"{job.title}: waiting, another command's process is at work in it")
            self.not_before[job] = time.monotonic() + WAIT
            self.waiting.append(job)
        elif code == 0:
            observer.wait(f"{job.title}: finished")
        else:
            self.failed[job] = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            observer.wait(f"{job.title}: failed, {self.failed[job]}, log {log_of(job)}")

    def stop(self, observer: Observer) -> None:
        """Let all processes save their state, and wait for them; a second signal ends them."""
        if not self.running:
            return
        observer.wait(
            f"stopping {len(self.running)} trainings: each saves its state after the current step"
        )
        for stop in (SAVE_AND_STOP, KILL):
            for work in self.running:
                with contextlib.suppress(OSError):
                    work.process.send_signal(stop)
            try:
                for work in self.running:
                    work.process.wait()
                return
            except BaseException:  # a second signal
                if stop == KILL:
                    raise
