"""What a person sees of the check of a teacher."""

from collections.abc import Mapping
from typing import Any

from absld.cli.evaluation_view import NAMES, figure, short
from absld.report.summary import budget

CALIBRATION = {
    "accuracy": "right",
    "confidence": "mean confidence",
    "error": "expected calibration error",
    "entropy": "mean entropy, nats",
    "nll": "cross-entropy, nats",
    "temperature": "temperature of least cross-entropy",
}


def teacher_lines(document: Mapping[str, Any]) -> list[str]:
    """The check in lines of 80 columns or less; figures in per cent but for nats."""
    network, data, attack = document["network"], document["data"], document["attack"]
    lines = [
        f"{network['architecture']}, {network['parameters']:,} parameters",
        f"teacher sha256: {network['weights_sha256']}",
        f"{data['images']} of {data['of']} {data['split']} images of {data['dataset']}, "
        f"epsilon {budget(attack['epsilon'])}; brackets: 95 % intervals",
        "",
        f"{'class':22} {'clean':>20} {attack['name']:>20} {'true':>6} {'nats':>6}",
    ]
    clean, robust = document["clean"], document["robust"]
    for one, other, soft in zip(
        clean["classes"], robust["classes"], document["soft_labels"], strict=True
    ):
        labels = "     -      -"
        if soft["entropy"] is not None:
            labels = f"{100 * soft['true_probability']:6.1f} {soft['entropy']:6.2f}"
        lines.append(f"{short(one['class'])} {figure(one)} {figure(other)} {labels}")
    lines += ["true: mean probability of the true class; nats: entropy of the soft label", ""]
    for name, label in NAMES.items():
        lines.append(
            f"{label:22} {figure(clean['metrics'][name])} {figure(robust['metrics'][name])}"
        )
    lines += ["", "soft labels"]
    for name, label in CALIBRATION.items():
        value = document["calibration"][name]
        shown = f"{value:.3f}" if name in ("entropy", "nll", "temperature") else f"{value:.1%}"
        lines.append(f"{label:36} {shown:>7}")
    reasons = "; ".join(document["reasons"])
    return [*lines, "", f"verdict: {document['verdict']}" + (f": {reasons}" if reasons else "")]
