"""Check of a teacher: accuracy and robustness by class, calibration, and a verdict."""

from typing import Any

from torch import Tensor

from absld.config.evaluation_settings import EvaluationConfig
from absld.engine.precision import (
    emulation_warnings,
    float32_precision,
    resolve_device,
    with_precision,
)
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.calibration import Calibration, calibration, compute_logits, entropies
from absld.evaluation.evaluate import Evaluation, evaluate
from absld.evaluation.images import describe_data, load_images
from absld.evaluation.input_scale import HINT, InputScale, examine_scale
from absld.evaluation.results import describe_network, evaluation_results
from absld.evaluation.targets import blame_target, complete_config, load_target
from absld.evaluation.validation import near_chance
from absld.metrics import present
from absld.progress import Observer
from absld.storage.environment import environment

SCHEMA = "absld-teacher-1"
ATTACK = "pgd20"
NEARLY_HARD = 0.99  # mean confidence from which temperatures have almost nothing to soften


def inspect_teacher(target: str, config: EvaluationConfig, observer: Observer) -> dict[str, Any]:
    """Check whether a network is fit to teach, on images that it was not trained on.

    target: a file, a run, hf:owner/name or package.module:factory. Returns plain values: network, figures by class,
    calibration, verdict and its reasons. Raises AbsldError if the network cannot be loaded or called.
    """
    config = complete_config(config, target)
    data = load_images(config, observer)
    network = load_target(target, config, data, observer)
    device = resolve_device(config.device)
    for note in [*network.notes, *emulation_warnings([config.precision], device)]:
        observer.note(note)
    data = data.to(device)
    assert config.epsilon is not None and config.norm is not None  # complete_config
    attacks = parse_attacks(ATTACK, data.num_classes, 1, config.norm)
    with float32_precision(config.precision), blame_target(target):
        model = with_precision(network.model.to(device), config.precision)
        evaluation = evaluate(
            model,
            data,
            epsilon=config.epsilon,
            norm=config.norm,
            attacks=attacks,
            examples=config.examples,
            seed=config.seed,
            batch_size=config.batch_size,
            on_batch=lambda progress, evaluation: observer.attack_batch(progress),
        )
        examined = data.subset(evaluation.index)
        logits = compute_logits(model, examined, config.batch_size)
        scale = examine_scale(model, examined)
    calibrated = calibration(logits, evaluation.labels)
    verdict, reasons = judge(evaluation, calibrated, scale)
    results = evaluation_results(evaluation, attacks)
    return {
        "schema": SCHEMA,
        "environment": environment(device),
        "network": describe_network(target, network),
        "data": describe_data(config, evaluation, data),
        "attack": {"name": ATTACK, "norm": config.norm, "epsilon": config.epsilon},
        "clean": {key: results["attacks"][0][key] for key in ("classes", "metrics")},
        "robust": results["robust"],
        "input_scale": {"images": scale.images, "accuracy": scale.accuracy},
        "soft_labels": describe_soft_labels(logits, evaluation),
        "calibration": calibrated._asdict(),
        "verdict": verdict,
        "reasons": reasons,
    }


def describe_soft_labels(logits: Tensor, evaluation: Evaluation) -> list[dict[str, Any]]:
    """Compute means over each class: probability of the true class, and entropy of the soft label.

    Both are None for a class without images.
    """
    labels = evaluation.labels
    true = logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    entropy = entropies(logits)
    rows = []
    for k, name in enumerate(evaluation.classes):
        of_class = labels == k
        means = [values[of_class].mean().item() for values in (true, entropy)]
        probability, nats = means if of_class.any() else (None, None)
        rows.append({"class": name, "true_probability": probability, "entropy": nats})
    return rows


def judge(
    evaluation: Evaluation, calibrated: Calibration, scale: InputScale
) -> tuple[str, list[str]]:
    """Return the verdict, "fit", "doubtful" or "unfit", and its reasons.

    The scale of the pixels is among the reasons of every verdict.
    """
    if scale.other:
        return "unfit", [f"{scale.reason}: {HINT}"]
    count = len(evaluation.classes)
    clean, robust = present(evaluation.clean_accuracy), present(evaluation.robust_accuracy)
    if near_chance(clean.mean().item(), count):
        return "unfit", [f"near chance on clean images, {clean.mean():.1%}", scale.reason]
    reasons = []
    if near_chance(robust.mean().item(), count):
        reasons.append(
            f"not robust, {robust.mean():.1%} under {ATTACK}: a student takes its robustness from "
            "a robust teacher"
        )
    elif robust.min() < 1 / count / 2:
        name = evaluation.classes[int(evaluation.robust_accuracy.nan_to_num(2).argmin())]
        reasons.append(
            f"class {name} is hardly robust, {robust.min():.1%}: it teaches little of it"
        )
    if calibrated.confidence > NEARLY_HARD:
        reasons.append(
            f"its labels are nearly hard, mean confidence {calibrated.confidence:.1%}: there is "
            "little for temperatures to soften"
        )
    return ("doubtful" if reasons else "fit"), [*reasons, scale.reason]
