"""The record of a run, settings and sessions, and its identity, which names its directory."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from absld.config.files import read_run_config, read_techniques, to_toml
from absld.config.settings import Config, TrainConfig
from absld.data.dataset import Splits
from absld.engine.distributed import Distributed
from absld.engine.techniques import NAMES, NEUTRAL, Techniques, choose_techniques
from absld.errors import CheckpointError, UsageError
from absld.storage.environment import environment
from absld.storage.files import digest, key_of
from absld.storage.run_directory import ReadOnlyRunDirectory, RunDirectory
from absld.storage.training_checkpoint import compare_settings

# Settings that say where things are, not what is computed; a given teacher counts by its weights.
PLACES = {"out", "data", "device", "teacher", "allow_weak_teacher", "logit_cache_gib"}


class RunRecord:
    """config.toml and environment.json of a run, with one session more each time it is resumed."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        techniques: Techniques,
        device: torch.device,
        inputs: Mapping[str, str],
        distributed: Distributed,
    ) -> None:
        self.run = run
        session = environment(device) | {"processes": distributed.world_size, "inputs": inputs}
        self.sessions = [*read_sessions(run.path), session]
        self.write()
        run.write(
            "config.toml", to_toml(config, asdict(techniques))
        )  # last: a folder that has it has both

    def write(self) -> None:
        self.run.write("environment.json", json.dumps(self.sessions, indent=1) + "\n")

    def add_teacher(self, teacher: nn.Module) -> str:
        """Record the digest of the teacher's weights, and return it."""
        sha = digest(teacher.state_dict())
        self.sessions[-1]["teacher_sha256"] = sha
        self.write()
        return sha


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Read environment.json: an entry for each time that the run was started or resumed."""
    path = folder / "environment.json"
    sessions: list[dict[str, Any]] = []
    if path.exists():
        try:
            sessions = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error})", "copy the run again from where it came from"
            ) from error
    return sessions


def deciding_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what is computed, without places."""
    skipped = PLACES | NEUTRAL
    return {name: value for name, value in asdict(config).items() if name not in skipped}


def techniques_of_run(config: TrainConfig, run: RunDirectory, device: torch.device) -> Techniques:
    """Return the techniques of a run: those of its engine on this device.

    A run that has begun, perhaps on another device, keeps the precision and all else that changes
    its numbers.
    """
    techniques = choose_techniques(config, device)
    path = run.path / "config.toml"
    begun = read_techniques(path) if path.exists() else {}
    kept = {name: value for name, value in begun.items() if name in NAMES and name not in NEUTRAL}
    return replace(techniques, **kept)


def image_digests(splits: Splits) -> dict[str, str]:
    return {f"{name}_images": part.digest() for name, part in splits._asdict().items()}


def run_directory(
    config: Config, kind: str, identity: Mapping[str, Any], distributed: Distributed
) -> RunDirectory:
    """Return the directory of a run, named by what people look for and a digest of its identity.

    Of several processes, only the main one writes to it.
    """
    short = re.sub(r"[^\w-]", "-", kind)  # package.module:Class is a method, too
    name = f"{config.dataset}-{short}-seed{config.seed}-{key_of(identity)}"
    path = Path(config.out) / name
    return RunDirectory(path) if distributed.is_main else ReadOnlyRunDirectory(path)


def check_resume(
    run: RunDirectory, config: Config, inputs: Mapping[str, str], resume: bool
) -> None:
    """Raise UsageError if the run exists and is not to be resumed, or the other way round."""
    if run.exists() and not resume:
        raise UsageError(
            f"{run.path} holds a run with these settings ({run.status()})",
            "--resume continues it, or shows its result; another --out starts anew",
        )
    if resume and not run.exists():
        raise nothing_to_resume(config, inputs)


def nothing_to_resume(config: Config, inputs: Mapping[str, str]) -> UsageError:
    """Build the error for a missing run, with the differences of the nearest one."""
    differences = {}
    for path in sorted(Path(config.out).glob("*/config.toml")):
        sessions = read_sessions(path.parent)
        if "-teacher-" not in path.parent.name and sessions:
            saved = deciding_settings(read_run_config(path)) | sessions[-1]["inputs"]
            current = {**deciding_settings(config), **inputs}
            differences[path.parent] = compare_settings(saved, current)
    if not differences:
        return UsageError(f"nothing to resume in {config.out}", "leave out --resume to start a run")
    nearest = min(differences, key=lambda path: len(differences[path]))
    return UsageError(
        f"no run with these settings in {config.out}; in {nearest} "
        f"{'; '.join(differences[nearest])}",
        "give the settings of that run, or leave out --resume to start a new one",
    )
