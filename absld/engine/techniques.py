"""The techniques that make a training step faster, as an engine chooses them for a device.

plain computes in IEEE float32 with nothing on. auto, on CUDA, computes what absld_min.py computes
there and keeps the GPU busy; elsewhere it is plain. fast adds all that the device has. A technique
changes nothing that is computed except for rounding: docs/performance.md says what each is worth.
"""

import importlib.util
import os
import shutil
import sysconfig
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from absld.config.settings import Precision, TrainConfig
from absld.engine.precision import computes_bf16
from absld.errors import UsageError

C = TypeVar("C", bound=TrainConfig)

NEUTRAL = {"cuda_graph", "check_every"}
"""Techniques without any effect on numbers: a run may be resumed with others."""


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """The settings of the same names, none of which is left open. The defaults: nothing on."""

    precision: Precision = "fp32"
    attack_precision: Precision = "fp32"
    teacher_precision: Precision = "fp32"
    fold_batch_norm: bool = False
    channels_last: bool = False
    compile: bool = False
    cuda_graph: bool = False
    check_every: int = 1


NAMES = [f.name for f in fields(Techniques)]


def choose_techniques(config: TrainConfig, device: torch.device) -> Techniques:
    """Return the techniques of the engine of `config` on a device; single settings override them.

    Raises UsageError for a technique that the device does not have.
    """
    for name in ("cuda_graph", "sync_batch_norm"):
        if getattr(config, name) and device.type != "cuda":
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} needs a CUDA device, not {device.type}", f"leave out {flag}")
    given = {name: getattr(config, name) for name in NAMES if getattr(config, name) is not None}
    chosen = engine_choice(config.engine, device) | given
    for part in ("attack_precision", "teacher_precision"):
        chosen.setdefault(part, chosen.get("precision", Techniques.precision))
    return Techniques(**chosen)


def engine_choice(engine: str, device: torch.device) -> dict[str, Any]:
    """Return what an engine switches on for a device."""
    chosen: dict[str, Any] = {}
    if engine != "plain" and device.type == "cuda":
        chosen = {"channels_last": True, "cuda_graph": True, "check_every": 50}
        if torch.cuda.get_device_capability(device) >= (8, 0):
            chosen["precision"] = "tf32"
    if engine == "fast":
        chosen |= {"fold_batch_norm": True, "channels_last": True}
        # On CUDA it gained little or lost (docs/results/h100.md), and takes half a minute.
        chosen["compile"] = device.type == "cpu" and can_compile(device)
        if computes_bf16(device):
            chosen["precision"] = "bf16"
    return chosen


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile finds what it needs for a device: compiler and headers."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    compiler = os.environ.get("CXX", "g++") if device.type == "cpu" else os.environ.get("CC", "gcc")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return device.type in ("cpu", "cuda") and bool(shutil.which(compiler)) and headers.exists()


def with_techniques(config: C, techniques: Techniques) -> C:
    """Return the settings with these techniques, so that none is left to the engine."""
    return replace(config, **asdict(techniques))


def describe(techniques: Techniques) -> str:
    """Describe the techniques in use, in words."""
    t = techniques
    described = {
        t.precision: True,
        f"attack {t.attack_precision}": t.attack_precision != t.precision,
        f"teacher {t.teacher_precision}": t.teacher_precision != t.precision,
        "folded batch norm": t.fold_batch_norm,
        "channels-last": t.channels_last,
        "torch.compile": t.compile,
        "CUDA graphs": t.cuda_graph,
        f"NaN check every {t.check_every} steps": t.check_every > 1,
    }
    return ", ".join(name for name, used in described.items() if used)
