"""Files of weights on the Hugging Face Hub, `hf:owner/name[@revision][/file]`.

huggingface_hub fetches them into its own cache, and finds them there without a network. Nothing else
is read from a repository.
"""

import errno
import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from absld.config.imports import HUB, import_extra, split_hub_target
from absld.errors import AbsldError, CheckpointError, UsageError
from absld.progress import Observer
from absld.storage.opening import open_regular
from absld.text import clip, first_of

MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SAFE, OTHERS = ".safetensors", (".pt", ".pth", ".bin")
TIMEOUT = 10.0  # seconds without an answer
SHOWN = 10  # files in a message
DISK = (errno.ENOSPC, errno.EDQUOT)
LOG_IN = "set HF_TOKEN, or `hf auth login`"


class HubName(NamedTuple):
    """A repository, a revision (branch, tag or commit) and a file in it; "" for no file."""

    repository: str
    revision: str = MAIN
    file: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision == MAIN else f"@{self.revision}"
        return HUB + self.repository + revision + (f"/{self.file}" if self.file else "")


class HubFile(NamedTuple):
    """A fetched file: its path in the cache, and its origin (repository, revision, commit, file, sha256)."""

    path: Path
    name: HubName
    origin: Mapping[str, str]
    notes: tuple[str, ...]


def parse(target: str) -> HubName:
    """Parse hf:owner/name[@revision][/file]; a slash in a revision is %2F. Raises UsageError."""
    parts = split_hub_target(target)
    name = parts and HubName(parts[0], parts[1] or MAIN, parts[2])
    if not name or (name.file and not is_relative(name.file)):
        raise UsageError(
            f"{clip(target, 200)!r} does not name a file on the hub",
            "needed: hf:owner/name, hf:owner/name/file or hf:owner/name@revision/file",
        )
    return name


def is_relative(file: str) -> bool:
    """Return whether the name of a file stays below its folder."""
    return "\\" not in file and not {"", ".", ".."} & {*file.split("/")}


def import_hub() -> Any:
    """Import huggingface_hub. Raises UsageError if it is not installed."""
    return import_extra("huggingface_hub", "hub", "hf:")


def fetch(target: str, observer: Observer) -> HubFile:
    """Fetch a file of weights, unless it is in the cache.

    A commit that is whole there needs no network. For a branch or tag the hub is asked where it
    stands; if it cannot be, the cache is used, and a note says so.

    Raises:
        UsageError: the target is malformed, or huggingface_hub is not installed.
        CheckpointError: the file cannot be fetched, or several could be meant.
    """
    name, hub = parse(target), import_hub()
    files, fault = list_files(hub, name)
    name = name._replace(file=name.file or choose_file(name, files))
    if name.file not in files:
        raise CheckpointError(
            f"{name}: no such file{' in the cache' if fault else ''}", f"there are: {listed(files)}"
        )
    with explaining(name):
        downloaded: str = hub.hf_hub_download(
            name.repository,
            name.file,
            revision=name.revision,
            local_files_only=fault is not None,
            tqdm_class=progress_bar(lambda done, total: observer.load(str(name), done, total)),
        )
    path = Path(downloaded)
    commit = path.parents[name.file.count("/")].name
    sha256 = checked_sha256(path)
    return HubFile(
        path,
        name,
        {**name._asdict(), "commit": commit, "sha256": sha256},
        (
            *([f"{fault}: what is in the cache is used"] if fault else ()),
            f"{name}: commit {commit}",
            f"{name}: SHA-256 of the file {sha256}",
        ),
    )


def list_files(hub: Any, name: HubName) -> tuple[set[str], str | None]:
    """List the files of a revision.

    Returns None beside them if they are those on the hub. If they are those in the cache: why the
    hub could not be asked, or "" where it need not be.
    """
    cached = cached_files(hub, name)
    if COMMIT.fullmatch(name.revision) and name.file in cached:
        return cached, ""
    try:
        with explaining(name):
            info = hub.HfApi().model_info(name.repository, revision=name.revision, timeout=TIMEOUT)
            return {s.rfilename for s in info.siblings if is_relative(s.rfilename)}, None
    except CheckpointError as error:
        if not cached:
            raise
        return cached, str(error)


def cached_files(hub: Any, name: HubName) -> set[str]:
    """List the files of a revision that are in the cache of huggingface_hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = hub.scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return set()
    return {
        file.file_path.relative_to(revision.snapshot_path).as_posix()
        for repository in repositories
        if (repository.repo_type, repository.repo_id) == ("model", name.repository)
        for revision in repository.revisions
        if name.revision in (revision.commit_hash, *revision.refs)
        for file in revision.files
    }


def choose_file(name: HubName, files: Collection[str]) -> str:
    """Return the only .safetensors file, else the only other file of weights.

    Raises CheckpointError if there is none, or if there are several.
    """
    safe = [file for file in files if file.lower().endswith(SAFE)]
    others = [file for file in files if file.lower().endswith(OTHERS)]
    if len(found := safe or others) == 1:
        return found[0]
    if not found:
        raise CheckpointError(
            f"{name}: holds no file of weights ({', '.join((SAFE, *OTHERS))})",
            f"name one of its files: {listed(files)}" if files else "needed: another repository",
        )
    raise CheckpointError(
        f"{name}: holds {len(safe + others)} files of weights: {listed(safe + others)}",
        f"choose one: {clip(str(name._replace(file=min(found))), 300)}",
    )


def listed(files: Collection[str]) -> str:
    """Return names of files, the first ones of many."""
    return first_of([clip(file, 80) for file in sorted(files)[: SHOWN + 1]], SHOWN)


def checked_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file in the cache, which names large files by it.

    Raises CheckpointError if the file is not what its name says.
    """
    with open_regular(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # it has readinto
    blob = Path(os.readlink(path)).name if path.is_symlink() else ""
    if SHA256.fullmatch(blob) and blob != sha256:
        raise CheckpointError(
            f"{path}: damaged, its SHA-256 is not that on the hub", f"remove {path.resolve()}"
        )
    return sha256


def progress_bar(report: Callable[[int, int], None]) -> type:
    """Make a class of silent progress bars for huggingface_hub, which report bytes done and all."""
    from tqdm.std import tqdm

    class SilentBar(tqdm):  # type: ignore[misc]  # which has no types
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            report(int(self.n), int(self.total or 0))

        def update_transfer(self, n: float) -> None:
            """Ignore the bytes on the wire, which it counts beside those of the file."""

    return SilentBar


@contextmanager
def explaining(name: HubName) -> Iterator[None]:
    """Turn what huggingface_hub raises into errors with a hint."""
    try:
        yield
    except AbsldError:
        raise
    except Exception as error:  # also those of its HTTP client, which depends on its version
        raise explain(error, name) from error


def explain(error: Exception, name: HubName) -> AbsldError:
    """Return the error that says why a file cannot be fetched. It quotes no answer and no token."""
    from huggingface_hub import constants, errors

    host = urlsplit(constants.ENDPOINT).hostname
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{name}: not a name of a repository", "needed: hf:owner/name")
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{name}: its owner must grant access", f"ask for it there; {LOG_IN}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{name}: no such repository on {host}, or a private one",
            f"check the name; for a private one {LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{name}: no revision {name.revision!r}", "needed: a branch, a tag or a whole commit"
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{name}: HF_HUB_OFFLINE is set",
            "it is not in the cache: unset that once, or copy the cache of another machine (HF_HOME)",
        )
    if status in (401, 403):
        return CheckpointError(f"{name}: {host} refuses access", f"a token that may read: {LOG_IN}")
    if status is not None:
        return CheckpointError(f"{name}: {host} answers {status}", "try again later")
    if isinstance(error, OSError) and (error.filename or error.errno in DISK):
        return CheckpointError(
            f"{name}: {error.filename or constants.HF_HUB_CACHE}: {error.strerror}",
            "make it writable, or free space there, or set HF_HOME to another folder",
        )
    return CheckpointError(
        f"{name}: {host} cannot be reached, or the answer was cut short ({type(error).__name__})",
        "check the connection and HF_ENDPOINT, and try again",
    )
