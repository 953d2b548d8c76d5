"""Targets: what `absld evaluate` and its like are given, their settings, and the network in them.

A target is a run directory, a file of weights, hf:owner/name, or package.module:factory.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from absld.attack import frozen_eval
from absld.config.datasets import CORRUPTED
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_run_config
from absld.config.imports import HUB, names_code
from absld.config.resolve import resolve
from absld.config.settings import Config
from absld.data.dataset import ImageSet, pixels
from absld.data.hub_datasets import refuse_unfetched
from absld.data.sources import is_resized
from absld.errors import AbsldError, CheckpointError, NonFiniteError, Stopped, UsageError
from absld.evaluation.class_names import check_class_names, check_image_shape
from absld.evaluation.validation import check_network
from absld.models.architectures import find_model, name_for
from absld.models.hub import parse
from absld.models.loading import Network, is_named, load_network, refuse_named_code
from absld.progress import SILENT, Observer

Settings = TypeVar("Settings", bound=EvaluationConfig)


def check_target(target: str) -> None:
    """Raise UsageError or CheckpointError for a target that has no weights."""
    if target.startswith(HUB):
        parse(target)
    elif is_named(target):
        raise UsageError(f"{target} is a network without weights", "needed: a file or a run of it")
    elif not target or (not Path(target).exists() and ":" not in target):
        raise CheckpointError(f"{target!r}: no such run or file", "check the path")


def config_of_run(target: str) -> Config | None:
    """Return the settings of a training run; None if `target` is not one."""
    path = Path(target) / "config.toml"
    return read_run_config(path) if path.exists() else None


def complete_config(config: Settings, target: str) -> Settings:
    """Fill in data set and budget from the run, or from the recipes of data set and norm.

    Raises UsageError if no data set is known.
    """
    check_target(target)
    defaults = config_of_run(target)
    if config.dataset is None and defaults is None:
        raise UsageError(
            f"no data set given, and {target} is not a run directory",
            "--dataset NAME, and --data DIR",
        )
    size, resize, channels = config.image_size, config.resize, config.channels
    norm = config.norm or (defaults.norm if defaults else "linf")
    # Corrupted images count as those of the run.
    if defaults is None or config.dataset not in (None, defaults.dataset, *CORRUPTED):
        name = str(config.dataset)
        defaults = resolve({"dataset": CORRUPTED.get(name, name), "norm": norm})
    else:
        if config.dataset is None:
            refuse_unfetched(defaults.dataset, target)
        size = size or defaults.image_size
        resize, channels = resize or defaults.resize, channels or defaults.channels
    epsilon = config.epsilon
    if epsilon is None:
        of_norm = resolve({"dataset": defaults.dataset, "norm": norm})
        epsilon = defaults.epsilon if defaults.norm == norm else of_norm.epsilon
    return replace(
        config,
        dataset=config.dataset or defaults.dataset,
        data=config.data or defaults.data,
        image_size=size,
        resize=resize,
        channels=channels,
        image_column=config.image_column or defaults.image_column,
        label_column=config.label_column or defaults.label_column,
        norm=norm,
        epsilon=epsilon,
    )


def load_target(
    target: str, config: EvaluationConfig, data: ImageSet, observer: Observer = SILENT
) -> Network:
    """Load the network that `target` means, and check that it fits the images."""
    run = config_of_run(target)
    if run and names_code(run.student) and not config.model:
        raise refuse_named_code(target, run.student)
    network = load_network(
        target,
        data.num_classes,
        ("evaluate",),
        config.model,
        config.weights,
        image_shape=data.image_shape,
        observer=observer,
    )
    check_network(network.model, data, target)
    # Labels in a file of numbers have no names.
    order = "by-position" if config.dataset == "corrupted" else config.class_order
    network = check_class_names(network, data, target, order)
    guessed = config.image_size is None and is_resized(str(config.dataset))
    network = check_image_shape(network, data, target, refuse=guessed)
    typed = (config.model, name_for(config.model, data.image_shape))
    if config.model and network.architecture not in typed:
        raise CheckpointError(
            f"{target}: its network is {network.architecture}, not {config.model}",
            "leave out --model, or give another file",
        )
    return network


def sample_outputs(target: str, network: Network, data: ImageSet) -> list[list[float]] | None:
    """Compute rounded logits of two images; None for a known network.

    A factory's code may change while its weights stay: its logits identify it.
    """
    if find_model(network.architecture):
        return None
    with blame_target(target), frozen_eval(network.model), torch.no_grad():
        logits = network.model(pixels(data.rows(slice(2))).clone())
    return [[round(value, 2) for value in row] for row in logits.tolist()]


@contextlib.contextmanager
def blame_target(target: str) -> Iterator[None]:
    """Turn exceptions of calling and differentiating a network into CheckpointError."""
    try:
        yield
    except NonFiniteError as error:
        raise CheckpointError(f"{target}: {error}", error.hint) from error
    except (AbsldError, OSError, Stopped):
        raise
    except (Exception, SystemExit) as error:
        if "out of memory" in str(error).lower():
            raise
        raise CheckpointError(
            f"{target}: {type(error).__name__}: {error}",
            "it must be differentiable, take any batch and leave its input alone; see --debug",
        ) from error


def short_name(target: str) -> str:
    """Return the name of a target without folders and suffix, for the name of a file."""
    path = Path(target)
    short = path.stem if path.is_file() else path.name
    if target.startswith(HUB):
        short = parse(target).repository
    return re.sub(r"[^\w.-]+", "-", short)[-100:]
