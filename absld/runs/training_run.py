"""A whole training run: teacher, student, test."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from absld.config.settings import Config, TrainConfig
from absld.data.dataset import Splits
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.logit_cache import LogitCacheSettings
from absld.engine.precision import (
    float32_precision,
    with_precision,
)
from absld.engine.techniques import Techniques, with_techniques
from absld.errors import UsageError
from absld.evaluation.input_scale import check_teacher_scale
from absld.evaluation.validation import check_teacher, near_chance, validate
from absld.metrics import ClassAccuracies, fairness
from absld.models.fitting import load_state
from absld.models.loading import Network
from absld.progress import Observer, Role, plain
from absld.runs.logit_caches import cache_folder, describe_cache
from absld.runs.planning import (
    SELECTED_ON_TEST,
    Plan,
    Use,
    describe_start,
    plan,
    plan_teacher,
    trained_first,
)
from absld.runs.run_record import (
    RunRecord,
    changed_conditions,
    describe_new_run,
    describe_session,
    refuse_to_restart,
    techniques_of_run,
)
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory
from absld.storage.training_checkpoint import load_of_program
from absld.text import printable
from absld.trainer import fit

CHOICE: dict[Use, str] = {
    "teacher": "--teacher-model NAME or --teacher FILE",
    "robust start": "--student FILE",
}
WAIT = 0.5  # seconds between two attempts to lock a run directory


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
    planned = plan(config, observer, splits, distributed)
    device, techniques, splits = planned.device, planned.techniques, planned.splits
    student, given_teacher = planned.student, planned.teacher
    inputs, run = planned.inputs, planned.run
    session = describe_session(device, splits, inputs, distributed)
    networks = {"student": student, "teacher": given_teacher}
    session["hub"] = {role: dict(net.hub) for role, net in networks.items() if net and net.hub}
    caches = LogitCacheSettings(cache_folder(config), config.logit_cache_gib)
    notes = [*describe_start(config, techniques, device, splits), *student.notes]
    notes += given_teacher.notes if given_teacher else ()
    notes += changed_conditions(run, session)
    if resume:
        notes += describe_new_run(run, config, inputs)
    else:
        refuse_to_restart(run)
    distributed.barrier()  # now all know what is there, and one may write
    for note in notes:
        observer.note(note)
    splits = splits.to(device)
    with run:
        record = RunRecord(run, config, techniques, session | {"notes": [*map(printable, notes)]})
        teacher, teacher_sha = prepare_networks(
            planned._replace(splits=splits), config, record, observer, distributed
        )
        student.model.to(device)
        train_network(
            "student", student, teacher, splits, with_techniques(config.training(), techniques),
            observer, run, distributed,
            caches,
        )  # fmt: skip
        result = TrainingResult(
            run=run.path,
            classes=splits.train.classes,
            accuracies=accuracies_on_test(
                student.model, splits, config, techniques.precision, distributed, observer
            ),
            teacher_sha256=teacher_sha,
            student_sha256=digest(student.model.state_dict()),
            warning=SELECTED_ON_TEST if config.select_on == "test" else None,
        )
        run.write("result.json", json.dumps(result.to_dict(), indent=1) + "\n")
    return result


def prepare_networks(
    planned: Plan,
    config: Config,
    record: RunRecord,
    observer: Observer,
    distributed: Distributed,
) -> tuple[nn.Module | None, str | None]:
    """Find or train the networks that a student needs: its teacher, and its robust start.

    Loads the start into the student. Returns the teacher and the digest of its weights.
    """
    method, splits, techniques = planned.method, planned.splits, planned.techniques
    teacher = sha = None
    if method.needs_teacher:
        given = planned.teacher
        teacher = find_teacher(given, config, splits, techniques, observer, distributed)
        sha = record.add_network("teacher", teacher)
        if method.caches_teacher:
            observer.note(describe_cache(config, splits.train))
    if own := planned.robust_start:
        start = find_teacher(None, own, splits, techniques, observer, distributed, "robust start")
        record.add_network("robust_start", start)
        planned.student.model.load_state_dict(start.state_dict())
    return teacher, sha


def find_teacher(
    given: Network | None,
    config: Config,
    splits: Splits,
    techniques: Techniques,
    observer: Observer,
    distributed: Distributed,
    use: Use = "teacher",
) -> nn.Module:
    """Return the given teacher, or one trained here, on the device of the images.

    Raises CheckpointError if it is not fit to teach.
    """
    if given:
        teacher, name = given.model, config.teacher
    else:
        teacher, name = train_teacher(config, splits, observer, distributed, use)
    observer.note(f"{use}: {name}")
    with float32_precision(techniques.precision):
        teacher.to(splits.train.device)
        if given:
            weak = config.allow_weak_teacher
            observer.note(f"teacher: {check_teacher_scale(teacher, splits.validation, name, weak)}")
        check_teacher(teacher, splits.validation, name, config.allow_weak_teacher)
    return teacher


def train_teacher_alone(
    config: Config, observer: Observer, distributed: Distributed = SINGLE_PROCESS
) -> str:
    """Train the teacher or robust start of a run, or resume that, as `train` does before the
    student.

    Returns its run directory. Raises AbsldError, also if the run does not train one.
    """
    planned = plan(config, observer, None, distributed)
    trained = trained_first(planned, config)
    if not trained:
        why = f"--teacher {config.teacher} is given" if config.teacher else "its method needs none"
        raise UsageError(f"this run trains no teacher: {why}", "absld train trains the student")
    splits = planned.splits.to(planned.device)
    for use, own in trained.items():
        find_teacher(None, own, splits, planned.techniques, observer, distributed, use)
    return str(plan_teacher(own, splits, distributed).run.path)


def train_teacher(
    config: Config,
    splits: Splits,
    observer: Observer,
    distributed: Distributed,
    use: Use = "teacher",
) -> tuple[nn.Module, str]:
    """Train a teacher by TRADES, resume its training, or load it if it is finished.

    Waits for another process that trains it. Returns the teacher and its run directory.
    """
    device = splits.train.device
    teacher, training, inputs, run = plan_teacher(config, splits, distributed)
    for note in teacher.notes:
        observer.note(f"{use}: {note}")
    teacher.model.to(device)
    with locked(run, observer, distributed):
        techniques = techniques_of_run(training, run, device)
        finished = run.exists() and run.status() == "finished"
        distributed.barrier()  # now all know, and one may write
        if finished:
            weights = load_of_program(run.best, "model")["model"]
            load_state(teacher.model, weights, run.best)
        else:
            session = describe_session(device, splits, inputs, distributed)
            for note in changed_conditions(run, session):
                observer.note(f"{use}: {note}")
            observer.note(f"{use}: trained here by TRADES; another: {CHOICE[use]}")
            own_config = replace(config, **vars(training), student=config.teacher_model)
            training = with_techniques(training, techniques)
            with run:
                RunRecord(run, own_config, techniques, session)
                train_network(
                    "teacher", teacher, None, splits, training, observer, run, distributed
                )
    return teacher.model, str(run.path)


@contextmanager
def locked(run: RunDirectory, observer: Observer, distributed: Distributed) -> Iterator[None]:
    """Lock a run directory, once the process that works in it has finished or is gone."""
    waits = False
    # All processes wait in short turns: their messages have a time limit.
    while distributed.all_reduce_max(int(not run.lock())):
        if not waits:
            observer.wait(f"waiting for another process, which trains {run.path}")
        waits = True
        time.sleep(WAIT)
    try:
        yield
    finally:
        run.unlock()


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
    for _ in fit(
        network.model,
        teacher,
        splits.train,
        splits.validation,
        config,
        run=run,
        role=role,
        about={
            "architecture": network.architecture,
            "classes": list(splits.train.classes),
            "image_shape": list(splits.train.image_shape),
        },
        observer=observer,
        logit_cache=logit_cache,
        distributed=distributed,
    ):
        pass  # the observer has the reports


def accuracies_on_test(
    student: nn.Module,
    splits: Splits,
    config: Config,
    precision: str,
    distributed: Distributed,
    observer: Observer,
) -> ClassAccuracies:
    """Compute the accuracies of the classes on the test images, on the CPU, and report them."""
    with float32_precision(precision):
        clean, robust = validate(
            with_precision(student, precision),
            splits.test,
            epsilon=config.epsilon,
            norm=config.norm,
            batch_size=config.batch_size,
            distributed=distributed,
        )
    accuracies = ClassAccuracies(clean.cpu(), robust.cpu())
    observer.test(accuracies)
    average = fairness(accuracies.clean).average
    if near_chance(average, splits.test.num_classes):
        observer.note(
            f"student: near chance on test images, {average:.1%} clean: too few epochs or steps"
        )
    return accuracies
