"""Settings as fields of frozen dataclasses: group, meaning, source and range of each."""

import math
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar

from absld.config.parsing import SEE_HELP, parse
from absld.config.recipes import OWN
from absld.errors import UsageError
from absld.norms import Norm, largest_epsilon
from absld.text import clip

T = TypeVar("T")
# Bounds of numbers without another one: torch computes with them.
MOST, MOST_INTEGER = 1e38, 2.0**31

# Groups of settings, in the order in which help and recipes list them.
GROUPS = ("Attacks", "Data", "Augmentation", "Network", "Networks", "Method", "Training",
          "Weight averaging", "Attack", "Speed", "Run", "Launcher")  # fmt: skip


def setting(
    default: T,
    group: str,
    meaning: str,
    source: str = OWN,
    *,
    low: float = 0.0,
    high: float | None = None,
) -> T:
    """Make a field of a settings class.

    Args:
        default: the value without a recipe, CIFAR-10's.
        group: one of GROUPS, a heading in the help.
        meaning: one line for the help and for recipes; "[default: ...]" ends it where the default
            depends on other settings.
        source: where the default comes from.
        low, high: bounds of a number; None: as high as torch can compute with.
    """
    if high is None:
        high = MOST if isinstance(default, float) else MOST_INTEGER
    metadata = {"group": group, "meaning": meaning, "source": source, "range": (low, high)}
    value: T = field(default=default, metadata=metadata)
    return value


def group_of(setting_field: "Field[Any]") -> str:
    """Return the group of a setting."""
    return str(setting_field.metadata["group"])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields made by `setting`. Raises UsageError for a value of another type or out of range."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = parse(f.name, getattr(self, f.name), type(self))
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)):
                    check_range(f.name, number, *self.bounds(f))
            object.__setattr__(self, f.name, value)  # 1 where a float is meant is 1.0

    def bounds(self, f: "Field[Any]") -> tuple[float, float]:
        """Return the range of a number; epsilon has an upper bound only in the L-infinity norm."""
        low, high = f.metadata["range"]
        other_norm = f.name == "epsilon" and getattr(self, "norm", "linf") != "linf"
        return low, MOST if other_norm else high


def check_epsilon(epsilon: float, norm: Norm, pixels: int) -> None:
    """Raise UsageError unless a budget is in the range of distances between images.

    pixels: numbers of an image, on which the largest distance in the L2 norm depends.
    """
    check_range("epsilon", epsilon, 0.0, largest_epsilon(norm, pixels))


def check_range(name: str, number: int | float, low: float, high: float) -> None:
    """Raise UsageError if a number is not in [low, high]."""
    if low <= number <= high:  # NaN is in no range
        return
    hint = SEE_HELP
    if name == "epsilon" and 1 < number <= 255:
        hint = f"pixels are in [0,1]; did you mean {number:g}/255?"
    bounded = high not in (MOST, MOST_INTEGER, math.inf) or number > high
    allowed = f"in [{low:g}, {high:g}]" if bounded else f"{low:g} or more"
    shown = f"{number:.12g}" if isinstance(number, float) else clip(str(number), 24)
    raise UsageError(f"{name} must be {allowed}, not {shown}", hint)


def check_start(start: float | str, lower: float, upper: float) -> None:
    """Raise UsageError unless class temperatures have a range, and start in it."""
    if lower > upper:
        raise UsageError(
            f"temperature_lower {lower:g} is above temperature_upper {upper:g}",
            "a smaller --temperature-lower",
        )
    if not isinstance(start, str) and not lower <= start <= upper:
        flag = "lower" if start < lower else "upper"
        raise UsageError(
            f"temperature_start must be in [{lower:g}, {upper:g}], the bounds of temperatures, "
            f"not {start:g}",
            f"another --temperature-start, or --temperature-{flag} {start:g}",
        )
