"""A whole evaluation: network, images, attacks, sanity checks, and the files of the results.

The directory of an evaluation is named by everything that decides its results. So the same command
continues an interrupted evaluation, and reads a finished one instead of repeating it.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from absld.config.evaluation_settings import EvaluationConfig
from absld.data.dataset import ImageSet
from absld.engine.precision import (
    emulation_warnings,
    float32_precision,
    resolve_device,
    with_precision,
)
from absld.errors import CheckpointError, UsageError
from absld.evaluation.adversarial_images import FLAG
from absld.evaluation.attacks import parse_attacks
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
from absld.evaluation.targets import (
    blame_target,
    check_target,
    complete_config,
    config_of_run,
    load_target,
    sample_outputs,
    short_name,
)
from absld.models.loading import Network
from absld.progress import Observer
from absld.storage.environment import environment
from absld.storage.files import digest, key_of, write_text
from absld.storage.run_directory import RunDirectory

# Settings that decide the results, not where things are or how fast.
DECIDING = ("norm", "epsilon", "restarts", "each", "examples", "seed", "precision")


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

    target: see absld.evaluation.targets. Raises AbsldError.
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

    base_settings: for `base` what `config.model` and `config.weights` are for `target`. Returns the
    evaluation of `target`, with the paired differences from `base` in its results.
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
