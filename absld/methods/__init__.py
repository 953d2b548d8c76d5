"""Training methods: ABSLD and those it is compared with. Adding one: docs/contributing.md."""

from absld.methods.absld import Absld, Rslad
from absld.methods.base import Method, Step, taught
from absld.methods.baselines import AdaAd, Ard, Sat, Trades
from absld.methods.registry import METHODS, build_method, method_class
from absld.methods.reweighting import AbsldMargins, AbsldWeights, FairRslad

__all__ = [
    "METHODS",
    "Absld",
    "AbsldMargins",
    "AbsldWeights",
    "AdaAd",
    "Ard",
    "FairRslad",
    "Method",
    "Rslad",
    "Sat",
    "Step",
    "Trades",
    "build_method",
    "method_class",
    "taught",
]
