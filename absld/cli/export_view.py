"""The view of an export: its parity with the original."""

from collections.abc import Iterator, Mapping
from typing import Any

from absld.report.summary import budget
from absld.text import column

VERDICTS = {
    "same": "same predictions, logits within rounding",
    "same predictions": "same predictions; logits differ by more than rounding",
    "not checked": "not checked",
}


def export_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the export in lines of at most 80 columns, but for the path of its file."""
    network, file, attack = results["network"], results["file"], results["adversarial"]
    lines = [
        f"{network['architecture']} as {file['format']}, {file['bytes'] / 2**20:,.1f} MiB",
        f"weights sha256: {network['weights_sha256']}",
        f"adversarial: {attack['attack']}, epsilon {budget(attack)}",
        "",
        *(parity_lines(results["parity"]) if results["parity"] else ()),
    ]
    reason = f": {results['reason']}" if results["reason"] else ""
    return [*lines, f"verdict: {VERDICTS[results['verdict']]}{reason}", file["path"]]


def parity_lines(parity: Mapping[str, Any]) -> Iterator[str]:
    """Return the table of equal predictions and of differences of logits."""
    kinds = [parity[kind] for kind in ("clean", "adversarial")]
    yield f"{'equal predictions':22} {'clean':>20} {'adversarial':>20}"
    for rows in zip(*(part["classes"] for part in kinds), strict=True):
        yield row(rows[0]["class"], *(equal_of(part) for part in rows))
    yield ""
    yield row("all", *(equal_of(part) for part in kinds))
    yield row("ties", *(str(part["ties"]) for part in kinds))
    yield row("largest difference", *(f"{part['largest_difference']:.3g}" for part in kinds))
    yield row("tolerance", *(f"{part['tolerance']:.3g}" for part in kinds))
    yield ""


def row(name: str, *texts: str) -> str:
    return f"{column(name, 22)} " + " ".join(f"{text:>20}" for text in texts)


def equal_of(part: Mapping[str, Any]) -> str:
    return f"{part['equal']} of {part['images']}"
