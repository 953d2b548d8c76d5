"""The figures of a bench as lines of a table."""

from collections.abc import Mapping
from typing import Any

from absld.bench import PARTS

HEAD = (
    f"{'step':34} {'images/s':>20} {'times plain':>18} {'gain':>6}   "
    f"{'teacher':>8} {'attack':>8} {'train':>8}   {'GFLOP/s':>8} {'matmul':>7} {'conv':>6} "
    f"{'MiB':>7} {'objective':>9}"
)
GROWTH_HEAD = f"{'engine':34} {'images/s':>20} {'times first':>18}   bank"
LEGEND = """\
images/s: median (range); times plain: against absld_min.py's step of the same round; gain: of this
technique; teacher, attack, train: seconds; matmul, conv: share of what a matrix product and a 3x3
convolution reach here in the precision of the attack; MiB: taken by a step; objective: what the attack reaches,
per cent of the plain attack, whose own starts reach {least:.3%} to {greatest:.3%}. Techniques that
gain less than 2 % are left out of what follows."""


def row_line(figures: Mapping[str, Any]) -> str:
    """A row of `Bench.rows`."""
    seconds, rate = figures["seconds"], figures["operations_per_second"]
    gain = figures["gain"]
    gained = "" if gain is None else f"{gain['median']:.2f}" + ("" if figures["kept"] else " -")
    memory = figures["memory_bytes"]
    return (
        f"{figures['name']:34} {spread(figures['images_per_second'], 1):>20} "
        f"{spread(figures['ratio_to_plain'], 2):>18} {gained:6}   "
        + " ".join(f"{seconds[part]:8.3f}" for part in PARTS)
        + f"   {rate / 1e9:8.0f} {figures['shares']['matmul']:7.0%} "
        f"{figures['shares']['conv3x3']:6.0%} "
        f"{'-' if memory is None else format(memory / 2**20, '.0f'):>7} "
        f"{figures['objective']['share']:9.3%}"
    )


def growth_line(figures: Mapping[str, Any]) -> str:
    """A row of `Bench.growth`."""
    return (
        f"{figures['name']:34} {spread(figures['images_per_second'], 1):>20} "
        f"{spread(figures['ratio_to_first'], 2):>18}   {figures['bank_bytes'] / 2**20:,.1f} MiB"
    )


def spread(values: Mapping[str, float], digits: int) -> str:
    low, high = values["least"], values["greatest"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def legend(document: Mapping[str, Any]) -> str:
    """What the columns are, and the flags that pay here."""
    objective = document["rows"][0]["objective"]
    said = LEGEND.format(
        least=objective["least"],
        greatest=objective["greatest"],
    )
    kept = [row["settings"] for row in document["rows"] if row["kept"]]
    flags = flags_that_pay(kept[-1])
    return f"{said}\nhere: absld train {flags}" if flags else f"{said}\nhere: no flag pays"


def flags_that_pay(settings: Mapping[str, Any]) -> str:
    """The flags of `absld train` for these settings; a filled bank is used without one."""
    told = {name: value for name, value in settings.items() if name != "bank"}
    for part in ("teacher_precision", "attack_precision"):
        if told.get(part) == told.get("precision", "fp32"):
            told.pop(part, None)
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in told.items()
    )
