"""The time of a comparison or sweep before any of it is done: a few steps measured and thrown away.

Networks are untrained, which changes no time but that of an evaluation, whose attacks skip images
that are misclassified. The seconds of a kind of training are those of its steps, of the validation
after each epoch and of the test; not those of saving, and no logit cache is counted on.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.launcher_settings import LauncherSettings
from absld.config.settings import Config, TrainConfig
from absld.data.augmentation import steps_per_epoch
from absld.data.dataset import Splits
from absld.engine.precision import float32_precision, resolve_device, with_precision
from absld.engine.techniques import NAMES
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.input_scale import SAMPLE
from absld.evaluation.sanity_checks import COST
from absld.evaluation.validation import validate
from absld.models.published import PREFIX
from absld.progress import SILENT, Observer
from absld.runs.jobs import Job
from absld.runs.launching import plan_jobs
from absld.runs.planning import Plan, load_splits, plan, plan_teacher, trained_first
from absld.stepper import Stepper

SCHEMA = "absld-estimate-1"
SECONDS, MOST = 1.0, 5  # after which a measurement ends; its calls at most, after a first one
FORWARDS = 2 / 3  # passes, in the time of a forward and a backward, that validation takes for two
VALIDATION = 20 + FORWARDS  # of an image
ATTACKED = 0.5  # share of the images that an attack of an evaluation is taken to run on
WORTH = 1000  # steps ahead, from which a comparison is measured unasked
# Settings on which the time of a step depends.
COSTLY = ("method", "student", "teacher", "teacher_model", "batch_size", "attack_steps", "engine")


class Cost(NamedTuple):
    """Seconds of a training step, and of a forward and a backward of an image in eval mode."""

    step: float
    image: float


class Training(NamedTuple):
    """A training that is left, of a student or a teacher: its epochs, and seconds of its parts."""

    name: str
    epochs: int
    step: float
    epoch: float
    test: float
    evaluation: float

    @property
    def seconds(self) -> float:
        return self.epochs * self.epoch + self.test + self.evaluation


def estimate(
    labels: Sequence[str],
    configs: Sequence[Config],
    evaluation: EvaluationConfig,
    observer: Observer,
    launcher: LauncherSettings,
) -> dict[str, Any]:
    """Estimate the time of what is left of a comparison, as plain values; trains nothing.

    A published teacher, which has yet to be fetched, is measured as an untrained one.
    """
    device = resolve_device(configs[0].device)
    fetched = configs[0].teacher.startswith(PREFIX)
    configs = [replace(config, teacher="") if fetched else config for config in configs]
    splits = load_splits(configs[0], device, observer)
    jobs = plan_jobs(labels, configs, evaluation, splits, observer)
    left = [*trainings_left(labels, configs, jobs, evaluation, splits, teachers=not fetched)]
    groups = [
        [training for training in left if training.name == name]
        for name in dict.fromkeys(training.name for training in left)
    ]
    at_a_time = jobs_at_a_time(launcher)
    return {
        "schema": SCHEMA,
        "device": str(device),
        "trainings": [describe(group) for group in groups],
        "seconds": sum(training.seconds for training in left),
        "at_a_time": at_a_time,
    }


def describe(group: Sequence[Training]) -> dict[str, Any]:
    """Describe the trainings of a name: seconds of the parts of one, and of all."""
    first = group[0]
    return {
        "name": first.name,
        "left": len(group),
        "step": first.step,
        "epoch": first.epoch,
        "training": statistics.mean(each.seconds - each.evaluation for each in group),
        "evaluation": first.evaluation,
        "seconds": sum(each.seconds for each in group),
    }


def jobs_at_a_time(launcher: LauncherSettings) -> int | None:
    """Return the number of trainings at a time; None if it is not known."""
    return {"here": 1, "local": launcher.jobs}.get(launcher.launcher)


def is_worthwhile(
    jobs: Sequence[Job], configs: Sequence[Config], splits: Splits, launcher: LauncherSettings
) -> bool:
    """Return whether to measure unasked: much is ahead, nothing is known, and it is computed here.

    Not for processes on GPUs, where this one would take memory from them.
    """
    on_cpu = launcher.launcher == "local" and resolve_device(configs[0].device).type == "cpu"
    if not (launcher.launcher == "here" or on_cpu):
        return False
    if any(job.run.exists() and job.run.status() == "finished" for job in jobs):
        return False
    first = configs[0]
    steps = steps_per_epoch(len(splits.train), first.batch_size, first.max_steps)
    return steps * sum(job.epochs for job in jobs) >= WORTH


def trainings_left(
    labels: Sequence[str],
    configs: Sequence[Config],
    jobs: Sequence[Job],
    evaluation: EvaluationConfig,
    splits: Splits,
    *,
    teachers: bool = True,
) -> Iterator[Training]:
    """Measure each kind of training that is not finished, and yield all of these.

    jobs: those of `plan_jobs`. teachers: False leaves out the training of teachers.
    """
    costs: dict[tuple[Any, ...], Cost] = {}
    counted: set[Job] = set()
    for label, config, job in zip(labels, configs, jobs[-len(configs) :], strict=True):
        if job.is_finished():
            continue
        planned = plan(config, SILENT, splits)
        # One job less, where the teacher is the robust start.
        first = zip(trained_first(planned, config).items(), job.needs, strict=False)
        for (use, trained), needed in first:
            if not teachers or needed in counted or needed.is_finished():
                continue
            counted.add(needed)
            own_key = "teacher", *key_of(trained)[2:]
            if own_key not in costs:
                costs[own_key] = measure_teacher(trained, splits)
            yield time_of(use, needed, costs[own_key], config, splits)
        key = key_of(config)
        if key not in costs:
            costs[key] = measure_student(planned, config, splits)
        training = time_of(label, job, costs[key], config, splits)
        passes = len(splits.test) * VALIDATION, evaluation_passes(evaluation, config, splits)
        test, own = (costs[key].image * number for number in passes)
        yield training._replace(test=test, evaluation=own)


def time_of(name: str, job: Job, cost: Cost, config: Config, splits: Splits) -> Training:
    """Return the time of the epochs that are left of a training."""
    steps = steps_per_epoch(len(splits.train), config.batch_size, config.max_steps)
    validation = len(splits.test if config.select_on == "test" else splits.validation)
    done = len(job.run.records()) if job.run.exists() else 0
    epoch = steps * cost.step + validation * VALIDATION * cost.image
    return Training(name, job.epochs - done, cost.step, epoch, 0.0, 0.0)


def evaluation_passes(evaluation: EvaluationConfig, config: Config, splits: Splits) -> float:
    """Return the forward and backward passes of an image that an evaluation takes in all."""
    images = len(getattr(splits, evaluation.split))
    images = min(images, evaluation.examples or images)
    attacks = parse_attacks(
        evaluation.attacks, splits.test.num_classes, evaluation.restarts, config.norm
    )
    passes = images * (1 / 3 + ATTACKED * sum(a.cost * a.restarts for a in attacks))
    return passes + evaluation.checks * COST * min(SAMPLE, images)


def key_of(config: Config) -> tuple[Any, ...]:
    """Return the settings on which the time of a step depends."""
    return tuple(getattr(config, name) for name in (*COSTLY, *NAMES))


def measure_student(planned: Plan, config: Config, splits: Splits) -> Cost:
    """Measure the training of a student, with an untrained teacher where none is given."""
    teacher = planned.teacher
    if planned.method.needs_teacher and not teacher:
        teacher = plan_teacher(config, splits).network
    network = planned.student.model.to(planned.device)
    return measure(network, teacher.model if teacher else None, splits, config.training())


def measure_teacher(config: Config, splits: Splits) -> Cost:
    """Measure the training of a teacher by TRADES."""
    planned = plan_teacher(config, splits)
    network = planned.network.model.to(resolve_device(config.device))
    return measure(network, None, splits, planned.training)


def measure(
    student: nn.Module, teacher: nn.Module | None, splits: Splits, config: TrainConfig
) -> Cost:
    """Measure a few steps and a short validation of a network, which is to be thrown away.

    All random numbers come from keys, as those of a training do: no other ones are drawn.
    """
    # A learning rate of 0 changes no time; the weights of an unlucky start could become infinite.
    stepper = Stepper(student, teacher, splits.train, replace(config, learning_rate=0.0))
    draws = itertools.chain.from_iterable(map(stepper.draws, itertools.count(1)))
    images = splits.validation.subset(torch.arange(min(config.batch_size, len(splits.validation))))
    images = images.to(stepper.device)

    def step() -> None:
        stepper.step(next(draws), 1, 0, lambda metrics: None)

    def validation() -> None:
        network = with_precision(student, stepper.techniques.precision)
        validate(network, images, epsilon=config.epsilon, norm=config.norm, steps=2)

    with torch.enable_grad(), float32_precision(stepper.techniques.precision):
        seconds = seconds_of(step, stepper.device)
        passes = (2 + FORWARDS) * len(images)
        return Cost(seconds, seconds_of(validation, stepper.device) / passes)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a few calls after a first one, which may compile or capture."""
    times: list[float] = []
    while len(times) < 2 or (sum(times) < SECONDS and len(times) < MOST):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
