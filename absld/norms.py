"""The norms in which a perturbation is bounded: their names, and their largest budgets."""

import math
from collections.abc import Mapping
from typing import Literal

Norm = Literal["linf", "l2"]
NORM_NAMES: Mapping[Norm, str] = {"linf": "L-infinity", "l2": "L2"}


def largest_epsilon(norm: Norm, pixels: int) -> float:
    """Return the radius from which a ball holds every image of this many numbers in [0,1]."""
    return 1.0 if norm == "linf" else math.sqrt(pixels)
