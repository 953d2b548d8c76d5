"""Methods by name, or by package.module:Class."""

from absld.config.imports import import_object
from absld.config.settings import TrainConfig
from absld.errors import UsageError
from absld.methods.absld import Absld, Rslad
from absld.methods.base import Family, Method
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
    """Return the method of a name, or of package.module:Class. Raises UsageError."""
    if name in METHODS:
        return METHODS[name]
    method = import_object(name)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"{name} is not a method", "needed: a subclass of absld.methods.Method")
    return method


def family_of(name: str) -> Family:
    """Return the family of a method; package.module:Class, which is not imported, is of others."""
    return METHODS[name].family if name in METHODS else Method.family


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """Build the method that `config` names, in its initial state. Raises UsageError."""
    return method_class(config.method)(config, num_classes)
