"""A whole evaluation: network, images, attacks, sanity checks, and the files of the results.

The directory of an evaluation is named by everything that decides its results. So the same command
continues an interrupted evaluation, and reads a finished one instead of repeating it.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from absld.attack import frozen_eval
from absld.config.files import read_run_config
from absld.config.imports import names_code
from absld.config.resolve import resolve
from absld.config.settings import Config, EvaluationConfig
from absld.data.dataset import ImageSet, pixels
from absld.data.sources import load_split
from absld.engine.precision import (
    emulation_warnings,
    float32_precision,
    resolve_device,
    with_precision,
)
from absld.errors import AbsldError, CheckpointError, NonFiniteError, UsageError
from absld.evaluation.attacks import Attack, parse_attacks
from absld.evaluation.class_names import check_class_names
from absld.evaluation.evaluate import Evaluation, evaluate, paired_differences
from absld.evaluation.results import (
    SCHEMA,
    describe_network,
    difference_results,
    evaluation_results,
    read_results,
    to_json,
    warnings,
)
from absld.evaluation.sanity_checks import run_checks
from absld.evaluation.validation import check_network
from absld.models.architectures import MODELS
from absld.models.loading import Network, load_network, refuse_named_code
from absld.progress import AttackProgress, Observer
from absld.storage.checkpoint import load, save
from absld.storage.environment import environment
from absld.storage.files import digest, key_of, write_text
from absld.storage.run_directory import RunDirectory

SAVE_EVERY = 10.0  # seconds
REMOVE = "remove it to evaluate anew"
# Settings that decide the results, not where things are or how fast.
DECIDING = ("epsilon", "restarts", "each", "examples", "seed", "precision")


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

    target: a run directory, a file of weights, or package.module:factory. Raises AbsldError.
    """
    config = complete_config(config, target)
    data = load_images(config)
    return run_network_evaluation(target, load_target(target, config, data), data, config, observer)


def run_network_evaluation(
    target: str, network: Network, data: ImageSet, config: EvaluationConfig, observer: Observer
) -> EvaluationRun:
    """Run an evaluation of a network and images that are loaded, with a complete configuration."""
    device = resolve_device(config.device)
    attacks = parse_attacks(config.attacks, data.num_classes, config.restarts)
    for note in [*network.notes, *emulation_warnings([config.precision], device)]:
        observer.note(note)
    settings = {name: getattr(config, name) for name in DECIDING}
    settings["attacks"] = [attack.name for attack in attacks]
    if config.examples is not None and config.examples >= len(data):
        settings["examples"] = None
    identity = settings | {
        "architecture": network.architecture,
        "outputs": sample_outputs(network, data),
        "weights_sha256": digest(network.model.state_dict()),
        "images_sha256": data.digest(),
    }
    folder = results_folder(target, config)
    root = folder.parent if folder.parent == Path(target) else folder  # a run may be anybody's
    directory = RunDirectory(folder / directory_name(target, identity), root)
    path = directory.path / "evaluation.json"
    observer.begin_evaluation()
    with directory, float32_precision(config.precision), blame_target(target):
        record, start = environment(device), time.perf_counter()
        model = with_precision(network.model.to(device), config.precision)
        data = data.to(device)
        evaluation = run_attacks(model, data, config, attacks, directory, identity, observer)
        if path.exists():
            results = read_results(path)
            if results["checks"] is not None or not config.checks:
                observer.note(f"evaluated before, {results['environment']['started']}: {path}")
                return EvaluationRun(path, evaluation, results)
        checks = []
        for check in run_checks(model, data, evaluation) if config.checks else ():
            observer.check(check)
            checks.append(asdict(check))
        results = {
            "schema": SCHEMA,
            "environment": record,
            "seconds": time.perf_counter() - start,
            "network": describe_network(target, network),
            "data": describe_data(config, evaluation, data)
            | {"images_sha256": identity["images_sha256"]},
            "settings": settings,
            **evaluation_results(evaluation, attacks),
            "checks": checks if config.checks else None,
            "against": None,
        }
        directory.write(path.name, to_json(results))
    return EvaluationRun(path, evaluation, results)


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
    data = load_images(config)
    # Both are loaded and checked before hours are spent on one.
    network = load_target(target, config, data)
    base_network = load_target(base, replace(config, **base_settings), data)
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
    if target in MODELS:
        raise UsageError(f"{target} is a network without weights", "needed: a file or a run of it")
    if not target or (not Path(target).exists() and ":" not in target):
        raise CheckpointError(f"{target!r}: no such run or file", "check the path")


def config_of_run(target: str) -> Config | None:
    """Return the settings of a training run; None if `target` is not one."""
    path = Path(target) / "config.toml"
    return read_run_config(path) if path.exists() else None


def complete_config(config: EvaluationConfig, target: str) -> EvaluationConfig:
    """Fill in data set and budget from the run, or from the recipe of the data set.

    Raises UsageError if neither is known.
    """
    check_target(target)
    defaults = config_of_run(target)
    if config.dataset is None and defaults is None:
        raise UsageError(
            f"no data set given, and {target} is not a run directory",
            "--dataset NAME, and --data DIR",
        )
    if defaults is None or config.dataset not in (None, defaults.dataset):
        defaults = resolve({"dataset": config.dataset})
    return replace(
        config,
        dataset=defaults.dataset,
        data=config.data or defaults.data,
        image_size=config.image_size or defaults.image_size,
        epsilon=defaults.epsilon if config.epsilon is None else config.epsilon,
    )


def load_target(target: str, config: EvaluationConfig, data: ImageSet) -> Network:
    """Load the network that `target` means, and check that it fits the images."""
    run = config_of_run(target)
    if run and names_code(run.student) and not config.model:
        raise refuse_named_code(target, run.student)
    network = load_network(target, data.num_classes, ("evaluate",), config.model, config.weights)
    check_network(network.model, data, target)
    network = check_class_names(network, data, target, config.class_order)
    if config.model and config.model != network.architecture:
        note = f"{target}: its network is {network.architecture}, whatever --model says"
        network = network._replace(notes=(*network.notes, note))
    return network


def load_images(config: EvaluationConfig) -> ImageSet:
    """Load the images to evaluate on."""
    return load_split(str(config.dataset), config.data, config.image_size or 32, config.split)


def describe_data(
    config: EvaluationConfig, evaluation: Evaluation, data: ImageSet
) -> dict[str, Any]:
    """Return data set, split, number of images and classes."""
    return {
        "dataset": config.dataset,
        "split": config.split,
        "images": len(evaluation.labels),
        "of": len(data),
        "classes": list(data.classes),
    }


def sample_outputs(network: Network, data: ImageSet) -> list[list[float]] | None:
    """Compute rounded logits of two images; None for a known network.

    A factory's code may change while its weights stay: its logits identify it.
    """
    if network.architecture in MODELS:
        return None
    with frozen_eval(network.model), torch.no_grad():
        logits = network.model(pixels(data.images[:2]).clone())
    return [[round(value, 2) for value in row] for row in logits.tolist()]


@contextlib.contextmanager
def blame_target(target: str) -> Iterator[None]:
    """Turn exceptions of calling and differentiating a network into CheckpointError."""
    try:
        yield
    except NonFiniteError as error:
        raise CheckpointError(f"{target}: {error}", error.hint) from error
    except (AbsldError, OSError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise CheckpointError(
            f"{target}: {type(error).__name__}: {error}",
            "it must be differentiable, take any batch and leave its input alone; see --debug",
        ) from error


def results_folder(target: str, config: EvaluationConfig) -> Path:
    """Return the folder of evaluations: `config.out`, else in the run, else ./evaluations."""
    home = Path(target) if config_of_run(target) else Path()
    return Path(config.out) if config.out else home / "evaluations"


def directory_name(target: str, identity: dict[str, Any]) -> str:
    """Return the directory's name: that of the target, and a digest of what decides the results."""
    path = Path(target)
    short = path.stem if path.is_file() else path.name
    short = re.sub(r"[^\w.-]+", "-", short)[-100:]
    return f"{short}-{key_of(identity)}"


def run_attacks(
    model: nn.Module,
    data: ImageSet,
    config: EvaluationConfig,
    attacks: Sequence[Attack],
    directory: RunDirectory,
    identity: dict[str, Any],
    observer: Observer,
) -> Evaluation:
    """Evaluate, continuing from predictions.pt if it exists.

    Predictions are saved every few seconds, and when the observer or an error ends the evaluation.
    """
    path = directory.path / "predictions.pt"
    latest: Evaluation | None = None
    last_save = time.perf_counter()

    def save_predictions(evaluation: Evaluation) -> None:
        nonlocal last_save
        record = {"identity": identity, "attacks": list(evaluation.attacks)}
        tensors = {"index": evaluation.index, "labels": evaluation.labels}
        save(record | tensors | {"predictions": evaluation.predictions}, path)
        last_save = time.perf_counter()

    def on_batch(progress: AttackProgress, evaluation: Evaluation) -> None:
        nonlocal latest
        latest = evaluation
        if time.perf_counter() - last_save > SAVE_EVERY:
            save_predictions(evaluation)
        observer.attack_batch(progress)

    try:
        return evaluate(
            model,
            data,
            epsilon=identity["epsilon"],
            attacks=attacks,
            each=config.each,
            examples=config.examples,
            seed=config.seed,
            batch_size=config.batch_size,
            before=read_predictions(path, identity) if path.exists() else None,
            on_batch=on_batch,
        )
    finally:
        if latest:
            save_predictions(latest)


def read_predictions(path: Path, identity: dict[str, Any]) -> torch.Tensor:
    """Read the predictions of an interrupted evaluation. Raises CheckpointError if not this one's."""
    try:
        saved = load(path)
    except CheckpointError as error:
        raise CheckpointError(str(error), REMOVE) from error
    if not isinstance(saved, dict) or saved.get("identity") != identity:
        raise CheckpointError(f"{path}: is of another evaluation", REMOVE)
    predictions = saved.get("predictions")
    if not isinstance(predictions, torch.Tensor) or predictions.dtype != torch.int64:
        raise CheckpointError(f"{path}: holds no predictions", REMOVE)
    return predictions
