"""The environment of a run: command, versions, device, commit; and environment.json."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from absld.storage.json_files import read_json
from absld.text import printable

PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy")
SESSIONS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "inputs": {"type": "object", "additionalProperties": {"type": "string"}},
            "teacher_sha256": {"type": "string"},
            "class_counts": {
                "type": "object",
                "additionalProperties": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                },
            },
        },
    },
}


def environment(device: torch.device) -> dict[str, object]:
    """Return the environment as plain values, for environment.json."""
    return {
        "command": printable(shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "absld": version("absld"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "system": platform.platform(),
        **describe_device(device),
        "threads": torch.get_num_threads(),
    }


def describe_device(device: torch.device) -> dict[str, object]:
    """Return what the speed and the last digits depend on: the GPU, its libraries, or the CPU."""
    if device.type != "cuda":
        return {
            "device": f"{device} ({platform.machine()})",
            "instructions": torch.backends.cpu.get_cpu_capability(),
        }
    gpu = torch.cuda.get_device_properties(device)
    return {
        "device": f"{device} ({gpu.name})",
        "capability": f"{gpu.major}.{gpu.minor}",
        "memory_mib": gpu.total_memory // 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """Return the commit of the package's own checkout, with "+" if files differ; None without."""
    commands = (
        # A package that is installed inside another repository is not part of it.
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--", "."],
    )
    try:
        _, head, changes = (
            subprocess.check_output(
                ["git", "-C", str(package), *command],
                stderr=subprocess.DEVNULL,
                text=True,
                timeout=10,
            ).strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """Read environment.json: an entry for each time that the run was started or resumed."""
    path = folder / "environment.json"
    if not path.exists() and not (folder / "config.toml").exists():
        return []
    sessions: list[dict[str, Any]] = read_json(path, SESSIONS)
    return sessions
