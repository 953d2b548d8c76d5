"""A whole evaluation: network, images, attacks, sanity checks, and the files of the results.

The directory of an evaluation is named by everything that decides its results. So the same command
continues an interrupted evaluation, and reads a finished one instead of repeating it.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
from absld.engine.precision import (
    emulation_warnings,
    float32_precision,
    resolve_device,
    with_precision,
)
from absld.errors import AbsldError, CheckpointError, NonFiniteError, Stopped, UsageError
from absld.evaluation.adversarial_images import FLAG
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.class_names import check_class_names, check_image_shape
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import Evaluation
from absld.evaluation.images import describe_data, load_images
from absld.evaluation.results import (
    SCHEMA,
    describe_network,
    difference_results,
    evaluation_results,
    read_results,
    to_json,
    warnings,
)
from absld.evaluation.resuming import REMOVE, resume_attacks
from absld.evaluation.sanity_checks import run_checks
from absld.evaluation.validation import check_network
from absld.models.architectures import find_model, name_for
from absld.models.hub import parse
from absld.models.loading import Network, is_named, load_network, refuse_named_code
from absld.progress import SILENT, Observer
from absld.storage.environment import environment
from absld.storage.files import digest, key_of, write_text
from absld.storage.run_directory import RunDirectory

# Settings that decide the results, not where things are or how fast.
DECIDING = ("norm", "epsilon", "restarts", "each", "examples", "seed", "precision")
Settings = TypeVar("Settings", bound=EvaluationConfig)


@dataclass(frozen=True, eq=False)
class EvaluationRun:
    """A finished evaluation: all predictions, and the results as in the file `path`."""

    path: Path
    evaluation: Evaluation
    results: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """Names of the checks that did not pass, of both networks."""
        against = self.results["against"]
        return warnings(self.results) + (warnings(against) if against else [])


def run_evaluation(target: str, config: EvaluationConfig, observer: Observer) -> EvaluationRun:
    """Evaluate the network that `target` means, and keep the results in a directory.

    target: a run directory, a file of weights, hf:owner/name, or package.module:factory. Raises
    AbsldError.
    """
    config = complete_config(config, target)
    data = load_images(config, observer)
    network = load_target(target, config, data, observer)
    return run_network_evaluation(target, network, data, config, observer)


def run_network_evaluation(
    target: str, network: Network, data: ImageSet, config: EvaluationConfig, observer: Observer
) -> EvaluationRun:
    """Run an evaluation of a network and images that are loaded, with a complete configuration."""
    device = resolve_device(config.device)
    assert config.norm  # complete_config
    attacks = parse_attacks(config.attacks, data.num_classes, config.restarts, config.norm)
    if config.save_adversarial and not attacks:
        raise UsageError(f"{FLAG} needs an attack: there is none", "--attacks pgd20, for example")
    for note in [*network.notes, *emulation_warnings([config.precision], device)]:
        observer.note(note)
    identity = identify(target, network, data, config)
    settings = {name: identity[name] for name in (*DECIDING, "attacks")}
    directory = directory_of(target, config, identity)
    path = directory.path / "evaluation.json"
    observer.begin_evaluation()
    with directory, float32_precision(config.precision), blame_target(target):
        before = read_before(path, identity)
        record, start = environment(device), time.perf_counter()
        model = with_precision(network.model.to(device), config.precision)
        data = data.to(device)
        evaluation = resume_attacks(model, data, config, attacks, directory, identity, observer)
        results = {
            "schema": SCHEMA,
            "environment": record,
            "seconds": time.perf_counter() - start,
            "network": describe_network(target, network),
            "data": describe_data(config, evaluation, data)
            | {"images_sha256": identity["images_sha256"]},
            "settings": settings,
            **evaluation_results(evaluation, attacks),
            "checks": None,
            "against": None,
        }
        if before and (before["checks"] is not None or not config.checks):
            observer.note(f"evaluated before, {before['environment']['started']}: {path}")
            results |= {key: before[key] for key in ("environment", "seconds", "checks")}
        elif config.checks:
            results["checks"] = []
            for check in run_checks(model, data, evaluation):
                observer.check(check)
                results["checks"].append(asdict(check))
            results["seconds"] = time.perf_counter() - start
        if results != before:
            directory.write(path.name, to_json(results))
    observer.end_evaluation(path, results)
    return EvaluationRun(path, evaluation, results)


def identify(
    target: str, network: Network, data: ImageSet, config: EvaluationConfig
) -> dict[str, Any]:
    """Return everything that decides the results of an evaluation, of a complete configuration."""
    assert config.norm
    attacks = parse_attacks(config.attacks, data.num_classes, config.restarts, config.norm)
    identity = {name: getattr(config, name) for name in DECIDING}
    if config.examples is not None and config.examples >= len(data):
        identity["examples"] = None
    return identity | {
        "attacks": [attack.name for attack in attacks],
        "architecture": network.architecture,
        "outputs": sample_outputs(target, network, data),
        "weights_sha256": digest(network.model.state_dict()),
        "images_sha256": data.digest(),
    }


def directory_of(target: str, config: EvaluationConfig, identity: dict[str, Any]) -> RunDirectory:
    """Return the directory of an evaluation, named by the target and what decides the results.

    It is in `config.out`, else in the run, else in ./evaluations.
    """
    home = Path(target) if config_of_run(target) else Path()
    folder = Path(config.out) if config.out else home / "evaluations"
    root = folder.parent if folder.parent == Path(target) else folder  # a run may be anybody's
    return RunDirectory(folder / f"{short_name(target)}-{key_of(identity)}", root)


def is_evaluated(target: str, network: Network, data: ImageSet, config: EvaluationConfig) -> bool:
    """Return whether an evaluation, of a complete configuration, is finished."""
    identity = identify(target, network, data, config)
    directory = directory_of(target, config, identity)
    if not directory.exists() or directory.status() != "finished":
        return False
    before = read_before(directory.path / "evaluation.json", identity)
    return before is not None and (before["checks"] is not None or not config.checks)


def read_before(path: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the results of an earlier command, of which checks and times are kept; None without.

    Raises CheckpointError if they are of another network, data or settings. The figures are not
    taken from the file: they follow from the predictions.
    """
    if not path.exists():
        return None
    before = read_results(path)
    found = before["settings"] | before["network"] | before["data"]
    for key, value in identity.items():
        if key != "outputs" and found.get(key) != value:
            raise CheckpointError(f"{path}: belongs to a different evaluation, by {key}", REMOVE)
    return before


def run_paired_evaluation(
    target: str,
    base: str,
    base_settings: Mapping[str, Any],
    config: EvaluationConfig,
    observer: Observer,
) -> EvaluationRun:
    """Evaluate two networks on the same images by the same attacks.

    base_settings: for `base` what `config.model` and `config.weights` are for `target`. Returns the evaluation of `target`, with the paired differences from `base` in its results.
    """
    check_target(base)
    config = complete_config(config, target)  # budget and images are those of `target`
    data = load_images(config, observer)
    # Both are loaded and checked before hours are spent on one.
    network = load_target(target, config, data, observer)
    base_network = load_target(base, replace(config, **base_settings), data, observer)
    ours = run_network_evaluation(target, network, data, config, observer)
    theirs = run_network_evaluation(base, base_network, data, config, observer)
    results = ours.results | {
        "environment": environment(resolve_device(config.device)),
        "against": {
            "network": theirs.results["network"],
            "checks": theirs.results["checks"],
            **difference_results(paired_differences(ours.evaluation, theirs.evaluation)),
        },
    }
    path = ours.path.with_name(f"against-{theirs.path.parent.name}.json")
    write_text(path, to_json(results))
    return replace(ours, path=path, results=results)


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
