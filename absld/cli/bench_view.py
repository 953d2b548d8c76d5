"""The view of a bench: tables of 80 columns, and progress with the time left."""

from collections.abc import Mapping
from typing import Any

from absld.bench.bench import Bench, Progress
from absld.bench.contenders import PARTS, BenchConfig
from absld.cli.view import View
from absld.text import time_text

HEAD = f"{'step':26} {'images/s':>8} {'gain':>20} {'times file':>10} {'reached':>8}"
COST_HEAD = (
    f"{'step':26} {'type':4} {'teacher':>7} {'attack':>6} {'train':>6} {'GFLOP/s':>7} "
    f"{'matmul':>6} {'conv':>4} {'MiB':>5}"
)
LEGEND = """\
gain: speed relative to the fastest step above, and of the first engine and the
last row to absld_min.py. What gains less than 1.02 (-) is left out below.
times file: speed relative to absld_min.py, a product of gains.
reached: gain in objective relative to that of the plain attack, which reaches
{:.3%} to {:.3%} from other random starts."""
COST_LEGEND = """\
type: of the numbers in the attack. teacher, attack, train: seconds.
GFLOP/s: operations as counted by torch. matmul, conv: share of the peak
throughput of a matrix product and of a 3x3 convolution, in the same type.
MiB: memory of a step.
"""


class BenchView(View):
    """A row of each table when it is measured."""

    def measure(self, config: BenchConfig) -> dict[str, Any]:
        """Run a bench, print its tables, and return its results."""
        bench = Bench(config, self.bench_progress)
        side, about = config.image_size, bench.results["environment"]
        self.line(f"{config.student}, teacher {config.teacher_model}")
        self.line(f"{config.batch_size} images of {side}x{side} a step")
        self.line(f"{about['device']} {about.get('instructions', '')}".rstrip())
        self.line("")
        self.line(HEAD)
        for row in bench.rows():
            self.line(row_line(row))
        for text in summary(bench.results):
            self.line(text)
        return bench.results

    def bench_progress(self, report: Progress) -> None:
        left = f"{time_text(report.seconds_left)} left"
        title = f"{report.row} {report.done}/{report.total}"
        self.progress(title, report.done, report.total, left, end=False)


def row_line(row: Mapping[str, Any]) -> str:
    """Return the speed of a row of `Bench.rows`, or why it was not measured."""
    if row["note"]:
        return f"{row['name']:26} {row['note']}"
    gain = reached = ""
    if row["compared_with"]:
        gain = "{median:.2f} ({least:.2f} to {greatest:.2f})".format(**row["gain"])
        gain, reached = gain + ("" if row["kept"] else "-"), f"{row['objective']:.2%}"
    return (
        f"{row['name']:26} {row['images_per_second']['median']:8.1f} "
        f"{gain:>20} {row['times_file']:10.2f} {reached:>8}"
    ).rstrip()


def cost_line(row: Mapping[str, Any]) -> str:
    """Return the cost of a row of `Bench.rows` that was measured."""
    memory, shares, seconds = row["memory_bytes"], row["shares"], row["seconds"]
    teacher, attack, training = (seconds[part] for part in PARTS)
    return (
        f"{row['name']:26} {row['peak_throughput']['precision']:4} "
        f"{teacher:7.3f} {attack:6.3f} {training:6.3f} {row['operations_per_second'] / 1e9:7.0f} "
        f"{shares['matmul']:6.0%} {shares['conv3x3']:4.0%} "
        f"{'-' if memory is None else format(memory / 2**20, '.0f'):>5}"
    )


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return what follows the rows: legends, costs, and the recommended command."""
    measured = [row for row in results["rows"] if not row["note"]]
    return [
        *LEGEND.format(*results["plain_attack"]).splitlines(),
        "",
        COST_HEAD,
        *map(cost_line, measured),
        *COST_LEGEND.splitlines(),
        "",
        f"recommended: {results['recommended']}",
    ]
