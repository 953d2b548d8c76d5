"""The trials of the bench on top of `--engine auto`, and the command that it recommends."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from absld.config.settings import TrainConfig
from absld.engine.precision import computes_bf16
from absld.engine.techniques import Techniques, can_compile, choose_techniques


class Trial(NamedTuple):
    """Techniques to try on top of those that are kept, and why this device cannot, if so."""

    name: str
    techniques: dict[str, Any]
    missing: str = ""


def trials(device: torch.device) -> list[Trial]:
    """List what is tried on top of `--engine auto`, in this order."""
    engines = {
        engine: asdict(choose_techniques(TrainConfig(engine=engine), device))
        for engine in ("auto", "plain", "fast")
    }
    same = "the same as --engine auto" if engines["plain"] == engines["auto"] else ""
    no_bf16 = "" if computes_bf16(device) else "no bfloat16 instructions"
    no_compiler = "" if can_compile(device) else "torch.compile finds no compiler"
    return [
        Trial("--engine plain", engines["plain"], same),
        Trial("+ --fold-batch-norm", {"fold_batch_norm": True}),
        Trial("+ --channels-last", {"channels_last": True}),
        Trial("+ --teacher-precision bf16", {"teacher_precision": "bf16"}, no_bf16),
        Trial("+ --attack-precision bf16", {"attack_precision": "bf16"}, no_bf16),
        Trial("+ --precision bf16", {"precision": "bf16"}, no_bf16),
        Trial("+ --compile", {"compile": True}, no_compiler),
        Trial("--engine fast", engines["fast"]),
    ]


def recommended_command(techniques: Techniques, device: torch.device) -> str:
    """Return the command that trains with these techniques, by the engine with the fewest flags."""
    commands = []
    for engine in ("auto", "fast", "plain"):
        given: dict[str, Any] = {}
        for name, value in asdict(techniques).items():
            chosen = choose_techniques(TrainConfig(engine=engine, **given), device)
            if getattr(chosen, name) != value:
                given[name] = value
        flags = [flag(name, value) for name, value in given.items()]
        commands.append(" ".join([f"absld train --engine {engine}", *flags]))
    return min(commands, key=lambda command: command.count(" --"))


def flag(name: str, value: object) -> str:
    """Return a flag of `absld train` with its value."""
    name = name.replace("_", "-")
    return f"--{'no-' if value is False else ''}{name}" + (
        "" if isinstance(value, bool) else f" {value}"
    )
