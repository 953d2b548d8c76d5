"""Methods by name, or by package.module:Class."""

from absld.config.imports import import_object
from absld.config.settings import TrainConfig
from absld.errors import UsageError
from absld.methods.absld import Absld, Rslad
from absld.methods.base import Method
from absld.methods.baselines import AdaAd, Ard, Sat, Trades
from absld.methods.reweighting import AbsldMargins, AbsldWeights, FairRslad

METHODS: dict[str, type[Method]] = {
    "absld": Absld,
    "absld-weights": AbsldWeights,
    "absld-margins": AbsldMargins,
    "rslad": Rslad,
    "fair-rslad": FairRslad,
    "ard": Ard,
    "adaad": AdaAd,
    "trades": Trades,
    "sat": Sat,
}


def method_class(name: str) -> type[Method]:
    """The method of a name, or of package.module:Class. Raises UsageError."""
    if name in METHODS:
        return METHODS[name]
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UsageError(
            f"{name} is no method", "needed: a class made of absld.methods.base.Method"
        )
    return found


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """The method that `config` names, at its start. Raises UsageError."""
    return method_class(config.method)(config, num_classes)
