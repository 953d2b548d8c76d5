"""Training methods: ABSLD and those it is compared with. Adding one: docs/contributing.md."""

from absld.methods.absld import Absld as Absld
from absld.methods.absld import Rslad as Rslad
from absld.methods.balance import Bat as Bat
from absld.methods.base import Method as Method
from absld.methods.base import Step as Step
from absld.methods.base import teacher_logits as teacher_logits
from absld.methods.baselines import AdaAd as AdaAd
from absld.methods.baselines import Ard as Ard
from absld.methods.baselines import Iad as Iad
from absld.methods.baselines import Mart as Mart
from absld.methods.baselines import Sat as Sat
from absld.methods.baselines import Trades as Trades
from absld.methods.class_distance import Dafa as Dafa
from absld.methods.margins import AbsldMargins as AbsldMargins
from absld.methods.margins import Cfa as Cfa
from absld.methods.registry import METHODS as METHODS
from absld.methods.registry import build_method as build_method
from absld.methods.registry import family_of as family_of
from absld.methods.registry import method_class as method_class
from absld.methods.reweighting import AbsldWeights as AbsldWeights
from absld.methods.reweighting import FairRslad as FairRslad
