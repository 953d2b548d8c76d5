"""Export of a network to a file for another program, and the report of its parity.

The file gets its name only after the network in it has predicted what the original does.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from absld.attack import frozen_eval
from absld.config.evaluation_settings import ExportConfig
from absld.data.dataset import ImageSet, stratified
from absld.engine.precision import float32_precision, resolve_device
from absld.errors import CheckpointError, UsageError
from absld.evaluation.images import load_images
from absld.evaluation.results import describe_network, to_json
from absld.evaluation.sanity_checks import check_outputs
from absld.evaluation.targets import (
    blame_target,
    complete_config,
    config_of_run,
    load_target,
    sample_outputs,
    short_name,
)
from absld.progress import Observer
from absld.runs.adversarial_images import ATTACK, images_to_attack, stored_adversarial
from absld.runs.export_formats import (
    SUFFIXES,
    check_packages,
    decode,
    encode,
    missing_runtime,
    runtime_of,
)
from absld.runs.parity import (
    LabelledImages,
    blame_export,
    clean_images,
    compare_networks,
    given_images,
    judge,
)
from absld.storage.environment import environment
from absld.storage.files import key_of, replacing, write_text
from absld.storage.json_files import read_json
from absld.storage.opening import make_folder, open_regular
from absld.storage.safetensors_files import describe_weights

SCHEMA = "absld-export-1"
SAME = (("network", "weights_sha256"), ("file", "format"))  # of an export that may be replaced
PROBED = 32  # images on which the outputs of the original must be repeatable
REPORT = {
    "type": "object",
    "required": ["schema", "network", "file"],
    "properties": {
        "schema": {"const": SCHEMA},
        "network": {"type": "object", "required": ["weights_sha256"]},
        "file": {"type": "object", "required": ["format", "sha256"]},
    },
}


def export_network(target: str, config: ExportConfig, observer: Observer) -> dict[str, Any]:
    """Write the network that `target` means to a file, and the report of its parity beside it.

    target: a run directory, a file of weights, or package.module:factory. Returns the report.

    Raises:
        UsageError: a package is missing, or another file is in the way.
        CheckpointError: the network cannot be exported, or its export predicts other classes.
    """
    check_packages(config.format)
    config = complete_config(config, target)
    path = file_to_write(target, config)
    device = resolve_device(config.device)
    data = load_images(config, observer)
    network = load_target(target, config, data)
    for note in network.notes:
        observer.note(note)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": environment(device),
        "network": describe_network(target, network),
        "data": describe_data(config, data),
        "file": {"path": str(path), "format": config.format},
    }
    report = path.with_name(f"{path.name}.parity.json")
    refuse_others(path, report, results)
    make_folder(path.parent, Path(target) if not config.out and config_of_run(target) else None)
    model = network.model
    with float32_precision("fp32"), blame_target(target), frozen_eval(model):
        refuse_unrepeatable(model, data, target)
        observer.wait(f"writing the network as {config.format}")
        state = model.state_dict()
        described = describe_weights(network.architecture, data.classes, data.image_shape, state)
        content = encode(model, described, config.format, target)
        results["file"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        attack = describe_attack(config, results)
        attack["outputs"] = sample_outputs(target, network, data)
        stored = path.with_name(f"adversarial-{key_of(attack)}.safetensors")
        model.to(device)
        images = compared_images(model, data, config, stored, observer)
        with replacing(path) as file:
            file.write(content)
            file.flush()
            parity = None
            if not (reason := missing_runtime(config.format)):
                observer.wait(f"comparing it by {runtime_of(config.format)}")
                with blame_export(target):
                    exported = decode(content, Path(file.name), described, config.format)
                    parity = compare_networks(model, exported, images, data.classes)
            verdict = judge(parity, target) if parity else "not checked"
            results |= {"adversarial": attack | {"path": str(stored)}, "parity": parity}
            results |= {"verdict": verdict, "reason": reason}
            write_text(report, to_json(results))
    return results


def file_to_write(target: str, config: ExportConfig) -> Path:
    """Return the file of --out, else one in the folder `exports` of the run or the current one."""
    suffix = SUFFIXES[config.format]
    if not config.out:
        home = Path(target) if config_of_run(target) else Path()
        return home / "exports" / f"{short_name(target) or 'network'}{suffix}"
    if not config.out.endswith(suffix):
        raise UsageError(
            f"--out {config.out}: a file of the format {config.format} ends in {suffix}",
            "give another --out, or another --format",
        )
    return Path(config.out)


def refuse_others(path: Path, report: Path, results: Mapping[str, Any]) -> None:
    """Raise UsageError if a file is there that is not an earlier export of the same weights."""
    if not os.path.lexists(path) and not os.path.lexists(report):
        return
    hint = "give another --out, or remove it"
    try:
        before = read_json(report, REPORT)
        ours = all(before[part][key] == results[part][key] for part, key in SAME)
        if ours and os.path.lexists(path):
            with open_regular(path) as file:
                found = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
            ours = found == before["file"]["sha256"]
    except CheckpointError:
        ours = False
    if not ours:
        raise UsageError(f"{path}: there is another file of this name, or its report", hint)


def describe_data(config: ExportConfig, data: ImageSet) -> dict[str, Any]:
    """Return data set, split, number of images, classes and digest."""
    return {
        "dataset": config.dataset,
        "split": config.split,
        "of": len(data),
        "classes": list(data.classes),
        "images_sha256": data.digest(),
    }


def describe_attack(config: ExportConfig, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that decides the adversarial images, but for the code of a factory."""
    return {
        "attack": ATTACK,
        "norm": config.norm,
        "epsilon": config.epsilon,
        "seed": config.seed,
        "examples": config.examples,
        "images_sha256": results["data"]["images_sha256"],
        "weights_sha256": results["network"]["weights_sha256"],
    }


def refuse_unrepeatable(model: nn.Module, data: ImageSet, name: str) -> None:
    """Raise CheckpointError if outputs change when repeated, or with the rest of the batch."""
    chosen = stratified(data.labels, data.num_classes, PROBED, "probe")
    with torch.no_grad():
        _, *checks = check_outputs(model, data.subset(chosen))
    for check in checks:
        if not check.passed:
            raise CheckpointError(
                f"{name}: fails the check {check.name!r}: {check.numbers}",
                "needed: no random numbers, state or statistics of the batch in eval mode",
            )


def compared_images(
    model: nn.Module, data: ImageSet, config: ExportConfig, stored: Path, observer: Observer
) -> dict[str, LabelledImages]:
    """Return the images on which to compare: clean ones, and adversarial ones of the network."""
    assert config.epsilon is not None and config.norm  # complete_config
    labels, size = data.labels, config.batch_size
    index = stratified(labels, data.num_classes, config.examples, "examples", config.seed)
    attacked = images_to_attack(data, config.examples, config.epsilon, config.norm, config.seed)
    x_adv = stored_adversarial(model, attacked, size, stored, observer)
    return {
        "clean": clean_images(data, index, size),
        "adversarial": given_images(x_adv, attacked.labels, size),
    }
