"""The trainings of a comparison as jobs: processes that a launcher runs, teachers first."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.fields import Settings
from absld.config.imports import names_code
from absld.config.launcher_settings import LauncherSettings
from absld.config.settings import Config
from absld.data.dataset import Splits
from absld.engine.precision import parse_device, resolve_device
from absld.evaluation.runner import is_evaluated
from absld.evaluation.targets import complete_config, load_target
from absld.progress import Observer
from absld.runs.jobs import Job, Launcher
from absld.runs.local_launcher import LocalLauncher
from absld.runs.planning import load_splits, plan, plan_teacher, trained_first
from absld.runs.slurm_launcher import Queued, SlurmLauncher, describe, name_of, read_queue
from absld.storage.run_directory import RunDirectory


def build_launcher(settings: LauncherSettings, device: str) -> Launcher:
    """Return the launcher of the settings, for trainings on `device`.

    Raises UsageError if this machine lacks what it needs.
    """
    if settings.launcher == "slurm":
        return SlurmLauncher(settings)
    if parse_device(device) != torch.device("cuda"):  # or a certain one, for all
        resolve_device(device)
        return LocalLauncher(settings.jobs, [])
    count = torch.cuda.device_count()  # by which this process takes no memory of them
    if not count:
        resolve_device(device)
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = given.split(",") if given else [*map(str, range(count))]
    return LocalLauncher(settings.jobs, visible[:count])


def launch(
    settings: LauncherSettings, jobs: Sequence[Job], device: str, observer: Observer
) -> set[Path]:
    """Run the jobs that are not finished by a launcher, on `device`. Returns the runs of these.

    Raises AbsldError.
    """
    launcher = build_launcher(settings, device)
    left = [job for job in jobs if not job.is_finished()]
    teachers, needed = ({one for job in each for one in job.needs} for each in (jobs, left))
    left = [job for job in left if job not in teachers or job in needed]
    if left:
        launcher.run(left, observer)
    return {job.run.path for job in left}


def plan_jobs(
    labels: Sequence[str],
    configs: Sequence[Config],
    evaluation: EvaluationConfig,
    splits: Splits,
    observer: Observer,
) -> list[Job]:
    """Return a job for each training, finished or not, and before them those of their teachers
    and robust starts.

    Raises AbsldError.
    """
    teachers: dict[Path, Job] = {}
    students = []
    for label, config in zip(labels, configs, strict=True):
        planned = plan(without_device(config), observer, splits)
        needs: dict[Job, None] = {}  # one, where the teacher is the robust start
        for use, trained in trained_first(planned, without_device(config)).items():
            run = plan_teacher(trained, planned.splits).run
            job = teacher_job(f"{use}, seed {config.seed}", config, run)
            needs[teachers.setdefault(run.path, job)] = None
        own = evaluation_of(config, evaluation)
        students.append(student_job(label, config, own, planned.run, splits, tuple(needs)))
    return [*teachers.values(), *students]


def training_states(
    labels: Sequence[str],
    configs: Sequence[Config],
    evaluation: EvaluationConfig,
    observer: Observer,
    launcher: LauncherSettings,
) -> list[dict[str, Any]]:
    """Return the state of each training and teacher as plain values; trains nothing."""
    splits = load_splits(without_device(configs[0]), torch.device("cpu"), observer)
    jobs = plan_jobs(labels, configs, evaluation, splits, observer)
    queue = read_queue() if launcher.launcher == "slurm" else {}
    return [describe_state(job, queue.get(name_of(job))) for job in jobs]


def describe_state(job: Job, queued: Queued | None) -> dict[str, Any]:
    """Describe how far a job is, by its run directory and by Slurm's queue, as plain values."""
    begun = job.run.exists()
    status = job.run.status() if begun else "not started"
    if begun and job.is_finished():
        state = "finished"
    elif queued:
        state = describe(queued)
    elif status == "running":
        state = "running" if job.run.is_busy() else "killed"
    else:
        state = "trained, not evaluated" if status == "finished" else status
    return {
        "training": job.title,
        "state": state,
        "epochs": [len(job.run.records()) if begun else 0, job.epochs],
        "job": queued.id if queued else None,
        "run": str(job.run.path),
    }


def without_device(value: Any) -> Any:
    """Return settings for a machine that may lack the device of the trainings."""
    graphs = {"cuda_graph": None} if isinstance(value, Config) else {}
    return replace(value, device="cpu", **graphs)


def evaluation_of(config: Config, evaluation: EvaluationConfig) -> EvaluationConfig:
    """Return the settings of the evaluation of a run, whose network the user may have given as code."""
    return replace(evaluation, model=config.student if names_code(config.student) else "")


def teacher_job(title: str, config: Config, run: RunDirectory) -> Job:
    command = absld_command("teacher", "train", *to_flags(config))
    return Job(
        title,
        run,
        config.teacher_epochs,
        (command,),
        lambda: run.exists() and run.status() == "finished",
    )


def student_job(
    label: str,
    config: Config,
    evaluation: EvaluationConfig,
    run: RunDirectory,
    splits: Splits,
    needs: tuple[Job, ...],
) -> Job:
    def is_finished() -> bool:
        if not (run.exists() and run.status() == "finished"):
            return False
        images = getattr(splits, evaluation.split)
        complete = complete_config(without_device(evaluation), str(run.path))
        network = load_target(str(run.path), complete, images)
        return is_evaluated(str(run.path), network, images, complete)

    commands = (
        absld_command("train", *to_flags(config), "--resume"),
        absld_command("evaluate", *to_flags(evaluation), "--", str(run.path)),
    )
    title = f"{label}, seed {config.seed}"
    return Job(title, run, config.epochs, commands, is_finished, needs)


def absld_command(*arguments: str) -> tuple[str, ...]:
    """Return a command of this program, as a process of its own."""
    return (sys.executable, "-m", "absld", *arguments)


def to_flags(settings: Settings) -> list[str]:
    """Return settings as flags, also those at their defaults, which a recipe could change."""
    flags = []
    for f in fields(settings):
        value, flag = getattr(settings, f.name), f.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            text = ",".join(map(repr, value)) if isinstance(value, tuple) else str(value)
            flags.append(f"--{flag}={text}")
    return flags
