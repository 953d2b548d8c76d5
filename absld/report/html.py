"""The report of an evaluation: an HTML page that needs no other file, or a picture of one page."""

import functools
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from absld.errors import CheckpointError, UsageError
from absld.evaluation.results import read_evaluations, read_results, warnings
from absld.report import figures, summary
from absld.report.examples import Section, example_section
from absld.report.picture import picture
from absld.storage.environment import read_sessions
from absld.storage.files import replacing
from absld.storage.opening import make_folder
from absld.storage.run_directory import RunDirectory
from absld.text import columns, printable

WEIGHTS = (".pt", ".pth", ".bin", ".safetensors")  # suffixes
NARROW = 12  # more classes than these take the whole width


# --- Files ---


def write_report(source: str, out: str | None = None) -> Path:
    """Write the report of an evaluation, and return its path.

    Args:
        source: a run, for its newest evaluation; the directory of an evaluation; or its JSON.
        out: the file, .html, .png or .pdf; by default `report.html` beside the JSON.

    Raises:
        CheckpointError: `source` is not an evaluation.
        UsageError: `out` has another suffix.
    """
    suffix = Path(out).suffix.lower() if out else ".html"
    if suffix not in (".html", ".png", ".pdf"):
        raise UsageError(f"{out}: a report is .html, .png or .pdf", "needed: --out report.html")
    path, results = find_results(Path(source))
    records, counts = training_records(path, results), training_counts(path, results)
    target = Path(out) if out else path.with_name("report.html")
    in_run = not out and Path(source) in target.parents
    make_folder(target.parent, Path(source) if in_run else None)
    if suffix == ".html":
        examples = example_section(path.parent, results)
        content = render_page(results, records, counts, examples).encode()
    else:
        content = picture(results, records, suffix[1:])
    with replacing(target) as file:
        file.write(content)
    return target


def find_results(source: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of the JSON that `source` means, and the results in it."""
    if source.suffix in WEIGHTS and source.is_file():
        raise CheckpointError(
            f"{source} is a file of weights, not an evaluation",
            f"first: {shlex.join(['absld', 'evaluate', str(source)])}; or give evaluations/NAME",
        )
    path = source / "evaluation.json" if source.is_dir() else source
    if path.exists() or not source.is_dir():
        return path, read_results(path)
    candidates = read_evaluations(source)
    if not candidates:
        raise CheckpointError(f"{source}: no evaluation in it", "absld evaluate RUN makes one")
    return max(candidates, key=lambda candidate: str(candidate[1]["environment"]["started"]))


def training_records(path: Path, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of the network's training; none if its run is not there."""
    runs = training_runs(path, results)
    return next((records for run in runs if (records := RunDirectory(run).records())), [])


def training_counts(path: Path, results: Mapping[str, Any]) -> list[int]:
    """Return the training images of each class, if they differ; empty if they are not known."""
    runs = training_runs(path, results)
    latest = next((sessions[-1] for run in runs if (sessions := read_sessions(run))), {})
    counts: list[int] = latest.get("class_counts", {}).get("train", [])
    known = len(counts) == len(results["data"]["classes"])
    return counts if known and min(counts) < max(counts) else []


def training_runs(path: Path, results: Mapping[str, Any]) -> list[Path]:
    """Return where the run of the network may be."""
    places = [*path.resolve().parents[2:3], Path(results["network"]["target"])]
    return [place for place in places if os.path.isdir(place)]  # a target can be any text


# --- The page ---


def render_page(
    results: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    training_counts: Sequence[int] = (),
    examples: Section | None = None,
) -> str:
    """Return the report as HTML.

    records: those of metrics.jsonl, if there are any. training_counts: images of each class (C,),
    if they are to be shown. examples: of adversarial images, if they were kept.
    """
    count = len(results["data"]["classes"])
    trajectories = summary.trajectories(records, count)
    return page_template().render(
        results=results,
        failed=warnings(results),
        training_counts=training_counts,
        examples=examples,
        wide=count > NARROW,
        class_charts=class_charts(results),
        confusion_chart=confusion_chart(results) if count <= summary.MANY else None,
        trajectories=trajectories,
        trajectory_charts=[trajectory_chart(each, results) for each in trajectories],
    )


@functools.cache
def page_template() -> jinja2.Template:
    """Return the page's template, which escapes all texts."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("absld.report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["summary"] = summary
    return templates.get_template("report.html.j2")


# --- Figures ---


def class_charts(results: Mapping[str, Any]) -> list[Markup]:
    """Return the bars of all classes, the worst first; those of many in two figures."""
    classes, left = summary.worst_first(results), name_width(results)
    pitch = 14 if len(classes) > summary.MANY else 27
    half = -(-len(classes) // 2)
    charts = []
    for part in (classes[:half], classes[half:]) if len(classes) > NARROW else (classes,):
        first = classes.index(part[0]) + 1
        title = (
            "Accuracy, clean and robust, with 95 % intervals: classes "
            f"{first} to {first + len(part) - 1} of {len(classes)}, worst first"
        )
        draw = functools.partial(figures.class_bars, results=results, classes=part)
        charts.append(
            figures.to_svg(draw, title, (figures.WIDTH, 42 + pitch * len(part)), (left, 18, 78, 24))
        )
    return charts


def confusion_chart(results: Mapping[str, Any]) -> Markup:
    """Return the confusion matrix."""
    draw = functools.partial(figures.confusion_matrix, results=results)
    title = "Images by true class (row) and predicted class (column) under attack"
    width = figures.WIDTH if len(results["confusion"]) <= NARROW else 1.6 * figures.WIDTH
    left = name_width(results) + 16
    bottom = max(left, 38)
    return figures.to_svg(draw, title, (width, width + bottom - left), (left, 8, 8, bottom))


def trajectory_chart(trajectory: summary.Trajectory, results: Mapping[str, Any]) -> Markup:
    """Return the lines of a trajectory."""
    draw = functools.partial(figures.trajectory_lines, results=results, trajectory=trajectory)
    title = f"{trajectory.title}: a line per class over the epochs"
    return figures.to_svg(draw, title, (figures.WIDTH, 230), (34, 18, 92, 34))


def name_width(results: Mapping[str, Any]) -> float:
    """Return the room for class names in a figure, in points."""
    names = [figures.name_of(results, k) for k in range(len(results["data"]["classes"]))]
    return 12 + 6.8 * max(map(columns, names))
