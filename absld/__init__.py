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
    from absld.config.settings import Config as Config
    from absld.config.settings import TrainConfig as TrainConfig
    from absld.data.dataset import ImageSet as ImageSet
    from absld.data.sources import load_data as load_data
    from absld.errors import AbsldError as AbsldError
    from absld.errors import CheckpointError as CheckpointError
    from absld.errors import DataError as DataError
    from absld.errors import Interrupted as Interrupted
    from absld.errors import NonFiniteError as NonFiniteError
    from absld.errors import UsageError as UsageError
    from absld.evaluation.evaluate import Evaluation as Evaluation
    from absld.evaluation.evaluate import evaluate as evaluate
    from absld.evaluation.evaluate import paired as paired
    from absld.evaluation.validation import validate as validate
    from absld.loss import absld_loss as absld_loss
    from absld.loss import soft_label_kl as soft_label_kl
    from absld.metrics import fairness as fairness
    from absld.models.architectures import build_model as build_model
    from absld.models.loading import load_network as load_network
    from absld.storage.checkpoint import RunDirectory as RunDirectory
    from absld.storage.checkpoint import digest as digest
    from absld.temperature import ClassTemperature as ClassTemperature
    from absld.temperature import class_risk_sums as class_risk_sums
    from absld.temperature import soften as soften
    from absld.temperature import update_temperature as update_temperature
    from absld.trainer import EpochReport as EpochReport
    from absld.trainer import fit as fit

__version__ = "0.2.0"

_HOMES = {
    "attack": ["TrainingAttack", "frozen_eval", "kl", "pgd", "project_linf"],
    "storage.checkpoint": ["RunDirectory", "digest"],
    "config.settings": ["Config", "TrainConfig"],
    "data.dataset": ["ImageSet"],
    "errors": [
        "AbsldError",
        "CheckpointError",
        "DataError",
        "Interrupted",
        "NonFiniteError",
        "UsageError",
    ],
    "evaluation.evaluate": ["Evaluation", "evaluate", "paired"],
    "models.loading": ["load_network"],
    "loss": ["absld_loss", "soft_label_kl"],
    "metrics": ["fairness"],
    "models.architectures": ["build_model"],
    "data.sources": ["load_data"],
    "temperature": ["ClassTemperature", "class_risk_sums", "soften", "update_temperature"],
    "trainer": ["EpochReport", "fit"],
    "evaluation.validation": ["validate"],
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'absld' has no attribute {name!r}")
    return getattr(importlib.import_module(f"absld.{_HOME[name]}"), name)
