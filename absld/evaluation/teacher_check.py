"""Is a network fit to teach? What it is, how right and how robust it is class by class, and what
its soft labels are like, on images that it was not trained on."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.config.settings import EvaluationConfig
from absld.data.dataset import ImageSet, pixels
from absld.engine.precision import arithmetic, in_precision, resolve_device
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.calibration import Calibration, calibration, entropies
from absld.evaluation.evaluate import Evaluation, Progress, evaluate
from absld.evaluation.results import about_network, results
from absld.evaluation.runner import completed, images, network_at_fault, network_of
from absld.evaluation.validation import MARGIN
from absld.metrics import present
from absld.storage.environment import environment

SCHEMA = "absld-teacher-1"
ATTACK = "pgd20"
NEARLY_HARD = 0.99  # mean confidence from which temperatures have next to nothing to soften


class Observer(Protocol):
    """Hears what a check does."""

    def note(self, text: str) -> None:
        """A line worth knowing."""

    def batch(self, progress: Progress) -> None:
        """A batch is done."""


def inspect_teacher(target: str, config: EvaluationConfig, observer: Observer) -> dict[str, Any]:
    """The check as plain values: network, classes, calibration, verdict with its reasons.

    target: a file, a run or package.module:factory; config: of its images, their split the one to
    judge by. Raises AbsldError for what cannot be loaded or called.
    """
    config = completed(config, target)
    data = images(config)
    network = network_of(target, config, data)
    for note in network.notes:
        observer.note(note)
    device = resolve_device(config.device)
    data = data.to(device)
    attacks = parse_attacks(ATTACK, data.num_classes, 1)
    assert config.epsilon is not None  # completed
    with arithmetic(config.precision), network_at_fault(target):
        model = in_precision(network.model.to(device), config.precision)
        evaluation = evaluate(
            model,
            data,
            epsilon=config.epsilon,
            attacks=attacks,
            examples=config.examples,
            seed=config.seed,
            batch_size=config.batch_size,
            on_batch=lambda progress, evaluation: observer.batch(progress),
        )
        logits = logits_of(model, data.subset(evaluation.index), config.batch_size)
    soft = calibration(logits, evaluation.labels)
    verdict, reasons = judged(evaluation, soft)
    figures = results(evaluation, attacks)
    return {
        "schema": SCHEMA,
        "environment": environment(device),
        "network": about_network(target, network),
        "data": {
            "dataset": config.dataset,
            "split": config.split,
            "images": len(evaluation.labels),
            "of": len(data),
            "classes": list(data.classes),
        },
        "attack": {"name": ATTACK, "epsilon": config.epsilon},
        "clean": {key: figures["attacks"][0][key] for key in ("classes", "metrics")},
        "robust": figures["robust"],
        "soft_labels": soft_labels(logits, evaluation),
        "calibration": soft._asdict(),
        "verdict": verdict,
        "reasons": reasons,
    }


def logits_of(model: nn.Module, data: ImageSet, batch_size: int) -> Tensor:
    """Logits (N,C) of clean images, on the CPU."""
    with frozen_eval(model), torch.no_grad():
        parts = [model(pixels(part)).cpu() for part in torch.split(data.images, batch_size)]
    return torch.cat(parts)


def soft_labels(logits: Tensor, evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each class, the mean probability that its images are given of being of it, and the mean
    entropy of their soft labels; null for a class without images."""
    labels = evaluation.labels
    true = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    entropy = entropies(logits)
    found = []
    for k, name in enumerate(evaluation.classes):
        own = labels == k
        values = (true[own].mean().item(), entropy[own].mean().item()) if own.any() else [None] * 2
        found.append({"class": name, "true_probability": values[0], "entropy": values[1]})
    return found


def judged(evaluation: Evaluation, soft: Calibration) -> tuple[str, list[str]]:
    """fit, doubtful or unfit, and why."""
    chance = 1 / len(evaluation.classes)
    clean, robust = present(evaluation.clean), present(evaluation.robust)
    if clean.mean() < chance + MARGIN:
        return "unfit", [f"near chance on clean images, {clean.mean():.1%}"]
    reasons = []
    if robust.mean() < chance + MARGIN:
        reasons.append(
            f"not robust, {robust.mean():.1%} under {ATTACK}: a student takes its robustness from "
            "a robust teacher"
        )
    elif robust.min() < chance / 2:
        name = evaluation.classes[int(evaluation.robust.nan_to_num(2).argmin())]
        reasons.append(
            f"class {name} is hardly robust, {robust.min():.1%}: it teaches little of it"
        )
    if soft.confidence > NEARLY_HARD:
        reasons.append(
            f"its labels are nearly hard, mean confidence {soft.confidence:.1%}: there is little "
            "for temperatures to soften"
        )
    return ("doubtful" if reasons else "fit"), reasons
