"""Methods by name, or by package.module:Class."""

from absld.config.imports import import_object, names_code
from absld.config.settings import TrainConfig
from absld.errors import UsageError
from absld.methods.absld import Absld, Rslad
from absld.methods.balance import Bat
from absld.methods.base import Family, Method
from absld.methods.baselines import AdaAd, Ard, Iad, Mart, Sat, Trades
from absld.methods.class_distance import Dafa
from absld.methods.held_out import Frl, Wat
from absld.methods.margins import AbsldMargins, Cfa
from absld.methods.reweighting import AbsldWeights, FairRslad

METHODS: dict[str, type[Method]] = {
    "absld": Absld,
    "absld-weights": AbsldWeights,
    "absld-margins": AbsldMargins,
    "rslad": Rslad,
    "fair-rslad": FairRslad,
    "ard": Ard,
    "iad": Iad,
    "adaad": AdaAd,
    "trades": Trades,
    "cfa": Cfa,
    "dafa": Dafa,
    "sat": Sat,
    "wat": Wat,
    "frl": Frl,
    "mart": Mart,
    "bat": Bat,
}


def method_class(name: str) -> type[Method]:
    """Return the method of a name, or of package.module:Class. Raises UsageError."""
    if name in METHODS:
        return METHODS[name]
    method = import_object(name)
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise UsageError(f"{name} is not a method", "needed: a subclass of absld.methods.Method")
    return method


def fine_tunes(name: str) -> bool:
    """Return whether a method starts from a robust network; False for an unknown name."""
    return (name in METHODS or names_code(name)) and method_class(name).needs_robust_start


def family_of(name: str) -> Family:
    """Return the family of a method; package.module:Class, which is not imported, is of others."""
    return METHODS[name].family if name in METHODS else Method.family


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """Build the method that `config` names, in its initial state. Raises UsageError."""
    return method_class(config.method)(config, num_classes)
