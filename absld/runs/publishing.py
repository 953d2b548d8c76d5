"""The files of a repository for a finished run: its student, its evaluation, and a model card."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch import Tensor

from absld.config.fields import group_of
from absld.config.files import read_run_config
from absld.config.imports import HUB, names_code
from absld.config.settings import Config
from absld.data.sources import is_resized
from absld.errors import CheckpointError
from absld.evaluation.results import read_evaluations, read_results, to_json
from absld.models.state_dicts import find_state_dict, stated_classes, stated_image_shape
from absld.report import model_card
from absld.report.summary import budget
from absld.runs.run_record import deciding_settings
from absld.storage.checkpoint import load
from absld.storage.environment import read_sessions
from absld.storage.files import write_text
from absld.storage.opening import COPY_AGAIN, open_regular
from absld.storage.run_directory import RunDirectory
from absld.storage.safetensors_files import CONFIG, WEIGHTS, describe_weights, write_network

CARD, EVALUATION = "README.md", "evaluation.json"
FILES = (WEIGHTS, CONFIG, CARD, EVALUATION)


class Published(NamedTuple):
    """A file: its name, length in bytes, and SHA-256."""

    name: str
    bytes: int
    sha256: str


class Prepared(NamedTuple):
    """The files of a repository, the evaluation that they show, and notes."""

    files: tuple[Published, ...]
    evaluation: Path
    notes: tuple[str, ...]


def write_files(
    run: Path, repository: str, folder: Path, license_id: str | None, evaluation: Path | None
) -> Prepared:
    """Write the files of a repository into a folder.

    Args:
        run: a finished run.
        repository: owner/name, for the commands in the card.
        license_id: of the network; None leaves the field of the card out.
        evaluation: the evaluation.json to show; by default, one of the run's.

    Raises:
        CheckpointError: the run is not finished, is damaged or has no evaluation.
    """
    if not (run / "config.toml").exists():
        raise CheckpointError(f"{run}: not a run", "needed: a run directory of `absld train`")
    recipe = read_run_config(run / "config.toml")
    content, state = read_student(run)
    classes, _ = stated_classes([content])
    architecture, shape = str(content.get("architecture", "")), stated_image_shape([content])
    if not (architecture and classes and shape):
        raise CheckpointError(f"{run}: its network states no classes or images", COPY_AGAIN)
    config = describe_weights(architecture, classes, shape, state)
    path, results, notes = choose_evaluation(run, recipe, config["sha256"], evaluation)
    if results["data"]["classes"] != list(classes):
        raise CheckpointError(
            f"{path}: is of other classes than the network", f"absld evaluate {run}"
        )
    sessions = read_sessions(run)
    subject = model_card.Subject(
        repository,
        config,
        training_settings(recipe),
        *describe_teacher(recipe, sessions[-1].get("teacher_sha256", "")),
        by_name=not names_code(architecture),
    )
    results = without_places(results, subject)
    write_network(folder, config, state)
    write_text(folder / EVALUATION, to_json(results))
    write_text(folder / CARD, card_text(subject, results, license_id))
    if not license_id:
        notes = (*notes, "the card names no licence; --license ID does")
    return Prepared(tuple(describe_file(folder / name) for name in FILES), path, notes)


def read_student(run: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Return the content of a finished run's best.pt, and the weights in it.

    Raises CheckpointError.
    """
    directory = RunDirectory(run)
    if (status := directory.status()) != "finished":
        raise CheckpointError(
            f"{run}: the run is {status}", "absld train ... --resume continues it"
        )
    content = load(directory.best, sealed=True)
    return content, find_state_dict(content, directory.best).tensors


def choose_evaluation(
    run: Path, recipe: Config, sha256: str, given: Path | None
) -> tuple[Path, dict[str, Any], tuple[str, ...]]:
    """Return the evaluation of a run's student that a card shows, its path, and notes.

    Of those with attacks on all test images with the budget of the run, the one with the lowest
    robust average: each is an upper bound, and this one is the nearest. If there are none, the
    newest other one, if possible with attacks, and with that budget.

    Raises CheckpointError if there is no evaluation of these weights.
    """
    found = [(given, read_results(given))] if given else read_evaluations(run)
    own = [(path, r) for path, r in found if r["network"]["weights_sha256"] == sha256]
    if not own:
        cause = "is of other weights" if given else "no evaluation of its student"
        raise CheckpointError(f"{given or run}: {cause}", f"absld evaluate {run}")
    notes = {path: limits(results, recipe) for path, results in own}
    whole = [(path, results) for path, results in own if not notes[path]]
    if whole:
        path, results = min(
            whole, key=lambda each: each[1]["robust"]["metrics"]["average"]["value"]
        )
    else:
        attacked = [each for each in own if each[1]["settings"]["attacks"]]
        of_budget = [each for each in attacked if has_budget(each[1], recipe)]
        path, results = max(
            of_budget or attacked or own, key=lambda each: str(each[1]["environment"]["started"])
        )
    return path, results, tuple(f"{path}: {note}" for note in notes[path])


def limits(results: Mapping[str, Any], recipe: Config) -> list[str]:
    """Return why an evaluation does not show what people expect of a card."""
    data, settings = results["data"], results["settings"]
    checks = {
        f"is on images of {data['dataset']}, not {recipe.dataset}": data["dataset"]
        != recipe.dataset,
        f"is on the {data['split']} images": data["split"] != "test",
        f"is on {data['images']:,} of {data['of']:,} images": data["images"] != data["of"],
        "is without attacks": not settings["attacks"],
        f"has another budget than the training, {budget(settings)}": not has_budget(
            results, recipe
        ),
    }
    return [text for text, holds in checks.items() if holds]


def has_budget(results: Mapping[str, Any], recipe: Config) -> bool:
    """Return whether an evaluation has the norm and the epsilon of a training."""
    return budget(results["settings"]) == budget(vars(recipe))


def without_places(results: Mapping[str, Any], subject: model_card.Subject) -> dict[str, Any]:
    """Return results without the paths of this machine, which a command and notes may hold."""
    network, command = results["network"], model_card.evaluation_command(subject, results)
    notes = [note.rpartition(": ")[2] for note in network["notes"]]
    return {
        **results,
        "environment": results["environment"] | {"command": command},
        "network": network | {"target": f"hf:{subject.repository}", "notes": notes},
        "against": None,
    }


def training_settings(recipe: Config) -> dict[str, Any]:
    """Return the settings that decided a training; networks, which may be paths, are left out."""
    skipped = {f.name for f in fields(Config) if group_of(f) == "Networks"}
    if not is_resized(recipe.dataset):
        skipped |= {"image_size"}
    values = deciding_settings(recipe)
    return {k: v for k, v in values.items() if k not in skipped and v is not None}


def describe_teacher(recipe: Config, sha256: str) -> tuple[str, str]:
    """Return the teacher of a run, without the folder of its file, and its digest; empty without."""
    if not sha256:
        return "", ""
    name = recipe.teacher
    if not name:
        epochs = recipe.teacher_epochs
        return f"{recipe.teacher_model}, trained by TRADES for {epochs} epochs", sha256
    return (name if name.startswith(HUB) or names_code(name) else Path(name).name), sha256


def card_text(
    subject: model_card.Subject, results: Mapping[str, Any], license_id: str | None
) -> str:
    """Return the card: metadata in YAML, and the text."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = str(results["data"]["dataset"])
    metadata = model_card.metadata(subject, results, license_id)
    figures = [
        EvalResult(
            task_type="image-classification",
            dataset_type=(metadata["datasets"] or [dataset])[0],
            dataset_name=dataset,
            dataset_split=results["data"]["split"],
            metric_type="accuracy",
            metric_name=name,
            metric_value=round(value, 4),
        )
        for name, value in model_card.figures(results).items()
    ]
    name = subject.repository.partition("/")[2]
    data = ModelCardData(model_name=name, eval_results=figures or None, **metadata)
    return f"---\n{data.to_yaml()}\n---\n\n{model_card.render_card(subject, results)}"


def describe_file(path: Path) -> Published:
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(cast(Any, file), "sha256").hexdigest()
    return Published(path.name, path.stat().st_size, sha256)
