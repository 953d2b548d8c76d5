"""A whole run: data, teacher, student, test. What is shown meanwhile is the observer's matter."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from absld.config.files import of_run, to_toml
from absld.config.settings import Config, TrainConfig
from absld.data.augmentation import Views
from absld.data.dataset import Splits
from absld.data.sources import load_data
from absld.engine.distributed import ALONE, Ranks
from absld.engine.logit_cache import Bank, RememberingTeacher, bank_bytes, fill, open_bank, rows_of
from absld.engine.precision import arithmetic, in_precision, laid_out, resolve_device
from absld.errors import CheckpointError, UsageError
from absld.evaluation.validation import check_network, check_teacher, freeze, validate
from absld.methods.registry import method_class
from absld.metrics import ClassAccuracies, fairness
from absld.models.loading import Network, load_network, load_state
from absld.progress import EpochReport, Role, StepReport, plain
from absld.storage.checkpoint import load
from absld.storage.environment import environment
from absld.storage.files import digest, key_of
from absld.storage.run_directory import ReadRunDirectory, RunDirectory
from absld.trainer import compare, fit


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


class Stops(Protocol):
    """What ends a training early; see absld.cli.signals.Stop."""

    training: bool

    def check(self) -> None: ...


@dataclass(frozen=True, eq=False)
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


class Plan(NamedTuple):
    """What a run starts from: images, networks, digests of both, and the run's directory."""

    splits: Splits
    student: Network
    teacher: Network | None
    inputs: dict[str, str]
    run: RunDirectory


def plan(config: Config, splits: Splits | None = None, ranks: Ranks = ALONE) -> Plan:
    """Read all that is given, before hours are spent on a teacher. splits: the images, if they are
    there already. Raises AbsldError."""
    splits = splits or load_data(config.dataset, config.data, config.image_size)
    if config.select_on == "test":
        splits = splits._replace(validation=splits.test)
    student = load_network(config.student, splits.train.num_classes, (config.seed, "student"))
    check_network(student.model, splits.train, config.student)
    needs_teacher = method_class(config.method).needs_teacher
    teacher = given_teacher(config, splits) if needs_teacher and config.teacher else None
    inputs = digests(splits) | {"initial_weights": digest(student.model.state_dict())}
    if teacher:
        inputs["teacher_weights"] = digest(teacher.model.state_dict())
    name = run_name(config, config.method, settings(config) | inputs)
    return Plan(splits, student, teacher, inputs, directory(Path(config.out) / name, ranks))


def directory(path: Path, ranks: Ranks) -> RunDirectory:
    """The directory of a run; of several processes one writes to it."""
    return RunDirectory(path) if ranks.first else ReadRunDirectory(path)


def train(
    config: Config,
    observer: Observer,
    *,
    resume: bool = False,
    splits: Splits | None = None,
    ranks: Ranks = ALONE,
) -> Result:
    """Train a student, and a teacher before it where none is given, and test the student.

    The run gets a directory of its own in `config.out`; a teacher that is made here, too, and is
    used again by every run with the same images and settings. splits: the images, if they are
    there already. ranks: the processes that do this together. Raises AbsldError.
    """
    device = resolve_device(ranks.device(config.device))
    splits, student, given, inputs, run = plan(config, splits, ranks)
    check_resume(run, config, inputs, resume)
    ranks.wait()  # now all know what is there, and one may write
    classes = splits.train.classes
    observer.note(f"seed {config.seed}, device {device}, torch {torch.__version__}")
    for note in [*student.notes, *(given.notes if given else ())]:
        observer.note(note)
    splits = splits.to(device)
    with run:
        record = Record(run, config, device, inputs, ranks)
        if config.select_on == "test":
            observer.note(SELECTED_ON_TEST)
        teacher = teacher_sha = None
        if method_class(config.method).needs_teacher:
            teacher, name = (
                (given.model, config.teacher)
                if given
                else made_teacher(config, splits, observer, ranks)
            )
            observer.note(f"teacher: {name}")
            with arithmetic(config.precision):
                teacher.to(device)
                check_teacher(teacher, splits.validation, name, config.allow_weak_teacher)
            teacher_sha = record.taught_by(teacher)
            if method_class(config.method).asks_clean_views:
                observer.note(about_bank(config, splits))
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
            bank=Bank(bank_folder(config), config.bank_gib),
            ranks=ranks,
        ):
            observer.epoch(report)
        observer.end()
        with arithmetic(config.precision):
            tested = in_precision(student.model, config.precision)
            clean, robust = validate(
                tested,
                splits.test,
                epsilon=config.epsilon,
                batch_size=config.batch_size,
                ranks=ranks,
            )
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


def given_teacher(config: Config, splits: Splits) -> Network:
    """The teacher of `--teacher`, if it fits the images."""
    classes, key = splits.train.num_classes, (config.seed, "teacher")
    teacher = load_network(config.teacher, classes, key, config.teacher_model)
    check_network(teacher.model, splits.train, config.teacher)
    return teacher


def made_teacher(
    config: Config, splits: Splits, observer: Observer, ranks: Ranks
) -> tuple[nn.Module, str]:
    """A teacher by TRADES, and its run: found finished, continued, or trained."""
    classes, device = splits.train.classes, splits.train.labels.device
    teacher = load_network(config.teacher_model, len(classes), (config.seed, "teacher"))
    teacher.model.to(device)
    training = config.teacher_training()
    inputs = digests(splits) | {"initial_weights": digest(teacher.model.state_dict())}
    name = run_name(config, "teacher", asdict(training) | inputs)
    run = directory(Path(config.out) / name, ranks)
    finished = run.exists() and run.status() == "finished"
    ranks.wait()
    if finished:
        load_state(teacher.model, load(run.best)["model"], run.best)
    else:
        with run:
            itself = replace(config, **vars(training), student=config.teacher_model)
            Record(run, itself, device, inputs, ranks)
            observer.begin("teacher", training, classes)
            for report in fit(
                teacher.model,
                None,
                splits.train,
                splits.validation,
                training,
                run=run,
                role="teacher",
                about={"architecture": teacher.architecture, "classes": list(classes)},
                on_step=observer.step,
                ranks=ranks,
            ):
                observer.epoch(report)
            observer.end()
    return teacher.model, str(run.path)


def fill_bank(config: Config, note: Callable[[str], None]) -> Iterator[tuple[int, int]]:
    """Remember the logits of the given teacher for every view of the training images, so that no
    later run asks for them; yields the views done, and how many there are. Raises AbsldError."""
    if not config.teacher:
        raise UsageError("whose logits?", "--teacher FILE, a run or package.module:factory")
    device = resolve_device(config.device)
    splits = load_data(config.dataset, config.data, config.image_size)
    given = given_teacher(config, splits)
    for text in given.notes:
        note(text)
    views = Views(splits.train.to(device), config.padding)
    size = bank_size(config, splits)
    if size > config.bank_gib * 2**30:
        raise UsageError(
            f"a bank of {size / 2**30:.2g} GiB is more than --bank-gib {config.bank_gib:g}",
            "a larger --bank-gib, or no bank: the teacher is then asked in every step",
        )
    note(about_bank(config, splits))
    precision = config.teacher_precision or config.precision
    network = laid_out(freeze(given.model.to(device)), config.channels_last)
    called = in_precision(network, precision)
    with arithmetic(precision):
        bank = open_bank(bank_folder(config), called, views, flip=config.flip, precision=precision)
        yield from fill(RememberingTeacher(called, bank), views, config.batch_size)


def bank_folder(config: Config) -> Path:
    return Path(config.out) / "banks"


def bank_size(config: Config, splits: Splits) -> int:
    """In bytes."""
    rows = rows_of(len(splits.train), config.padding, config.flip)
    return bank_bytes(rows, splits.train.num_classes)


def about_bank(config: Config, splits: Splits) -> str:
    """What a bank takes, before it is made."""
    size = f"teacher's logits of all views: {bank_size(config, splits) / 2**20:,.1f} MiB"
    if bank_size(config, splits) <= config.bank_gib * 2**30:
        return f"{size} in {bank_folder(config)}"
    return f"{size}, more than --bank-gib {config.bank_gib:g}: asked in every step"


# --- The record of a run ---

# Settings that say where things are, not what is computed; a given teacher counts by its weights.
PLACES = {"out", "data", "device", "teacher", "allow_weak_teacher", "bank_gib"}


def check_resume(run: RunDirectory, config: Config, inputs: dict[str, str], resume: bool) -> None:
    """Raise UsageError if there is a run and it is not to be resumed, or the other way round."""
    if run.exists() and not resume:
        raise UsageError(
            f"{run.path} holds a run with these settings ({run.status()})",
            "--resume continues it, or shows its result; another --out starts anew",
        )
    if resume and not run.exists():
        refuse_unknown(config, inputs)


def run_name(config: Config, kind: str, made_of: Mapping[str, Any]) -> str:
    """A directory's name: what a person looks for, and a digest of all that makes the result."""
    short = re.sub(r"[^\w-]", "-", kind)  # package.module:Class is a method, too
    return f"{config.dataset}-{short}-seed{config.seed}-{key_of(made_of)}"


def digests(splits: Splits) -> dict[str, str]:
    return {f"{name}_images": part.digest() for name, part in splits._asdict().items()}


def refuse_unknown(config: Config, inputs: dict[str, str]) -> None:
    """Raise UsageError: there is no such run to resume; and say how the nearest one differs."""
    differences = {}
    for path in sorted(Path(config.out).glob("*/config.toml")):
        if "-teacher-" not in path.parent.name and sessions(path.parent):
            there = settings(of_run(path)) | sessions(path.parent)[-1]["inputs"]
            differences[path.parent] = compare(there, settings(config) | inputs)
    if not differences:
        raise UsageError(f"nothing to resume in {config.out}", "leave out --resume to start a run")
    nearest = min(differences, key=lambda path: len(differences[path]))
    raise UsageError(
        f"no run with these settings in {config.out}; in {nearest} "
        f"{'; '.join(differences[nearest])}",
        "give the settings of that run, or leave out --resume to start a new one",
    )


def settings(config: Config) -> dict[str, Any]:
    """All that decides what is computed, without places."""
    return {name: value for name, value in asdict(config).items() if name not in PLACES}


def sessions(folder: Path) -> list[dict[str, Any]]:
    """What environment.json says: one entry for each time that the run was taken up."""
    path = folder / "environment.json"
    found: list[dict[str, Any]] = []
    if path.exists():
        try:
            found = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error})", "copy the run again from where it came from"
            ) from error
    return found


class Record:
    """config.toml and environment.json of a run; one session more each time it is taken up."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        device: torch.device,
        inputs: dict[str, str],
        ranks: Ranks,
    ) -> None:
        self.run = run
        now = environment(device) | {"processes": ranks.count, "inputs": inputs}
        self.sessions = [*sessions(run.path), now]
        self.write()
        run.write("config.toml", to_toml(config))  # last: a folder that has it has both

    def write(self) -> None:
        self.run.write("environment.json", json.dumps(self.sessions, indent=1) + "\n")

    def taught_by(self, teacher: nn.Module) -> str:
        """Note the teacher's digest, and return it."""
        sha = digest(teacher.state_dict())
        self.sessions[-1]["teacher_sha256"] = sha
        self.write()
        return sha
