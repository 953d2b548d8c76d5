"""Predictions of an evaluation in a file, from which an interrupted one is continued."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from absld.config.evaluation_settings import EvaluationConfig
from absld.data.dataset import ImageSet, stratified
from absld.errors import CheckpointError, UsageError
from absld.evaluation.adversarial_images import (
    Recorder,
    begin_recording,
    finish_recording,
)
from absld.evaluation.attacks import Attack
from absld.evaluation.evaluate import Evaluation, evaluate, start_evaluation
from absld.progress import AttackProgress, Observer
from absld.storage.checkpoint import load, save
from absld.storage.run_directory import RunDirectory

SAVE_EVERY = 10.0  # seconds
REMOVE = "remove it to evaluate anew"


def resume_attacks(
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
    before = read_predictions(path, identity, config, data) if path.exists() else None
    if not attacks:  # and so no adversarial images
        return attack_and_save(model, data, config, attacks, path, identity, before, None, observer)
    index = stratified(data.labels, data.num_classes, config.examples, "examples", config.seed)
    recorder, before = begin_recording(
        directory.path, data, index, before, identity, observer, save_all=config.save_adversarial
    )
    with recorder or contextlib.nullcontext():
        evaluation = attack_and_save(
            model, data, config, attacks, path, identity, before, recorder, observer
        )
        if recorder:
            save_all, size = config.save_adversarial, config.batch_size
            finish_recording(
                recorder, model, data, evaluation, identity, size, observer, save_all=save_all
            )
    return evaluation


def attack_and_save(
    model: nn.Module,
    data: ImageSet,
    config: EvaluationConfig,
    attacks: Sequence[Attack],
    path: Path,
    identity: dict[str, Any],
    before: Tensor | None,
    recorder: Recorder | None,
    observer: Observer,
) -> Evaluation:
    """Evaluate from the predictions `before`, and save them now and then, and at the end."""
    latest: Evaluation | None = None
    last_save = time.perf_counter()

    def save_predictions(evaluation: Evaluation) -> None:
        nonlocal last_save
        if recorder:
            recorder.flush()  # an image is there before its prediction is
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

    settings: dict[str, Any] = {"on_images": recorder.keep} if recorder else {}
    try:
        return evaluate(
            model,
            data,
            epsilon=identity["epsilon"],
            norm=identity["norm"],
            attacks=attacks,
            each=config.each,
            examples=config.examples,
            seed=config.seed,
            batch_size=config.batch_size,
            before=before,
            on_batch=on_batch,
            **settings,
        )
    finally:
        if latest:
            save_predictions(latest)


def read_predictions(
    path: Path, identity: dict[str, Any], config: EvaluationConfig, data: ImageSet
) -> Tensor:
    """Read the predictions of an interrupted evaluation. Raises CheckpointError if not this one's."""
    try:
        saved = load(path, sealed=True)
    except CheckpointError as error:
        raise CheckpointError(str(error), REMOVE) from error
    if not isinstance(saved, dict) or saved.get("identity") != identity:
        raise CheckpointError(f"{path}: belongs to a different evaluation", REMOVE)
    predictions = saved.get("predictions")
    if predictions is None:
        raise CheckpointError(f"{path}: holds no predictions", REMOVE)
    try:
        start = start_evaluation(data, config, identity["attacks"], predictions)
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}", REMOVE) from error
    return start.predictions
