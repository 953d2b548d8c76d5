"""The start of a training run: all its inputs, loaded and checked before anything is computed."""

import math
from dataclasses import asdict, replace
from typing import Literal, NamedTuple

import torch

from absld.config.datasets import Columns
from absld.config.fields import check_epsilon
from absld.config.settings import Config, TrainConfig
from absld.data.dataset import Splits
from absld.data.placement import Placement
from absld.data.sources import load_data
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.engine.precision import (
    emulation_warnings,
    resolve_device,
)
from absld.engine.techniques import Techniques, describe
from absld.engine.weight_averaging import first_averaged_epoch
from absld.errors import UsageError
from absld.evaluation.class_names import check_class_names, check_image_shape
from absld.evaluation.validation import check_network, check_state
from absld.methods.base import Method
from absld.methods.registry import build_method
from absld.models.loading import Network, brings_weights, load_network
from absld.models.registries import check_pretrained
from absld.progress import Observer
from absld.report.summary import budget
from absld.runs.logit_caches import load_teacher
from absld.runs.run_record import (
    deciding_settings,
    image_digests,
    run_directory,
    techniques_of_run,
)
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory

SELECTED_ON_TEST = (
    "warning: the best epoch is selected on the test images: reported accuracies are optimistic"
)

Use = Literal["teacher", "robust start"]
"""The use of a network that TRADES trains before the student."""

FEW_STEPS = 5  # an epoch, so few that a training hardly moves
FEW_VALIDATION = 10  # images of a class, so few that one of them moves the score of an epoch much


class Plan(NamedTuple):
    """The start of a run: device, techniques, images, method, networks, digests of these
    (`inputs`), directory, and the settings of a robust start that is to be trained first."""

    device: torch.device
    techniques: Techniques
    splits: Splits
    method: Method
    student: Network
    teacher: Network | None
    inputs: dict[str, str]
    run: RunDirectory
    robust_start: Config | None


def load_splits(config: Config, device: torch.device, observer: Observer) -> Splits:
    """Load the images of a run. Raises DataError."""
    form = config.image_size, config.resize, config.channels
    placement = Placement(config.in_memory, device, observer)
    return load_data(config.dataset, config.data, *form, placement, Columns.of(config))


def plan(
    config: Config,
    observer: Observer,
    splits: Splits | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> Plan:
    """Load and check all inputs, before hours are spent on a teacher.

    splits: the images, if they are loaded already. Raises AbsldError.
    """
    device = resolve_device(distributed.device(config.device))
    if splits is None:
        splits = load_splits(config, device, observer)
    check_epsilon(config.epsilon, config.norm, math.prod(splits.train.image_shape))
    if config.select_on == "test":
        splits = splits._replace(validation=splits.test)
    if config.teacher_weights and not config.teacher:
        raise UsageError("--teacher-weights is a key in a teacher's file", "add --teacher FILE")
    if config.pretrained:
        check_pretrained([config.student, *([] if config.teacher else [config.teacher_model])])
    method = build_method(config, splits.train.num_classes)
    if method.uses_validation and config.select_on == "test":
        raise UsageError(
            f"{config.method} learns from the images that select the epoch: not from test images",
            "leave out --select-on test",
        )
    student = load_network(
        config.student,
        splits.train.num_classes,
        (config.seed, "student"),
        weights=config.student_weights,
        image_shape=splits.train.image_shape,
        pretrained=config.pretrained,
        observer=observer,
    )
    check_network(student.model, splits.train, config.student)
    student = check_class_names(student, splits.train, config.student, config.class_order)
    student = check_image_shape(student, splits.train, config.student)
    teacher = (
        load_teacher(config, splits.train, observer)
        if method.needs_teacher and config.teacher
        else None
    )
    inputs = image_digests(splits) | {"initial_weights": digest(student.model.state_dict())}
    if teacher:
        inputs["teacher_weights"] = digest(teacher.model.state_dict())
    robust_start = None
    if method.needs_robust_start and not brings_weights(config.student, splits.train.image_shape):
        robust_start = robust_start_config(config)
        # Its run is named by what decides its weights.
        inputs["robust_start"] = plan_teacher(robust_start, splits, distributed).run.path.name
    # A student counts by its architecture and weights, not by the file that they came from.
    identity = deciding_settings(config) | inputs | {"student": student.architecture}
    run = run_directory(config, config.method, identity, distributed)
    techniques = techniques_of_run(config, run, device)
    return Plan(device, techniques, splits, method, student, teacher, inputs, run, robust_start)


def robust_start_config(config: Config) -> Config:
    """Return the settings of a run whose teacher is the robust start of this run's student.

    A teacher of the same architecture and settings is the same network, trained once.
    """
    return replace(config, teacher="", teacher_weights="", teacher_model=config.student)


def trained_first(planned: Plan, config: Config) -> dict[Use, Config]:
    """Return, by their use, the settings of runs whose teachers a run trains before its student."""
    first: dict[Use, Config] = {}
    if planned.method.needs_teacher and not config.teacher:
        first["teacher"] = config
    if planned.robust_start:
        first["robust start"] = planned.robust_start
    return first


class TeacherPlan(NamedTuple):
    """The start of the training of a teacher: network, settings, digests of inputs, directory."""

    network: Network
    training: TrainConfig
    inputs: dict[str, str]
    run: RunDirectory


def plan_teacher(
    config: Config, splits: Splits, distributed: Distributed = SINGLE_PROCESS
) -> TeacherPlan:
    """Build the teacher, or robust start, that a run without a given one trains by TRADES."""
    network = load_network(
        config.teacher_model,
        splits.train.num_classes,
        (config.seed, "teacher"),
        image_shape=splits.train.image_shape,
        pretrained=config.pretrained,
    )
    check_state(network.model, config.teacher_model)
    training = config.teacher_training()
    inputs = image_digests(splits) | {"initial_weights": digest(network.model.state_dict())}
    identity = deciding_settings(training) | inputs
    run = run_directory(config, "teacher", identity, distributed)
    return TeacherPlan(network, training, inputs, run)


def describe_shortage(config: Config, splits: Splits) -> list[str]:
    """Describe what too few images there are for, in lines."""
    images, lines = len(splits.train), []
    steps, rest = divmod(images, config.batch_size)
    if 0 < steps < FEW_STEPS:
        left_out = f", {rest} are left out each time" if rest else ""
        make = f"make {steps} step{'s' * (steps > 1)} of {config.batch_size} an epoch"
        lines.append(f"{images} training images {make}{left_out}")
        # The largest power of two that gives enough steps.
        batch_size = 2 ** max(0, (images // FEW_STEPS).bit_length() - 1)
        lines += [f"for more steps: --batch-size {batch_size}"] * (batch_size < config.batch_size)
    counts = splits.validation.class_counts()
    if (fewest := min(counts)) < FEW_VALIDATION:
        lines.append(
            f"{fewest} validation image{'s' * (fewest != 1)} in class "
            f"{splits.validation.classes[counts.index(fewest)]} (fewest): the best epoch is mostly "
            "chance"
        )
    return lines


def describe_averaging(config: Config) -> list[str]:
    """Describe in a line from which epoch on weights are averaged, if they are."""
    if not config.weight_averaging:
        return []
    first = first_averaged_epoch(config)
    return [f"weights: averaged from epoch {first} on, with decay {config.weight_averaging:g}"]


def describe_start(
    config: Config, techniques: Techniques, device: torch.device, splits: Splits
) -> list[str]:
    """Describe what a run computes with and on, in lines."""
    return [
        f"seed {config.seed}, device {device}, torch {torch.__version__}",
        f"engine {config.engine}: {describe(techniques)}",
        f"attack: epsilon {budget(vars(config))}",
        *describe_averaging(config),
        *emulation_warnings(asdict(techniques).values(), device),
        *splits.describe(),
        *describe_shortage(config, splits),
        *([SELECTED_ON_TEST] if config.select_on == "test" else []),
    ]
