"""What a run ran on, for its record: command, versions, device, commit."""

import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy")


def environment(device: torch.device) -> dict[str, object]:
    """Plain values, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "absld": version("absld"),
        "commit": commit(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "system": platform.platform(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The commit of the package's own checkout, "+" where it was changed since; None without."""
    answers = []
    questions = (
        # A package that is installed inside somebody else's repository is not in it.
        ["ls-files", "--error-unmatch", "__init__.py"],
        ["rev-parse", "HEAD"],
        ["status", "--porcelain", "--", "."],
    )
    for question in questions:
        try:
            answer = subprocess.run(
                ["git", "-C", str(package), *question], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if answer.returncode:
            return None
        answers.append(answer.stdout.strip())
    _, head, changes = answers
    return head + ("+" if changes else "")
