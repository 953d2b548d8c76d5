"""A whole evaluation: network, images, attacks, checks, and the files of the result.

Its directory is named by all that decides what is computed, so the same command goes on where it
was interrupted, and a finished one is read instead of done again.
"""

import contextlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from absld.attack import frozen_eval
from absld.config.files import of_run
from absld.config.resolve import resolve
from absld.config.settings import Config, EvaluationConfig
from absld.data.dataset import ImageSet, pixels
from absld.data.sources import load_data
from absld.engine.precision import arithmetic, in_precision, resolve_device
from absld.errors import AbsldError, CheckpointError, NonFiniteError, UsageError
from absld.evaluation import results as document
from absld.evaluation.attacks import Attack, parse_attacks
from absld.evaluation.evaluate import Evaluation, Progress, evaluate, paired
from absld.evaluation.results import warnings
from absld.evaluation.sanity_checks import Check, checks
from absld.evaluation.validation import check_network
from absld.models.architectures import MODELS
from absld.models.loading import Network, load_network
from absld.storage.checkpoint import load, save
from absld.storage.environment import environment
from absld.storage.files import digest, key_of, write_text
from absld.storage.run_directory import RunDirectory

SAVE_EVERY = 10.0  # seconds
ANEW = "remove it to evaluate anew"
# Settings that decide what is computed, and say nothing of where things are.
DECIDING = ("epsilon", "restarts", "each", "examples", "seed", "precision")


class Observer(Protocol):
    """Hears what an evaluation does."""

    def note(self, text: str) -> None:
        """A line worth knowing."""

    def batch(self, progress: Progress) -> None:
        """A batch is done."""

    def check(self, check: Check) -> None:
        """A check is done."""


@dataclass(frozen=True, eq=False)
class Assessment:
    """A finished evaluation: what was said of every image, and the result as plain values
    (docs/evaluation.md), which are in the file `path`."""

    path: Path
    evaluation: Evaluation
    document: dict[str, Any]

    @property
    def warnings(self) -> list[str]:
        """The checks that did not pass, of both networks."""
        against = self.document["against"]
        return warnings(self.document) + (warnings(against) if against else [])


def assess(target: str, config: EvaluationConfig, observer: Observer) -> Assessment:
    """Evaluate the network that `target` means, and keep the result in a directory of its own.

    target: a run directory, a file of weights, or package.module:factory. Raises AbsldError.
    """
    config = completed(config, target)
    data = images(config)
    return assess_network(target, network_of(target, config, data), data, config, observer)


def assess_network(
    target: str, network: Network, data: ImageSet, config: EvaluationConfig, observer: Observer
) -> Assessment:
    """`assess`, of a network and images that are there already, with a completed configuration."""
    device = resolve_device(config.device)
    attacks = parse_attacks(config.attacks, data.num_classes, config.restarts)
    for note in network.notes:
        observer.note(note)
    settings = {name: getattr(config, name) for name in DECIDING}
    settings["attacks"] = [attack.name for attack in attacks]
    if config.examples is not None and config.examples >= len(data):
        settings["examples"] = None
    identity = settings | {
        "architecture": network.architecture,
        "outputs": outputs(network, data),
        "weights_sha256": digest(network.model.state_dict()),
        "images_sha256": data.digest(),
    }
    directory = RunDirectory(folder(target, config) / name_of(target, identity))
    result = directory.path / "evaluation.json"
    with directory, arithmetic(config.precision), network_at_fault(target):
        record, started = environment(device), time.perf_counter()
        model = in_precision(network.model.to(device), config.precision)
        data = data.to(device)
        evaluation = attacked(model, data, config, attacks, directory, identity, observer)
        if result.exists():
            found = document.read(result)
            if found["checks"] is not None or not config.checks:
                observer.note(f"evaluated before, {found['environment']['started']}: {result}")
                return Assessment(result, evaluation, found)
        done = []
        for check in checks(model, data, evaluation) if config.checks else ():
            observer.check(check)
            done.append(check)
        made = {
            "schema": document.SCHEMA,
            "environment": record,
            "seconds": time.perf_counter() - started,
            "network": document.about_network(target, network),
            "data": {
                "dataset": config.dataset,
                "split": config.split,
                "images": len(evaluation.labels),
                "of": len(data),
                "images_sha256": identity["images_sha256"],
                "classes": list(data.classes),
            },
            "settings": settings,
            **document.results(evaluation, attacks),
            "checks": [asdict(check) for check in done] if config.checks else None,
            "against": None,
        }
        directory.write(result.name, document.to_json(made))
    return Assessment(result, evaluation, made)


def assess_against(
    target: str, base: str, base_model: str, config: EvaluationConfig, observer: Observer
) -> Assessment:
    """Evaluate two networks on the same images by the same attacks; the first one's assessment,
    with the paired differences to the second. base_model: what `config.model` is for the first."""
    check_target(base)
    config = completed(config, target)  # the budget and the images are the first one's
    data = images(config)
    # Both are looked at before hours are spent on one.
    our_network = network_of(target, config, data)
    base_network = network_of(base, replace(config, model=base_model), data)
    ours = assess_network(target, our_network, data, config, observer)
    theirs = assess_network(base, base_network, data, config, observer)
    against = {
        "network": theirs.document["network"],
        "checks": theirs.document["checks"],
        **document.differences(paired(ours.evaluation, theirs.evaluation)),
    }
    both = ours.document | {
        "environment": environment(resolve_device(config.device)),
        "against": against,
    }
    path = ours.path.with_name(f"against-{theirs.path.parent.name}.json")
    write_text(path, document.to_json(both))
    return replace(ours, path=path, document=both)


def check_target(target: str) -> None:
    """Raise an error for what brings no weights, before anything is asked about images."""
    if target in MODELS:
        raise UsageError(f"{target} is a network without weights", "needed: a file or a run of it")
    if not target or (not Path(target).exists() and ":" not in target):
        raise CheckpointError(f"{target!r}: no such run or file", "check the path")


def run_config(target: str) -> Config | None:
    """The settings of a run, if `target` is one."""
    path = Path(target) / "config.toml"
    return of_run(path) if path.is_file() else None


def completed(config: EvaluationConfig, target: str) -> EvaluationConfig:
    """The configuration with the data and the budget of the run, or of the data set's recipe.
    Raises UsageError without either."""
    check_target(target)
    run = run_config(target)
    if config.dataset is None and run is None:
        raise UsageError(
            "which images? a network that is no run does not say", "--dataset NAME, and --data DIR"
        )
    of_run = run if run and config.dataset in (None, run.dataset) else None
    standard = of_run or resolve({"dataset": config.dataset})
    return replace(
        config,
        dataset=standard.dataset,
        data=config.data or standard.data,
        image_size=config.image_size or standard.image_size,
        epsilon=standard.epsilon if config.epsilon is None else config.epsilon,
    )


def network_of(target: str, config: EvaluationConfig, data: ImageSet) -> Network:
    """The network that `target` means, if it fits the images."""
    run = run_config(target)
    architecture = config.model or (run.student if run and run.student not in MODELS else "")
    network = load_network(target, data.num_classes, ("evaluate",), architecture)
    check_network(network.model, data, target)
    if config.model and config.model != network.architecture:
        note = f"{target}: its network is {network.architecture}, whatever --model says"
        network = network._replace(notes=(*network.notes, note))
    return network


def outputs(network: Network, data: ImageSet) -> list[list[float]] | None:
    """What the network says of two images, about, if its code is somebody else's: that can change
    while the weights stay."""
    if network.architecture in MODELS:
        return None
    with frozen_eval(network.model), torch.no_grad():
        logits = network.model(pixels(data.images[:2]).clone())
    return [[round(value, 2) for value in row] for row in logits.tolist()]


@contextlib.contextmanager
def network_at_fault(target: str) -> Iterator[None]:
    """Inside, what is raised by calling and differentiating a network is said to be its fault."""
    try:
        yield
    except NonFiniteError as error:
        raise CheckpointError(f"{target}: {error}", error.way_out) from error
    except (AbsldError, OSError):
        raise
    except Exception as error:
        if "out of memory" in str(error).lower():
            raise
        raise CheckpointError(
            f"{target}: {type(error).__name__}: {error}",
            "it must be differentiable, take any batch and leave its input alone; see --debug",
        ) from error


def images(config: EvaluationConfig) -> ImageSet:
    """The images to evaluate on."""
    splits = load_data(str(config.dataset), config.data, config.image_size or 32)
    part: ImageSet = getattr(splits, config.split)
    return part


def folder(target: str, config: EvaluationConfig) -> Path:
    """Where the results of evaluations of `target` are: beside a run, if it is one."""
    home = Path(target) if run_config(target) else Path()
    return Path(config.out) if config.out else home / "evaluations"


def name_of(target: str, identity: dict[str, Any]) -> str:
    """A directory's name: what a person looks for, and a digest of all that makes the result."""
    path = Path(target)
    short = path.stem if path.is_file() else path.name
    short = re.sub(r"[^\w.-]+", "-", short)[-100:]
    return f"{short}-{key_of(identity)}"


def attacked(
    model: nn.Module,
    data: ImageSet,
    config: EvaluationConfig,
    attacks: Sequence[Attack],
    directory: RunDirectory,
    identity: dict[str, Any],
    observer: Observer,
) -> Evaluation:
    """The evaluation, taken up where predictions.pt says it was left. What is done is saved every
    few seconds, and when the observer or a fault ends it."""
    path = directory.path / "predictions.pt"
    before = None
    if path.exists():
        try:
            kept = load(path)
        except CheckpointError as error:
            raise CheckpointError(str(error), ANEW) from error
        if not isinstance(kept, dict) or kept.get("identity") != identity:
            raise CheckpointError(f"{path}: is of another evaluation", ANEW)
        before = kept["predictions"]
    latest: list[Evaluation] = []
    last = time.perf_counter()

    def keep(evaluation: Evaluation) -> None:
        nonlocal last
        record = {"identity": identity, "attacks": list(evaluation.attacks)}
        tensors = {"index": evaluation.index, "labels": evaluation.labels}
        save(record | tensors | {"predictions": evaluation.predictions}, path)
        last = time.perf_counter()

    def on_batch(progress: Progress, evaluation: Evaluation) -> None:
        latest[:] = [evaluation]
        if time.perf_counter() - last > SAVE_EVERY:
            keep(evaluation)
        observer.batch(progress)

    try:
        evaluation = evaluate(
            model,
            data,
            epsilon=identity["epsilon"],
            attacks=attacks,
            each=config.each,
            examples=config.examples,
            seed=config.seed,
            batch_size=config.batch_size,
            before=before,
            on_batch=on_batch,
        )
    finally:
        if latest:
            keep(latest[0])
    return evaluation
