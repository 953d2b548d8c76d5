"""Settings of launchers: where the trainings of a comparison or a sweep run, and how many at a time.

They decide nothing that is computed. Imports no torch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from absld.config.fields import Settings, setting
from absld.config.files import parse_toml
from absld.config.parsing import did_you_mean, parse_all
from absld.errors import CheckpointError, UsageError
from absld.storage.opening import read_bytes
from absld.text import page_of

MOST_BYTES = 2**20
NO_SLURM = ("launcher", "jobs", "slurm")  # not settings of Slurm
TIME = r"(\d+)|(?:(\d+)-)?(\d+):(\d\d):(\d\d)"


@dataclass(frozen=True, kw_only=True)
class LauncherSettings(Settings):
    """The launcher and its settings; those from `partition` on are Slurm's, one job a training."""

    launcher: Literal["here", "local", "slurm"] = setting(
        "here",
        "Launcher",
        "where trainings run: here: in this process, one after the other; local: in processes on "
        "this machine; slurm: as jobs of Slurm",
    )
    jobs: int = setting(1, "Launcher", "local: number of trainings at a time", low=1.0)
    slurm: str = setting("", "Launcher", "TOML file of the settings below; flags override it")
    partition: str = setting("", "Launcher", "Slurm: partition [default: the cluster's]")
    account: str = setting("", "Launcher", "Slurm: account [default: yours]")
    qos: str = setting("", "Launcher", "Slurm: quality of service [default: yours]")
    constraint: str = setting("", "Launcher", "Slurm: features that a node must have, such as a100")
    time: str = setting(
        "60",
        "Launcher",
        "Slurm: time limit of a job: minutes, H:MM:SS or D-HH:MM:SS; a training that needs more is "
        "requeued and resumed",
    )
    notice: int = setting(
        90,
        "Launcher",
        "Slurm: seconds before the time limit at which a training saves its state and is requeued",
        low=10.0,
    )
    gpus: str = setting("0", "Launcher", "Slurm: GPUs of a job: 0, 1 or TYPE:1")
    cpus: int = setting(1, "Launcher", "Slurm: CPU cores of a job", low=1.0)
    memory: str = setting(
        "", "Launcher", "Slurm: memory of a job, such as 16G [default: the cluster's]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("partition", "account", "qos", "constraint"):
            # A line break would end the line of the batch script, and the rest would be run.
            if not getattr(self, name).isprintable():
                raise UsageError(
                    f"{name} has a control character: {getattr(self, name)!r}", "names are one line"
                )
        if not re.fullmatch(r"(\w[\w.-]*:)?1|0", self.gpus):
            raise UsageError(
                f"gpus takes 0, 1 or TYPE:1, not {self.gpus!r}",
                f"a training on several GPUs is an sbatch script: {page_of('cluster')}",
            )
        if self.memory and not re.fullmatch(r"\d+[KMGT]?", self.memory):
            raise UsageError(f"memory takes a size such as 16G, not {self.memory!r}", "16G, 500M")
        # Slurm may send the signal a minute early, and a minute is to be left for training.
        if self.minutes() * 60 < self.notice + 120:
            raise UsageError(
                f"a time of {self.time} leaves no time beside a notice of {self.notice} seconds",
                "a time at least two minutes longer than --notice",
            )

    def minutes(self) -> int:
        """Return the time limit in whole minutes, at least one. Raises UsageError."""
        parts = re.fullmatch(TIME, self.time)
        if not parts:
            raise UsageError(
                f"time takes minutes, H:MM:SS or D-HH:MM:SS, not {self.time!r}", "90, or 1:30:00"
            )
        whole, days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return max(1, whole + days * 1440 + hours * 60 + minutes + bool(seconds))


NAMES = [f.name for f in fields(LauncherSettings)]


def launcher_settings(flags: Mapping[str, Any]) -> LauncherSettings:
    """Complete the settings of a launcher: defaults, the file `--slurm`, flags.

    Raises UsageError, also for flags of another launcher.
    """
    launcher = flags.get("launcher", "here")
    of_others = {name for name in NAMES if name not in NO_SLURM} if launcher != "slurm" else set()
    of_others |= {"slurm"} if launcher != "slurm" else set()
    of_others |= {"jobs"} if launcher != "local" else set()
    if wrong := sorted(of_others & flags.keys()):
        flag = "local" if "jobs" in wrong else "slurm"
        raise UsageError(
            f"--{wrong[0]} is not a setting of --launcher {launcher}", f"--launcher {flag}"
        )
    from_file = read_slurm_settings(flags["slurm"]) if flags.get("slurm") else {}
    return LauncherSettings(**parse_all(from_file | dict(flags), LauncherSettings))


def read_slurm_settings(path: str) -> dict[str, Any]:
    """Read a TOML file of Slurm settings. Raises UsageError."""
    try:
        text = read_bytes(Path(path), MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}", "needed: a TOML file") from error
    except CheckpointError as error:
        raise UsageError(str(error), error.hint) from error
    values = parse_toml(text, path)
    known = [name for name in NAMES if name not in NO_SLURM]
    for name in values:
        if name not in known:
            hint = did_you_mean(name, known)
            hint = hint if "mean" in hint else f"there are: {', '.join(known)}"
            raise UsageError(f"{path}: there is no Slurm setting {name!r}", hint)
    return {
        # 90 is a time, and 1 a number of GPUs.
        name: str(value) if name in ("time", "gpus") and type(value) is int else value
        for name, value in values.items()
    }
