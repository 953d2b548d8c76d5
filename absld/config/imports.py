"""Import of user code by name: `package.module:name`.

Such a name counts where the user types it. Names in a run's files or in checkpoints are never
imported.
"""

import importlib
import os
import re
import sys
from typing import Any

from absld.errors import Stopped, UsageError

HUB = "hf:"  # begins the name of a repository on the Hugging Face Hub
REGISTRIES = ("timm:", "torchvision:")
"""Beginnings of the names of networks that are looked up in a library, not imported."""


def names_code(text: str) -> bool:
    """Return whether a text is the name of code, `package.module:name`."""
    return not text.startswith(REGISTRIES) and re.fullmatch(r"[\w.]+:\w+", text) is not None


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
        raise UsageError(
            f"{spec}: {type(error).__name__}: {error}", "needed: package.module:name"
        ) from error
