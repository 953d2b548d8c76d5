"""A whole training run: data, teacher, student, test."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from absld.config.settings import Config, TrainConfig
from absld.data.dataset import Splits
from absld.data.sources import load_data
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.logit_cache import LogitCacheSettings
from absld.engine.precision import (
    emulation_warnings,
    float32_precision,
    resolve_device,
    with_precision,
)
from absld.engine.techniques import Techniques, describe, with_techniques
from absld.evaluation.validation import check_network, check_teacher, validate
from absld.methods.base import Method
from absld.methods.registry import build_method
from absld.metrics import ClassAccuracies, fairness
from absld.models.loading import Network, load_network, load_state
from absld.progress import Observer, Role, plain
from absld.runs.logit_caches import cache_folder, describe_cache, load_teacher
from absld.runs.run_record import (
    RunRecord,
    check_resume,
    deciding_settings,
    image_digests,
    run_directory,
    techniques_of_run,
)
from absld.storage.checkpoint import load
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory
from absld.trainer import fit

SELECTED_ON_TEST = (
    "warning: the best epoch is selected on the test images: reported accuracies are optimistic"
)


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """A finished run: accuracies (C,) on the test images, digests of the networks' weights."""

    run: Path
    classes: tuple[str, ...]
    accuracies: ClassAccuracies
    teacher_sha256: str | None
    student_sha256: str
    warning: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, for JSON."""
        return {
            "run": str(self.run),
            "classes": list(self.classes),
            "attack": "PGD-20",
            **{
                name: {"class_accuracy": plain(accuracy), **fairness(accuracy)._asdict()}
                for name, accuracy in self.accuracies._asdict().items()
            },
            "teacher_sha256": self.teacher_sha256,
            "student_sha256": self.student_sha256,
            "warning": self.warning,
        }


class Plan(NamedTuple):
    """The start of a run: device, techniques, images, method, networks, digests of these
    (`inputs`), and directory."""

    device: torch.device
    techniques: Techniques
    splits: Splits
    method: Method
    student: Network
    teacher: Network | None
    inputs: dict[str, str]
    run: RunDirectory


def plan(
    config: Config, splits: Splits | None = None, distributed: Distributed = SINGLE_PROCESS
) -> Plan:
    """Load and check all inputs, before hours are spent on a teacher.

    splits: the images, if they are loaded already. Raises AbsldError.
    """
    device = resolve_device(distributed.device(config.device))
    splits = splits or load_data(config.dataset, config.data, config.image_size)
    if config.select_on == "test":
        splits = splits._replace(validation=splits.test)
    method = build_method(config, splits.train.num_classes)
    student = load_network(config.student, splits.train.num_classes, (config.seed, "student"))
    check_network(student.model, splits.train, config.student)
    teacher = load_teacher(config, splits) if method.needs_teacher and config.teacher else None
    inputs = image_digests(splits) | {"initial_weights": digest(student.model.state_dict())}
    if teacher:
        inputs["teacher_weights"] = digest(teacher.model.state_dict())
    identity = deciding_settings(config) | inputs
    run = run_directory(config, config.method, identity, distributed)
    techniques = techniques_of_run(config, run, device)
    return Plan(device, techniques, splits, method, student, teacher, inputs, run)


def describe_start(config: Config, techniques: Techniques, device: torch.device) -> list[str]:
    """Describe what a run computes with, in lines."""
    return [
        f"seed {config.seed}, device {device}, torch {torch.__version__}",
        f"engine {config.engine}: {describe(techniques)}",
        *emulation_warnings(asdict(techniques).values(), device),
    ]


def train(
    config: Config,
    observer: Observer,
    *,
    resume: bool = False,
    splits: Splits | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> TrainingResult:
    """Train a student, and a teacher before it where there is none, and test the student.

    The run gets a directory of its own in `config.out`; so does a teacher that is trained here,
    which every run with the same images and settings uses again. splits: the images, if they are
    loaded already. distributed: the processes that train together. Raises AbsldError.
    """
    device, techniques, splits, method, student, loaded_teacher, inputs, run = plan(
        config, splits, distributed
    )
    check_resume(run, config, inputs, resume)
    distributed.barrier()  # now all know what is there, and one may write
    notes = [*student.notes, *(loaded_teacher.notes if loaded_teacher else ())]
    for note in [*describe_start(config, techniques, device), *notes]:
        observer.note(note)
    splits = splits.to(device)
    with run:
        record = RunRecord(run, config, techniques, device, inputs, distributed)
        if config.select_on == "test":
            observer.note(SELECTED_ON_TEST)
        teacher = teacher_sha = None
        if method.needs_teacher:
            name = config.teacher
            if loaded_teacher:
                teacher = loaded_teacher.model
            else:
                teacher, name = train_teacher(config, splits, observer, distributed)
            observer.note(f"teacher: {name}")
            with float32_precision(techniques.precision):
                teacher.to(device)
                check_teacher(teacher, splits.validation, name, config.allow_weak_teacher)
            teacher_sha = record.add_teacher(teacher)
            if method.caches_teacher:
                observer.note(describe_cache(config, splits))
        student.model.to(device)
        train_network(
            "student", student, teacher, splits, with_techniques(config.training(), techniques),
            observer, run, distributed,
            LogitCacheSettings(cache_folder(config), config.logit_cache_gib),
        )  # fmt: skip
        result = TrainingResult(
            run=run.path,
            classes=splits.train.classes,
            accuracies=accuracies_on_test(
                student.model, splits, config, techniques.precision, distributed
            ),
            teacher_sha256=teacher_sha,
            student_sha256=digest(student.model.state_dict()),
            warning=SELECTED_ON_TEST if config.select_on == "test" else None,
        )
        run.write("result.json", json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def train_teacher(
    config: Config, splits: Splits, observer: Observer, distributed: Distributed
) -> tuple[nn.Module, str]:
    """Train a teacher by TRADES, resume its training, or load it if it is finished.

    Returns the teacher and its run directory.
    """
    device = splits.train.labels.device
    teacher = load_network(config.teacher_model, splits.train.num_classes, (config.seed, "teacher"))
    teacher.model.to(device)
    training = config.teacher_training()
    inputs = image_digests(splits) | {"initial_weights": digest(teacher.model.state_dict())}
    identity = deciding_settings(training) | inputs
    run = run_directory(config, "teacher", identity, distributed)
    techniques = techniques_of_run(training, run, device)
    finished = run.exists() and run.status() == "finished"
    distributed.barrier()
    if finished:
        load_state(teacher.model, load(run.best)["model"], run.best)
    else:
        with run:
            own_config = replace(config, **vars(training), student=config.teacher_model)
            RunRecord(run, own_config, techniques, device, inputs, distributed)
            training = with_techniques(training, techniques)
            train_network("teacher", teacher, None, splits, training, observer, run, distributed)
    return teacher.model, str(run.path)


def train_network(
    role: Role,
    network: Network,
    teacher: nn.Module | None,
    splits: Splits,
    config: TrainConfig,
    observer: Observer,
    run: RunDirectory,
    distributed: Distributed,
    logit_cache: LogitCacheSettings | None = None,
) -> None:
    """Train a network in its run directory, and report to the observer."""
    classes = splits.train.classes
    observer.begin_training(role, config, classes)
    for report in fit(
        network.model,
        teacher,
        splits.train,
        splits.validation,
        config,
        run=run,
        role=role,
        about={"architecture": network.architecture, "classes": list(classes)},
        on_step=observer.step,
        logit_cache=logit_cache,
        distributed=distributed,
    ):
        observer.epoch(report)
    observer.end_training()


def accuracies_on_test(
    student: nn.Module, splits: Splits, config: Config, precision: str, distributed: Distributed
) -> ClassAccuracies:
    """Compute the accuracies of the classes on the test images, on the CPU."""
    with float32_precision(precision):
        clean, robust = validate(
            with_precision(student, precision),
            splits.test,
            epsilon=config.epsilon,
            batch_size=config.batch_size,
            distributed=distributed,
        )
    return ClassAccuracies(clean.cpu(), robust.cpu())
