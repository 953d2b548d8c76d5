"""The record of a run, settings and sessions, and its identity, which names its directory."""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from absld.config.files import read_run_config, read_techniques, to_toml
from absld.config.settings import Config, TrainConfig, counting_settings
from absld.data.dataset import Splits
from absld.engine.distributed import Distributed
from absld.engine.techniques import NAMES, NEUTRAL, Techniques, choose_techniques
from absld.errors import AbsldError, UsageError
from absld.storage.environment import environment, read_sessions
from absld.storage.files import digest, key_of
from absld.storage.run_directory import ReadOnlyRunDirectory, RunDirectory
from absld.storage.training_checkpoint import compare_settings

# Settings that say where things are, not what is computed; weights count by their digests.
PLACES = {"out", "data", "device", "teacher", "allow_weak_teacher", "logit_cache_gib"}
PLACES |= {"class_order", "student_weights", "teacher_weights", "pretrained", "in_memory"}
PLACES |= {"image_column", "label_column", "track"}
# What the last digits depend on, and with the number of processes more: each has a part of a batch.
CONDITIONS = ("processes", "device", "instructions", "cuda", "cudnn", "torch", "threads")
SHOWN = 5  # differences to another run


class RunRecord:
    """config.toml and environment.json of a run, with one session more each time it is resumed."""

    def __init__(
        self,
        run: RunDirectory,
        config: Config,
        techniques: Techniques,
        session: Mapping[str, Any],
    ) -> None:
        self.run = run
        self.sessions = [*read_sessions(run.path), dict(session)]
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


def describe_session(
    device: torch.device, splits: Splits, inputs: Mapping[str, str], distributed: Distributed
) -> dict[str, Any]:
    """Describe what this process computes with and on, for environment.json."""
    return environment(device) | {
        "processes": distributed.world_size,
        "inputs": dict(inputs),
        "class_counts": splits.class_counts(),
    }


def changed_conditions(run: RunDirectory, session: Mapping[str, Any]) -> list[str]:
    """Describe in a line the conditions in which an unfinished run has been computed, if unlike."""
    if not run.exists() or run.status() == "finished":
        return []
    sessions = [*read_sessions(run.path), session]
    known = [name for name in CONDITIONS if name in session]
    values = {name: [str(s[name]) for s in sessions if name in s] for name in known}
    changes = [
        f"{name}: {', '.join(dict.fromkeys(before))}, now {now}"
        for name, (*before, now) in values.items()
        if {*before, now} != {now}
    ]
    if not changes:
        return []
    return [
        f"the conditions of this run have changed ({'; '.join(changes)}): its weights will not be "
        "those of a run without interruption"
    ]


def deciding_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that decide what is computed, without places."""
    skipped = PLACES | NEUTRAL
    return {k: value for k, value in counting_settings(config).items() if k not in skipped}


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

    Of several processes, only the main one writes to it. Raises UsageError if they do not all have
    the same identity, such as from a branch of a hub that moved meanwhile.
    """
    key = key_of(identity)
    number = int(key, 16)
    if distributed.all_reduce_max(number) != -distributed.all_reduce_max(-number):
        raise UsageError(
            "the processes do not have the same settings, images and networks",
            "give all the same files; for one on a hub a commit, hf:owner/name@COMMIT",
        )
    # package.module:Class is a method, too, and hf:owner/name a data set.
    dataset, short = (re.sub(r"[^\w-]", "-", name) for name in (config.dataset, kind))
    name = f"{dataset}-{short}-seed{config.seed}-{key}"
    out = Path(config.out)
    path = out / name
    return RunDirectory(path, out) if distributed.is_main else ReadOnlyRunDirectory(path)


def refuse_to_restart(run: RunDirectory) -> None:
    """Raise UsageError if the run exists."""
    if run.exists():
        raise UsageError(
            f"{run.path} holds a run with these settings ({run.status()})",
            "--resume continues it, or shows its result; another --out starts anew",
        )


def describe_new_run(run: RunDirectory, config: Config, inputs: Mapping[str, str]) -> list[str]:
    """Describe in a line that --resume begins a run, and how the nearest other one differs.

    config: with no technique left open. Empty if the run exists.
    """
    if run.exists():
        return []
    current = {**deciding_settings(config), **inputs}
    others = {}
    for path in sorted(Path(config.out).glob("*/config.toml")):
        with contextlib.suppress(AbsldError):  # another run, which need not be readable
            sessions = read_sessions(path.parent)
            if "-teacher-" not in path.parent.name and sessions:
                saved = deciding_settings(read_run_config(path)) | sessions[-1]["inputs"]
                others[path.parent] = compare_settings(saved, current)
    text = f"--resume: there is no run with these settings in {config.out}, so a new one begins"
    if others:
        nearest = min(others, key=lambda path: len(others[path]))
        differences = others[nearest]
        more = f"; {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        text += f"; in {nearest} {'; '.join(differences[:SHOWN])}{more}"
    return [text]
