"""`absld sweep`: points and seeds from flags to files; what is said before and after."""

import csv
import json
import re
import statistics
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from helpers.program import QUICK, main, refused, use_few_digits

import absld
from absld.report import sweep_tables
from absld.report.frontier_plot import plot_frontier
from absld.report.summary import number
from absld.runs.forecast import forecast
from absld.runs.grid import frontier
from absld.runs.jobs import Job

OVER = ["--over", "temperature_rate=0.05,0.1", "adv_weight=5/6", "--seeds", "2"]
FLAGS = [*QUICK, "--attacks", "fgsm", "--no-checks"]
pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The folder of the results of a sweep of two points and two seeds, and what was printed."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch, (folder / "printed").open("w") as printed:
        use_few_digits(patch)
        patch.setattr("sys.stdout", printed)
        assert main("sweep", *OVER, *FLAGS, "--out", folder / "runs") == 0
    return next(folder.glob("runs/sweep-*")), (folder / "printed").read_text()


def results_of(swept):
    return json.loads((swept[0] / "sweep.json").read_text())


def test_every_point_is_trained_with_every_seed_and_evaluated_on_the_validation_images(swept):
    results = results_of(swept)
    assert results["data"]["split"] == "validation" and results["schema"] == "absld-sweep-1"
    assert results["sweep"]["over"] == {"temperature_rate": [0.05, 0.1], "adv_weight": [5 / 6]}
    points = {tuple(m["settings"].values()): m for m in results["methods"]}
    assert list(points) == [(0.05, 5 / 6), (0.1, 5 / 6)]
    assert results["baseline"] == "temperature_rate=0.1 adv_weight=5/6"
    assert "evaluated on the validation images" in results["notes"][0]
    for point in points.values():
        assert point["seeds"] == [0, 1] and len(set(point["runs"])) == 2
        assert (point["differences"] is None) == (point is points[0.1, 5 / 6])
    assert not any("is not the same" in note for note in results["notes"])


def test_finished_runs_are_used_again_and_the_trainings_to_come_are_said_first(
    swept, monkeypatch, capfd
):
    assert swept[1].startswith("4 trainings and 2 of teachers; their time can be estimated after")
    monkeypatch.setattr("absld.runs.training_run.train", lambda *a, **k: pytest.fail("trained"))
    runs = swept[0].parent
    assert main("sweep", *OVER[:-1], "1", *FLAGS, "--out", runs, "--json") == 0
    printed = capfd.readouterr()
    assert printed.err.startswith("2 trainings and 1 of teachers, 3 of them finished\n")
    assert [m["seeds"] for m in json.loads(printed.out)["methods"]] == [[0]] * 2


@pytest.mark.parametrize(("split", "warning"), [("test", "optimistic"), ("train", "lower")])
def test_a_sweep_on_other_images_says_what_its_figures_are(swept, split, warning, capfd):
    given = [*OVER[:2], "--split", split, *FLAGS, "--out", swept[0].parent, "--json"]
    assert main("sweep", *given) == 0
    results = json.loads(capfd.readouterr().out)
    assert results["data"]["split"] == split and warning in results["notes"][0]


@pytest.mark.parametrize(
    "words",
    [
        ["--over", "adv_weight=0.5", "start=normal", "--seeds", "x"],
        ["--over=adv_weight=0.5", "start=normal", "--seeds", "x"],
        ["--over", "adv_weight=0.5", "--seeds", "x", "--over", "start=normal"],
    ],
)
def test_over_takes_several_settings_and_may_be_repeated(words, capfd):
    refused(capfd, 2, "seeds takes whole numbers, not 'x'", "", "sweep", *words)
    wrong = [word.replace("start=normal", "strt=normal") for word in words]
    refused(capfd, 2, "there is no setting 'strt'", "'start'", "sweep", *wrong)


def test_a_word_before_over_is_refused(capfd):
    refused(capfd, 2, "unexpected extra argument", "--help", "sweep", "adv_weight=0.5")


# --- Tables and the picture ---


def a_sweep(*points, over=("temperature_rate", "temperature_lower"), seeds=3):
    """The results of a sweep whose points have these averages and worst classes; the first is the
    base, the last is beyond its intervals."""
    methods = []
    for k, (average, worst, on_it) in enumerate(points):
        means = {"robust_average": average, "robust_worst": worst, "clean_average": 0.9}
        figures = {
            name: {"mean": mean, "std": 0.0123 if seeds > 1 else None, "values": [mean] * seeds}
            for name, mean in means.items()
        }
        figures |= dict.fromkeys(sweep_tables.MORE, figures["clean_average"])
        interval = [-0.345, -0.123] if k == len(points) - 1 else [-0.1, 0.1]
        ends = {"over_seeds": interval, "over_images": interval}
        change = {name: {"mean": means[name] - points[0][i], **ends} for i, name in enumerate(AXES)}
        settings = {name: 0.25 / (k + 1) for name in over}
        methods.append(
            {
                "name": f"point {k}",
                "settings": settings,
                "frontier": on_it,
                "seeds": list(range(seeds)),
                "warnings": [],
                "figures": figures,
                "differences": change if k else None,
            }
        )
    return {
        "sweep": {"over": {name: [0.25, 0.125] for name in over}},
        "baseline": "point 0",
        "methods": methods,
        "notes": ["x " * 60],
        "data": {"dataset": "digits", "images": 40, "of": 40, "split": "validation",
                 "classes": ["a", "b"]},
        "settings": {"epsilon": 0.1, "norm": "linf", "attacks": ["clean", "pgd20"]},
    }  # fmt: skip


AXES = list(sweep_tables.AXES)
SOME = a_sweep((0.7, 0.4, True), (0.6, 0.5, True), (0.5, 0.1, False))


def test_terminal_lines_of_two_settings_fit_80_columns():
    lines = sweep_tables.terminal_lines(SOME)
    assert max(map(len, lines)) <= 80
    first, last = (next(x for x in lines if x.startswith(start)) for start in ("*1 ", " 3 "))
    assert first.split() == ["*1", "0.25", "0.25", "70.0±1.2", "40.0±1.2", "base", "base"]
    changes = [number(value, sign="+") for value in (-0.2, -0.3)]
    assert last.split()[5:] == [changes[0], "worse", changes[1], "worse"]


def test_the_csv_of_points_reads_back():
    rows = list(csv.DictReader(sweep_tables.points_csv(SOME).splitlines()))
    assert [row["frontier"] for row in rows] == ["True", "True", "False"]
    assert [row["base"] for row in rows] == ["True", "False", "False"]
    for row, method in zip(rows, SOME["methods"], strict=True):
        assert float(row["temperature_rate"]) == method["settings"]["temperature_rate"]
        assert float(row["robust_worst_mean"]) == method["figures"]["robust_worst"]["mean"]
    assert [row["robust_worst_verdict"] for row in rows] == ["", "no clear difference", "worse"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_point_is_in_the_picture_once(count, monkeypatch):
    from matplotlib.axes import Axes

    numbers = []
    annotate = Axes.annotate

    def noted(self, text, place, *given, **settings):
        numbers.append((text, place))
        return annotate(self, text, place, *given, **settings)

    monkeypatch.setattr(Axes, "annotate", noted)
    over = ("temperature_rate", "adv_weight", "flip")[:count]
    points = [(0.7, 0.4, True), (0.6, 0.5, True), (0.5, 0.1, False)]
    plot_frontier(a_sweep(*points, over=over, seeds=count), Path("frontier.png"))
    assert Path("frontier.png").read_bytes().startswith(b"\x89PNG")
    expected = [(str(k), (100 * x, 100 * y)) for k, (x, y, _) in enumerate(points, 1)]
    assert numbers == expected


def test_the_files_have_the_figures_of_all_runs(swept):
    results = results_of(swept)
    runs = list(csv.DictReader((swept[0] / "runs.csv").read_text().splitlines()))
    for method in results["methods"]:
        values = [float(r["robust_average"]) for r in runs if r["method"] == method["name"]][:2]
        assert statistics.fmean(values) == pytest.approx(
            method["figures"]["robust_average"]["mean"]
        )
    table = (swept[0] / "table.md").read_text()
    assert table.count("\n| \\*") == sum(m["frontier"] for m in results["methods"])
    assert (swept[0] / "frontier.png").exists()


# --- The forecast ---


def job(*seconds, epochs=4, status="finished"):
    run = SimpleNamespace(
        exists=lambda: bool(status),
        status=lambda: status,
        records=lambda: [{"seconds": value} for value in seconds],
    )
    return Mock(spec=Job, run=run, epochs=epochs)


@pytest.mark.parametrize(
    ("at_a_time", "text"),
    [(1, "about 0:30 left"), (2, "about 0:15 left"), (None, "about 0:30 of computing left")],
)
def test_the_time_is_that_of_finished_epochs_for_those_to_come(at_a_time, text):
    jobs = [job(2.0, 4.0, epochs=2), job(9.0, status="running"), job(status="", epochs=6)]
    said = forecast(jobs, 2, at_a_time)
    assert said.startswith("2 trainings and 1 of teachers, 1 of them finished; ") and text in said


# --- docs/sweeps.md ---


@pytest.mark.slow
def test_the_program_with_optuna_runs_and_both_find_the_same_frontier():
    """The program of the page, of fewer epochs and trials."""
    pytest.importorskip("optuna")
    page = (Path(absld.__file__).parents[1] / "docs/sweeps.md").read_text()
    (code,) = re.findall(r"```python title=\"search.py\"\n(.*?)```", page, re.DOTALL)
    assert '"epochs": 12' in code and "n_trials=6" in code
    names = {}
    exec(code.replace('"epochs": 12', '"epochs": 4').replace("n_trials=6", "n_trials=3"), names)
    trials = names["study"].trials
    found = frontier([tuple(trial.values) for trial in trials])
    best = {trial.number for trial in names["study"].best_trials}
    assert best == {trial.number for trial, on_it in zip(trials, found, strict=True) if on_it}
    assert len({tuple(trial.values) for trial in trials}) > 1
