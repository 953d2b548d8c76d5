"""Import of user code by name, `package.module:name`, and of the packages of extras.

A name of code counts where the user types it. Names in a run's files or in checkpoints are never
imported.
"""

import importlib
import os
import re
import sys
from typing import Any
from urllib.parse import unquote

from absld.errors import Stopped, UsageError

HUB = "hf:"  # begins the name of a repository on the Hugging Face Hub
HUB_TARGET = re.compile(
    r"hf:(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@\s]+|[^/@\s]+))?(?:/(?P<inside>.+))?",
    re.ASCII,
)
REGISTRIES = ("timm:", "torchvision:")
"""Beginnings of the names of networks that are looked up in a library, not imported."""


def names_code(text: str) -> bool:
    """Return whether a text is the name of code, `package.module:name`."""
    return not text.startswith(REGISTRIES) and re.fullmatch(r"[\w.]+:\w+", text) is not None


def split_hub_target(target: str) -> tuple[str, str, str] | None:
    """Return repository, revision and what is named in it of hf:owner/name[@revision][/inside].

    "" for what is not there; a slash in a revision is %2F. None for anything else.
    """
    match = HUB_TARGET.fullmatch(target)
    if not match:
        return None
    return match["repository"], unquote(match["revision"] or ""), match["inside"] or ""


def import_extra(package: str, extra: str, user: str) -> Any:
    """Import a package of an extra. Raises UsageError, which names its `user`, if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{user} needs the package {package}: {error}", f"pip install 'absld[{extra}]'"
        ) from error


def import_object(spec: str) -> Any:
    """Import `package.module:name`, also from the current folder, as `python -m` does.

    Raises:
        UsageError: for any error in the imported code.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), name)
    except Stopped:
        raise
    except (Exception, SystemExit) as error:
        hint = "needed: package.module:name"
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(
            f"{error.name}."
        ):
            hint += f"; looked for in {os.getcwd()} and the installed packages"
        raise UsageError(f"{spec}: {type(error).__name__}: {error}", hint) from error
