"""Upload of files into a repository of the Hugging Face Hub."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from absld.config.imports import HUB
from absld.errors import AbsldError, CheckpointError, UsageError
from absld.models.hub import MAIN, HubName, import_hub, parse
from absld.text import clip

LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
LOG_IN = "`hf auth login`, or set HF_TOKEN to a token with write access"


class Upload(NamedTuple):
    """A commit in a repository, and what the repository is."""

    url: str
    commit: str
    private: bool


def parse_repository(target: str) -> str:
    """Return owner/name of hf:owner/name. Raises UsageError, also without huggingface_hub."""
    name, _ = parse(target), import_hub()
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name.repository)
    except ValueError as error:
        raise UsageError(f"{target}: {error}", "another name") from error
    if name != HubName(name.repository):
        raise UsageError(
            f"{target}: a network is pushed to the branch {MAIN} of a repository",
            f"needed: {HUB}{name.repository}",
        )
    return name.repository


def parse_license(text: str) -> str | None:
    """Return an identifier as the hub writes it, in small letters; None for none. Raises UsageError."""
    if text and not LICENSE.fullmatch(text):
        raise UsageError(
            f"a licence is an SPDX identifier, not {text!r}", "such as mit, apache-2.0, cc-by-4.0"
        )
    return text.lower() or None


def require_token() -> None:
    """Raise UsageError if huggingface_hub has no token."""
    if import_hub().get_token() is None:
        raise UsageError("no token for the Hugging Face Hub is set", LOG_IN)


def upload(folder: Path, names: Sequence[str], repository: str, *, public: bool) -> Upload:
    """Upload files of a folder in one commit, into a repository that is made where there is none.

    public: whether a new one is public, and whether files may go into an existing public one.

    Raises:
        UsageError: the token may not do this, or the repository is public.
        CheckpointError: the hub cannot be reached, or fails.
    """
    hub = import_hub()
    api = hub.HfApi(library_name="absld")
    with hub_errors(repository):
        api.create_repo(repository, private=not public, exist_ok=True)
        private = bool(api.model_info(repository).private)
        if not private and not public:
            raise UsageError(
                f"hf:{repository} is public", "--public uploads to it; or make it private there"
            )
        operations = [hub.CommitOperationAdd(name, folder / name) for name in names]
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

    chain: list[BaseException] = [error]
    while cause := chain[-1].__cause__:  # an upload that failed is a RuntimeError
        chain.append(cause)
    answers = {e: r.status_code for e in chain if (r := getattr(e, "response", None)) is not None}
    answer, status = next(iter(answers.items()), (error, None))
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
        text = clip(" ".join(str(getattr(answer, "server_message", "") or answer).split()), 300)
        hint = "--out DIR writes the files here; a licence must be one that the hub knows"
        later = status is not None and (status == 429 or status >= 500)
        return CheckpointError(
            f"{name}: {host} answers: {text}", "try again later" if later else hint
        )
    return CheckpointError(
        f"{name}: {host} cannot be reached, or cut the connection ({type(chain[-1]).__name__})",
        "check the connection and HF_ENDPOINT, then the same command again",
    )
