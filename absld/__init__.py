"""Anti-Bias Soft Label Distillation: small, robust image classifiers without weak classes.

The public names are loaded when they are first used: importing the package costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from absld.attack import TrainingAttack as TrainingAttack
    from absld.attack import frozen_eval as frozen_eval
    from absld.attack import kl as kl
    from absld.attack import pgd as pgd
    from absld.attack import project_linf as project_linf
    from absld.checkpoint import RunDirectory as RunDirectory
    from absld.checkpoint import digest as digest
    from absld.config import Config as Config
    from absld.config import TrainConfig as TrainConfig
    from absld.data import ImageSet as ImageSet
    from absld.errors import AbsldError as AbsldError
    from absld.errors import CheckpointError as CheckpointError
    from absld.errors import DataError as DataError
    from absld.errors import Interrupted as Interrupted
    from absld.errors import NonFiniteError as NonFiniteError
    from absld.errors import UsageError as UsageError
    from absld.evaluation import Evaluation as Evaluation
    from absld.evaluation import evaluate as evaluate
    from absld.evaluation import paired as paired
    from absld.loading import load_network as load_network
    from absld.loss import absld_loss as absld_loss
    from absld.loss import soft_label_kl as soft_label_kl
    from absld.metrics import fairness as fairness
    from absld.models import build_model as build_model
    from absld.sources import load_data as load_data
    from absld.temperature import ClassTemperature as ClassTemperature
    from absld.temperature import class_risk_sums as class_risk_sums
    from absld.temperature import soften as soften
    from absld.temperature import update_temperature as update_temperature
    from absld.trainer import EpochReport as EpochReport
    from absld.trainer import fit as fit
    from absld.validation import validate as validate

__version__ = "0.2.0"

_HOMES = {
    "attack": ["TrainingAttack", "frozen_eval", "kl", "pgd", "project_linf"],
    "checkpoint": ["RunDirectory", "digest"],
    "config": ["Config", "TrainConfig"],
    "data": ["ImageSet"],
    "errors": [
        "AbsldError",
        "CheckpointError",
        "DataError",
        "Interrupted",
        "NonFiniteError",
        "UsageError",
    ],
    "evaluation": ["Evaluation", "evaluate", "paired"],
    "loading": ["load_network"],
    "loss": ["absld_loss", "soft_label_kl"],
    "metrics": ["fairness"],
    "models": ["build_model"],
    "sources": ["load_data"],
    "temperature": ["ClassTemperature", "class_risk_sums", "soften", "update_temperature"],
    "trainer": ["EpochReport", "fit"],
    "validation": ["validate"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'absld' has no attribute {name!r}")
    return getattr(importlib.import_module(f"absld.{_HOME[name]}"), name)
