"""The figures of a bench as tables of 80 columns."""

from collections.abc import Mapping
from typing import Any

from absld.bench.bench import PARTS
from absld.config.settings import TrainConfig

HEAD = f"{'step':24} {'images/s':>19} {'times plain':>19} {'gain':>6} {'reached':>8}"
COST_HEAD = (
    f"{'step':24} {'teacher':>7} {'attack':>7} {'train':>7} {'GFLOP/s':>8} "
    f"{'matmul':>7} {'conv':>5} {'MiB':>6}"
)
GROWTH_HEAD = f"{'engine':28} {'images/s':>19} {'times first':>19} {'bank':>10}"
LEGEND = """\
times plain: against absld_min.py's step of the same round; gain: of this
technique, left out of what follows where it is below 1.02 (-); reached: by the
attack, of the plain one's objective, which from other starts reaches
{least:.3%} to {greatest:.3%}."""
COST_LEGEND = """\
Seconds of the parts; operations by torch's count, and as a share of what a
matrix product and a 3x3 convolution reach here in the precision of the attack;
memory that a step takes."""


def row_line(figures: Mapping[str, Any]) -> str:
    """The speed of a row of `Bench.rows`."""
    gain = figures["gain"]
    gained = "" if gain is None else f"{gain['median']:.2f}" + ("" if figures["kept"] else "-")
    return (
        f"{figures['name']:24} {spread(figures['images_per_second']):>19} "
        f"{spread(figures['ratio_to_plain'], 2):>19} {gained:>6} "
        f"{figures['objective']['share']:>8.2%}"
    )


def cost_line(figures: Mapping[str, Any]) -> str:
    """What a row of `Bench.rows` costs."""
    memory, shares = figures["memory_bytes"], figures["shares"]
    seconds = " ".join(f"{figures['seconds'][part]:7.3f}" for part in PARTS)
    return (
        f"{figures['name']:24} {seconds} {figures['operations_per_second'] / 1e9:8.0f} "
        f"{shares['matmul']:7.0%} {shares['conv3x3']:5.0%} "
        f"{'-' if memory is None else format(memory / 2**20, '.0f'):>6}"
    )


def growth_line(figures: Mapping[str, Any]) -> str:
    """A row of `Bench.growth`."""
    return (
        f"{figures['name']:28} {spread(figures['images_per_second']):>19} "
        f"{spread(figures['ratio_to_first'], 2):>19} {figures['bank_bytes'] / 2**20:6,.1f} MiB"
    )


def spread(values: Mapping[str, float], digits: int | None = None) -> str:
    """Median and range."""
    if digits is None:
        digits = 1 if values["greatest"] < 100 else 0
    low, high = values["least"], values["greatest"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def summary(document: Mapping[str, Any]) -> list[str]:
    """What follows the rows: legends, their costs, and the flags that pay here."""
    flags = flags_that_pay([row for row in document["rows"] if row["kept"]][-1]["settings"])
    return [
        LEGEND.format(**document["rows"][0]["objective"]),
        f"here: absld train {flags}" if flags else "here: no flag pays",
        "",
        COST_HEAD,
        *map(cost_line, document["rows"]),
        COST_LEGEND,
        "",
    ]


def flags_that_pay(settings: Mapping[str, Any]) -> str:
    """The flags of `absld train` for these settings; a filled bank is used without one."""
    told = {name: value for name, value in settings.items() if name != "bank"}
    for part in ("teacher_precision", "attack_precision"):
        if told.get(part) == told.get("precision", TrainConfig.precision):
            told.pop(part, None)
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in told.items()
    )
