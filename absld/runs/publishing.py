"""A finished run in a repository of the Hugging Face hub: its student, its evaluation, and a card."""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from torch import Tensor

from absld.config.fields import group_of
from absld.config.files import read_run_config
from absld.config.imports import names_code
from absld.config.settings import Config
from absld.data.sources import RESIZED
from absld.errors import AbsldError, CheckpointError, DataError, UsageError
from absld.evaluation.results import read_evaluations, read_results, to_json
from absld.models.hub_config import CONFIG, WEIGHTS
from absld.models.hub_files import network_config, write_network
from absld.models.state_dicts import find_state_dict, stated_classes, stated_image_shape
from absld.report import model_card
from absld.runs.run_record import deciding_settings
from absld.storage.checkpoint import load
from absld.storage.environment import read_sessions
from absld.storage.files import write_text
from absld.storage.opening import COPY_AGAIN
from absld.storage.run_directory import RunDirectory
from absld.text import clip

CARD, EVALUATION = "README.md", "evaluation.json"
FILES = (WEIGHTS, CONFIG, CARD, EVALUATION)
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
LOG_IN = "`hf auth login`, or set HF_TOKEN to a token with write access"
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


class Published(NamedTuple):
    """A file: its name, length in bytes, and SHA-256."""

    name: str
    bytes: int
    sha256: str


class Upload(NamedTuple):
    """A commit in a repository, and what the repository is."""

    url: str
    commit: str
    private: bool


def parse_repository(target: str) -> str:
    """Return owner/name of hf:owner/name. Raises UsageError."""
    scheme, _, repository = target.partition(":")
    parts = repository.split("/")
    if scheme != "hf" or len(parts) != 2 or not all(map(NAME.fullmatch, parts)):
        raise UsageError(
            f"a model is pushed to hf:owner/name, not {target!r}",
            "owner is a user or an organisation; letters, digits, - _ . are allowed",
        )
    return repository


def parse_license(text: str) -> str | None:
    """Return an identifier as the hub writes it, in small letters; None for none. Raises UsageError."""
    if text and not LICENSE.fullmatch(text):
        raise UsageError(
            f"a licence is an SPDX identifier, not {text!r}", "such as mit, apache-2.0, cc-by-4.0"
        )
    return text.lower() or None


# --- The files ---


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
    config = network_config(architecture, classes, shape, state)
    path, results, notes = choose_evaluation(run, recipe, config["sha256"], evaluation)
    if results["data"]["classes"] != list(classes):
        raise CheckpointError(f"{path}: is of other classes than the network", EVALUATE)
    results = without_places(results, repository)
    sessions = read_sessions(run)
    subject = model_card.Subject(
        repository,
        config,
        training_settings(recipe),
        *describe_teacher(recipe, sessions[-1].get("teacher_sha256", "")),
        by_name=not names_code(architecture),
    )
    write_network(folder, config, state)
    write_text(folder / EVALUATION, to_json(results))
    write_text(folder / CARD, card_text(subject, results, license_id))
    if not license_id:
        notes = (*notes, "the card names no licence; --license ID does")
    return Prepared(tuple(describe_file(folder / name) for name in FILES), path, notes)


EVALUATE = "absld evaluate RUN makes an evaluation of it"


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
    newest other one.

    Raises CheckpointError if there is no evaluation of these weights.
    """
    found = [(given, read_results(given))] if given else read_evaluations(run)
    own = [(path, r) for path, r in found if r["network"]["weights_sha256"] == sha256]
    if not own:
        cause = "is of other weights" if given else "no evaluation of its student"
        raise CheckpointError(f"{given or run}: {cause}", EVALUATE)
    notes = {path: limits(results, recipe) for path, results in own}
    whole = [(path, results) for path, results in own if not notes[path]]
    if whole:
        path, results = min(
            whole, key=lambda each: each[1]["robust"]["metrics"]["average"]["value"]
        )
    else:
        path, results = max(own, key=lambda each: str(each[1]["environment"]["started"]))
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
        f"has another budget than the training, {settings['epsilon']:g}": settings["epsilon"]
        != recipe.epsilon,
    }
    return [text for text, holds in checks.items() if holds]


def without_places(results: Mapping[str, Any], repository: str) -> dict[str, Any]:
    """Return results without the paths of this machine, which a command and notes may hold."""
    target, network = f"hf:{repository}", results["network"]
    notes = [note.rpartition(": ")[2] for note in network["notes"]]
    return {
        **results,
        "environment": results["environment"] | {"command": f"absld evaluate {target}"},
        "network": network | {"target": target, "notes": notes},
        "against": None,
    }


def training_settings(recipe: Config) -> dict[str, Any]:
    """Return the settings that decided a training; networks, which may be paths, are left out."""
    skipped = {f.name for f in fields(Config) if group_of(f) == "Networks"}
    if recipe.dataset not in RESIZED:
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
    return (name if name.startswith("hf:") or names_code(name) else Path(name).name), sha256


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
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return Published(path.name, path.stat().st_size, sha256)


# --- The hub ---


def require_hub() -> None:
    """Raise UsageError if huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"a push needs the package huggingface_hub: {error}", "pip install 'absld[hub]'"
        ) from error


def upload(folder: Path, repository: str, *, public: bool) -> Upload:
    """Upload the files in one commit, into a repository that is made where there is none.

    public: whether a new one is public, and whether files may go into an existing public one.

    Raises:
        UsageError: there is no token, it may not do this, or the repository is public.
        DataError: the hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise UsageError("there is no token of the hub", LOG_IN)
    api = HfApi(library_name="absld")
    with hub_errors(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        private = bool(api.model_info(repository).private)
        if not private and not public:
            raise UsageError(
                f"hf:{repository} is public", "--public uploads to it; or make it private there"
            )
        operations = [CommitOperationAdd(name, folder / name) for name in FILES]
        commit = api.create_commit(repository, operations, commit_message="absld push")
    return Upload(commit.commit_url, commit.oid, private)


@contextlib.contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors with a hint."""
    try:
        yield
    except AbsldError:
        raise
    except Exception as error:  # also those of its HTTP client, which depends on its version
        raise explain(error, repository) from error


def explain(error: Exception, repository: str) -> AbsldError:
    """Return the error that says why nothing was uploaded."""
    from huggingface_hub import constants, errors

    chain = [error]
    while cause := chain[-1].__cause__:  # an upload that failed is a RuntimeError
        chain.append(cause)
    answers = [e for e in chain if getattr(e, "response", None) is not None]
    status = answers[0].response.status_code if answers else None
    host = urlsplit(constants.ENDPOINT).hostname
    name = f"hf:{repository}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UsageError(f"{name}: HF_HUB_OFFLINE is set", "unset it; --out DIR needs no network")
    if status == 401:
        return UsageError(f"{name}: {host} does not accept the token", LOG_IN)
    if status in (403, 404):
        return UsageError(
            f"{name}: the token may not write there",
            "a token with write access, of the owner or a member of the organisation",
        )
    if status is not None or isinstance(error, ValueError):  # such as metadata that it refuses
        text = clip(" ".join(str(answers[0] if answers else error).split()), 300)
        hint = "--out DIR writes the files here; a licence must be one that the hub knows"
        later = status is not None and (status == 429 or status >= 500)
        return DataError(f"{name}: {host} answers: {text}", "try again later" if later else hint)
    return DataError(
        f"{name}: {host} cannot be reached ({type(error).__name__})",
        "check the connection and HF_ENDPOINT, then the same command again",
    )
