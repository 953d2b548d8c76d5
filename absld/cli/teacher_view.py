"""The view of a teacher check."""

from collections.abc import Iterable, Mapping
from typing import Any

from absld.cli.evaluation_view import NAMES, figure, metric
from absld.models.published import Published
from absld.report.summary import budget
from absld.text import column, wrap

CALIBRATION = {
    "accuracy": "accuracy",
    "confidence": "mean confidence",
    "error": "expected calibration error",
    "entropy": "mean entropy, nats",
    "nll": "cross-entropy, nats",
    "temperature": "temperature of least cross-entropy",
}


def teacher_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the check in lines of at most 80 columns; figures are in per cent or nats."""
    network, data, attack = results["network"], results["data"], results["attack"]
    lines = [
        f"{network['architecture']}, {network['parameters']:,} parameters",
        f"teacher sha256: {network['weights_sha256']}",
        f"{data['images']} of {data['of']} {data['split']} images of {data['dataset']}",
        f"epsilon {budget(attack)}; brackets: 95 % intervals",
        "",
        f"{'class':22} {'clean':>20} {attack['name']:>20} {'true':>6} {'nats':>6}",
    ]
    clean, robust = results["clean"], results["robust"]
    for of_clean, of_robust, soft in zip(
        clean["classes"], robust["classes"], results["soft_labels"], strict=True
    ):
        labels = "     -      -"
        if soft["entropy"] is not None:
            labels = f"{100 * soft['true_probability']:6.1f} {soft['entropy']:6.2f}"
        name = column(of_clean["class"], 22)
        lines.append(f"{name} {figure(of_clean)} {figure(of_robust)} {labels}")
    lines += ["true: mean probability of the true class; nats: entropy of the soft label", ""]
    for name, label in NAMES.items():
        pair = f"{metric(clean, name)} {metric(robust, name)}"
        lines.append(f"{label:22} {pair}")
    lines += ["", "soft labels"]
    for name, label in CALIBRATION.items():
        value = results["calibration"][name]
        text = f"{value:.3f}" if name in ("entropy", "nll", "temperature") else f"{value:.1%}"
        lines.append(f"{label:36} {text:>7}")
    scale = results["input_scale"]
    lines += ["", f"clean accuracy by the scale of the pixels, {scale['images']} images"]
    lines += [f"{name:36} {accuracy:>7.1%}" for name, accuracy in scale["accuracy"].items()]
    verdict = f"verdict: {results['verdict']}: {'; '.join(results['reasons'])}"
    return [*lines, "", *wrap(verdict, 80)]


def published_lines(networks: Iterable[Published]) -> list[str]:
    """Return published networks in lines of 80 columns; only an address may be longer."""
    lines = []
    for network in networks:
        threat = f"{network.dataset} {network.norm} {network.epsilon}"
        accuracies = "accuracies not known"
        if network.clean is not None and network.robust is not None:
            accuracies = f"{network.clean:.1f} clean, {network.robust:.1f} AutoAttack"
        lines += [
            f"{network.name:35} {network.architecture:17} {threat:>26}",
            f"  {accuracies}; arXiv {network.arxiv}; pixels {network.pixels}",
            *([f"  SHA-256 {network.sha256}"] if network.sha256 else ()),
            f"  {network.where}",
        ]
    return [
        *lines,
        "",
        "accuracies: in per cent on all test images, as RobustBench or the authors state",
    ]
