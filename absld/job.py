"""A whole run: data, teacher, student, test. What is shown meanwhile is the observer's matter."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from absld.checkpoint import RunDirectory, digest
from absld.config import Config, TrainConfig, from_toml, resolve, to_toml
from absld.data import Splits, load_data
from absld.environment import environment
from absld.errors import UsageError
from absld.evaluation import ClassAccuracies, evaluate
from absld.loading import load_network
from absld.methods import METHODS
from absld.metrics import fairness
from absld.runtime import arithmetic, in_precision, resolve_device
from absld.teacher import check_teacher, freeze
from absld.trainer import EpochReport, Role, StepReport, compare, fit, plain


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
    warning: str | None = None

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
            "warning": self.warning,
        }


def train(config: Config, observer: Observer, *, resume: bool = False) -> Result:
    """Train a student, and a teacher before it where none is given, and test the student.

    The run gets a directory of its own in `config.out`; a teacher that is made here, too, and is
    used again by every run with the same images and settings. Raises AbsldError.
    """
    device = resolve_device(config.device)
    splits = load_data(config.dataset, config.data)
    if config.select_on == "test":
        splits = splits._replace(validation=splits.test)
    run = student_run(config, splits, resume)
    observer.note(f"seed {config.seed}, device {device}, torch {torch.__version__}")
    splits = splits.to(device)
    classes = splits.train.classes
    with run:
        record = Record(run, config, splits)
        if config.select_on == "test":
            observer.note(SELECTED_ON_TEST)
        teacher = teacher_sha = None
        if METHODS[config.method].needs_teacher:
            teacher = make_teacher(config, splits, observer)
            teacher_sha = record.taught_by(teacher)
        student = load_network(config.student, len(classes), (config.seed, "student"))
        tell(student.notes, observer)
        student.model.to(device)
        observer.begin("student", config, classes)
        for report in fit(
            student.model,
            teacher,
            splits.train,
            splits.validation,
            config.training(),
            run=run,
            about={"architecture": student.architecture, "classes": list(classes)},
            on_step=observer.step,
        ):
            observer.epoch(report)
        observer.end()
        with arithmetic(config.precision):
            tested = in_precision(student.model, config.precision)
            clean, robust = evaluate(tested, splits.test, epsilon=config.epsilon)
        result = Result(
            run=run.path,
            classes=classes,
            accuracies=ClassAccuracies(clean.cpu(), robust.cpu()),
            teacher_sha256=teacher_sha,
            student_sha256=digest(student.model.state_dict()),
            warning=SELECTED_ON_TEST if config.select_on == "test" else None,
        )
        run.write("result.json", json.dumps(result.document(), indent=1) + "\n")
    return result


SELECTED_ON_TEST = "warning: the best epoch is chosen on the test images: its figures are too good"


def make_teacher(config: Config, splits: Splits, observer: Observer) -> nn.Module:
    """The teacher that is given, or one by TRADES: found finished, continued, or trained."""
    classes, key = splits.train.classes, (config.seed, "teacher")
    device = splits.train.labels.device
    if config.teacher:
        teacher = load_network(config.teacher, len(classes), key, config.teacher_model)
        tell(teacher.notes, observer)
        name = config.teacher
    else:
        teacher = load_network(config.teacher_model, len(classes), key)
        training = config.teacher_training()
        made_of = {**asdict(training), "network": config.teacher_model, **digests(splits)}
        run = RunDirectory(Path(config.out) / run_name(config, "teacher", made_of))
        name = str(run.path)
        with run:
            itself = replace(config, **vars(training), student=config.teacher_model)
            Record(run, itself, splits)
            observer.begin("teacher", training, classes)
            for report in fit(
                teacher.model.to(device),
                None,
                splits.train,
                splits.validation,
                training,
                run=run,
                role="teacher",
                about={"architecture": teacher.architecture, "classes": list(classes)},
                on_step=observer.step,
            ):
                observer.epoch(report)
            observer.end()
    observer.note(f"teacher: {name}")
    check_teacher(teacher.model.to(device), splits.validation, name, config.allow_weak_teacher)
    return freeze(teacher.model)


def tell(notes: tuple[str, ...], observer: Observer) -> None:
    for note in notes:
        observer.note(note)


# --- The record of a run ---

# Settings that change where things are and how fast, not what is computed.
PLACES = {"out", "data", "device", "allow_weak_teacher"}


def student_run(config: Config, splits: Splits, resume: bool) -> RunDirectory:
    """The directory of a student's run. Raises UsageError if there is a run and it is not to be
    resumed, or the other way round."""
    made_of = settings(config) | digests(splits)
    run = RunDirectory(Path(config.out) / run_name(config, config.method, made_of))
    if run.exists() and not resume:
        raise UsageError(
            f"{run.path} holds a run with these settings ({run.status()})",
            "--resume continues it, or shows its result; another --out starts anew",
        )
    if resume and not run.exists():
        refuse_unknown(config)
    return run


def run_name(config: Config, kind: str, made_of: Mapping[str, Any]) -> str:
    """A directory's name: what a person looks for, and a digest of all that makes the result."""
    key = hashlib.sha256(repr(sorted(made_of.items())).encode()).hexdigest()[:8]
    return f"{config.dataset}-{kind}-seed{config.seed}-{key}"


def digests(splits: Splits) -> dict[str, str]:
    return {name: part.digest() for name, part in splits._asdict().items()}


def refuse_unknown(config: Config) -> None:
    """Raise UsageError: there is no such run to resume; and say how the nearest one differs."""
    here = settings(config)
    there = {
        path.parent: compare(settings(resolve(from_toml(str(path)))), here)
        for path in sorted(Path(config.out).glob("*/config.toml"))
        if "-teacher-" not in path.parent.name
    }
    if not there:
        raise UsageError(f"nothing to resume in {config.out}", "leave out --resume to start a run")
    nearest = min(there, key=lambda path: len(there[path]))
    raise UsageError(
        f"no run with these settings in {config.out}; "
        f"in {nearest} {'; '.join(there[nearest]) or 'the images are others'}",
        "give the settings of that run, or leave out --resume to start a new one",
    )


def settings(config: Config) -> dict[str, Any]:
    """All that decides what is computed, without places."""
    return {name: value for name, value in asdict(config).items() if name not in PLACES}


class Record:
    """config.toml and environment.json of a run; one session more each time it is taken up."""

    def __init__(self, run: RunDirectory, config: Config, splits: Splits) -> None:
        self.run = run
        path = run.path / "environment.json"
        self.sessions = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.sessions.append(environment(splits.train.labels.device) | {"images": digests(splits)})
        run.write("config.toml", to_toml(config))
        self.write()

    def write(self) -> None:
        self.run.write("environment.json", json.dumps(self.sessions, indent=1) + "\n")

    def taught_by(self, teacher: nn.Module) -> str:
        """Note the teacher's digest, and return it."""
        sha: str = digest(teacher.state_dict())
        self.sessions[-1]["teacher_sha256"] = sha
        self.write()
        return sha
