"""A whole run: data, teacher, student, test. What is shown meanwhile is the observer's matter."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from absld.checkpoint import RunDirectory, digest, refuse_existing
from absld.config import Config, TrainConfig, to_toml
from absld.data import Splits, load_data
from absld.environment import environment
from absld.errors import UsageError
from absld.evaluation import ClassAccuracies, evaluate
from absld.loading import Network, load_network
from absld.methods import METHODS
from absld.metrics import fairness
from absld.runtime import arithmetic, in_precision, resolve_device
from absld.teacher import check_teacher
from absld.trainer import EpochReport, Role, StepReport, compare, fit, identity, plain


class Observer(Protocol):
    """Hears what a run does. `step` may raise Interrupted."""

    def note(self, text: str) -> None:
        """A line worth knowing."""

    def begin(self, role: Role, config: TrainConfig, classes: tuple[str, ...]) -> None:
        """A training begins, or goes on."""

    def step(self, report: StepReport) -> None:
        """A batch is done."""

    def epoch(self, report: EpochReport) -> None:
        """An epoch is done."""

    def end(self) -> None:
        """The training that began last has ended."""


@dataclass(frozen=True)
class Result:
    """A finished run: accuracies (C,) on the test images, digests of the networks' weights."""

    run: Path
    classes: tuple[str, ...]
    accuracies: ClassAccuracies
    teacher_sha256: str | None
    student_sha256: str

    def document(self) -> dict[str, Any]:
        """The result as plain values, for JSON."""
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
        }


def train(config: Config, observer: Observer, *, resume: bool = False) -> Result:
    """Train a student, and a teacher before it where none is given, and test the student.

    The run gets a directory of its own in `config.out`; a teacher that is made here, too, and is
    used again by every run with the same images and settings. Raises AbsldError.
    """
    device = resolve_device(config.device)
    splits = load_data(config.dataset, config.data)
    if config.select_on == "test":
        observer.note("warning: the best epoch is chosen on the test images; figures are too good")
        splits = splits._replace(validation=splits.test)
    splits = splits.to(device)
    classes = splits.train.num_classes
    teacher = None
    if METHODS[config.method].needs_teacher:
        teacher = make_teacher(config, splits, observer)
        teacher.model.to(device)
        for note in teacher.notes:
            observer.note(note)
        check_teacher(
            teacher.model,
            splits.validation,
            config.teacher or teacher.architecture,
            config.allow_weak_teacher,
        )
    student = load_network(config.student, classes, (config.seed, "student"))
    student.model.to(device)
    for note in student.notes:
        observer.note(note)
    run = training_run(
        config,
        config.training(),
        student,
        teacher.model if teacher else None,
        splits,
        observer,
        role="student",
        resume=resume,
    )
    with arithmetic(config.precision):
        accuracies = evaluate(
            in_precision(student.model, config.precision), splits.test, epsilon=config.epsilon
        )
    return Result(
        run=run.path,
        classes=splits.train.classes,
        accuracies=ClassAccuracies(accuracies.clean.cpu(), accuracies.robust.cpu()),
        teacher_sha256=digest(teacher.model.state_dict()) if teacher else None,
        student_sha256=digest(student.model.state_dict()),
    )


def make_teacher(config: Config, splits: Splits, observer: Observer) -> Network:
    """The teacher that is given, or one by TRADES: found finished, continued, or trained."""
    classes, key = splits.train.num_classes, (config.seed, "teacher")
    if config.teacher:
        return load_network(config.teacher, classes, key, config.teacher_model)
    teacher = load_network(config.teacher_model, classes, key)
    teacher.model.to(splits.train.labels.device)
    run = training_run(
        config,
        config.teacher_training(),
        teacher,
        None,
        splits,
        observer,
        role="teacher",
        resume=True,
    )
    observer.note(f"teacher: {run.path}")
    return teacher


def training_run(
    config: Config,
    training: TrainConfig,
    network: Network,
    teacher: nn.Module | None,
    splits: Splits,
    observer: Observer,
    *,
    role: Role,
    resume: bool,
) -> RunDirectory:
    """Train `network` in the run directory that its settings name, from where that stands."""
    same = identity(network.model, teacher, splits.train, splits.validation, training, role)
    run = RunDirectory(Path(config.out) / run_name(config, training, same, role))
    if not resume:
        refuse_existing(run)
    elif role == "student" and not run.exists():
        refuse_unknown(Path(config.out), same)
    record = {
        "identity": same,
        "sessions": [*sessions(run), environment(splits.train.labels.device)],
    }
    about = {"architecture": network.architecture, "classes": list(splits.train.classes)}
    with run:
        run.write("config.toml", to_toml(config))
        run.write("environment.json", json.dumps(record, indent=1) + "\n")
        observer.begin(role, training, splits.train.classes)
        for report in fit(
            network.model,
            teacher,
            splits.train,
            splits.validation,
            training,
            run=run,
            role=role,
            about=about,
            on_step=observer.step,
        ):
            observer.epoch(report)
        observer.end()
    return run


def run_name(config: Config, training: TrainConfig, same: Mapping[str, Any], role: Role) -> str:
    """A directory's name: what a person looks for, and a digest of all that makes the result."""
    key = hashlib.sha256(repr(sorted(same.items())).encode()).hexdigest()[:8]
    kind = "teacher" if role == "teacher" else training.method
    return f"{config.dataset}-{kind}-seed{training.seed}-{key}"


def sessions(run: RunDirectory) -> list[dict[str, object]]:
    """The environments in which a run has been worked on so far."""
    path = run.path / "environment.json"
    found: list[dict[str, object]] = []
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))["sessions"]
    return found


def refuse_unknown(out: Path, same: Mapping[str, Any]) -> None:
    """Raise UsageError: there is no such run to resume; and say how the nearest one differs."""
    nearest: list[str] = []
    where = None
    for path in out.glob("*/environment.json"):
        there = json.loads(path.read_text(encoding="utf-8"))["identity"]
        differences = compare(there, json.loads(json.dumps(same)))
        if there["role"] == "student" and (where is None or len(differences) < len(nearest)):
            nearest, where = differences, path.parent
    if where is None:
        raise UsageError(f"nothing to resume in {out}", "leave out --resume to start a run")
    raise UsageError(
        f"no run with these settings in {out}; in {where} {'; '.join(nearest)}",
        "give the settings of that run, or leave out --resume to start a new one",
    )
