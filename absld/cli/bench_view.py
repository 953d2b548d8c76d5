"""The view of a bench: tables of 80 columns."""

from collections.abc import Mapping
from typing import Any

from absld.bench.bench import Bench
from absld.bench.contenders import PARTS
from absld.cli.view import View
from absld.config.settings import TrainConfig

HEAD = f"{'step':24} {'images/s':>19} {'times plain':>19} {'gain':>6} {'reached':>8}"
COST_HEAD = (
    f"{'step':24} {'teacher':>7} {'attack':>7} {'train':>7} {'GFLOP/s':>8} "
    f"{'matmul':>7} {'conv':>5} {'MiB':>6}"
)
GROWTH_HEAD = f"{'engine':28} {'images/s':>19} {'times first':>19} {'cache':>10}"
LEGEND = """\
times plain: speed relative to the step of absld_min.py in the same round.
gain: of this technique; one below 1.02 (-) is left out of the rows that follow.
reached: objective of the attack relative to the plain attack, which reaches
{least:.3%} to {greatest:.3%} from other random starts."""
COST_LEGEND = """\
teacher, attack, train: seconds. GFLOP/s: operations as counted by torch.
matmul, conv: share of the peak throughput of a matrix product and of a 3x3
convolution, in the precision of the attack. MiB: memory of a step."""


class BenchView(View):
    """A row of each table when it is measured."""

    def measure(self, bench: Bench) -> dict[str, Any]:
        """Run a bench, print its tables, and return its results."""
        self.line(HEAD)
        for row in bench.rows():
            self.line(row_line(row))
        for text in [*summary(bench.results), GROWTH_HEAD]:
            self.line(text)
        for row in bench.growth():
            self.line(growth_line(row))
        return bench.results


def row_line(figures: Mapping[str, Any]) -> str:
    """Return the speed of a row of `Bench.rows`."""
    gain = ""
    if figures["gain"]:
        gain = f"{figures['gain']['median']:.2f}" + ("" if figures["kept"] else "-")
    return (
        f"{figures['name']:24} {spread(figures['images_per_second']):>19} "
        f"{spread(figures['ratio_to_plain'], 2):>19} {gain:>6} "
        f"{figures['objective']['share']:>8.2%}"
    )


def cost_line(figures: Mapping[str, Any]) -> str:
    """Return the cost of a row of `Bench.rows`."""
    memory, shares = figures["memory_bytes"], figures["shares"]
    seconds = " ".join(f"{figures['seconds'][part]:7.3f}" for part in PARTS)
    return (
        f"{figures['name']:24} {seconds} {figures['operations_per_second'] / 1e9:8.0f} "
        f"{shares['matmul']:7.0%} {shares['conv3x3']:5.0%} "
        f"{'-' if memory is None else format(memory / 2**20, '.0f'):>6}"
    )


def growth_line(figures: Mapping[str, Any]) -> str:
    """Return a row of `Bench.growth`."""
    return (
        f"{figures['name']:28} {spread(figures['images_per_second']):>19} "
        f"{spread(figures['ratio_to_first'], 2):>19} {figures['cache_bytes'] / 2**20:6,.1f} MiB"
    )


def spread(values: Mapping[str, float], digits: int | None = None) -> str:
    """Return a median and its range."""
    if digits is None:
        digits = 1 if values["greatest"] < 100 else 0
    low, high = values["least"], values["greatest"]
    return f"{values['median']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return what follows the rows: legends, costs, and the flags that make a step faster."""
    flags = flags_that_pay([row for row in results["rows"] if row["kept"]][-1]["settings"])
    return [
        LEGEND.format(**results["rows"][0]["objective"]),
        f"recommended: absld train {flags}"
        if flags
        else "no flag makes a step faster on this machine",
        "",
        COST_HEAD,
        *map(cost_line, results["rows"]),
        COST_LEGEND,
        "",
    ]


def flags_that_pay(settings: Mapping[str, Any]) -> str:
    """Return the flags of `absld train` for these settings; a filled cache needs none."""
    given = {name: value for name, value in settings.items() if name != "logit_cache"}
    for part in ("teacher_precision", "attack_precision"):
        if given.get(part) == given.get("precision", TrainConfig.precision):
            given.pop(part, None)
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in given.items()
    )
