"""The time of a comparison before it: arithmetic against plain numbers, and that nothing changes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from helpers.program import QUICK, few_digits, main
from torch import nn

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.launcher_settings import LauncherSettings
from absld.config.resolve import resolve
from absld.data.dataset import pixels
from absld.evaluation.evaluate import evaluate
from absld.evaluation.sanity_checks import COST, run_checks
from absld.runs import estimate
from absld.runs.estimate import Cost, Training
from absld.runs.forecast import forecast
from absld.runs.jobs import Job

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")

TWO = ["--methods", "rslad,sat", *QUICK, "--attacks", "fgsm", "--no-checks"]
HERE = LauncherSettings()


def job(epochs, done=0, status="", needs=()):
    run = SimpleNamespace(
        exists=lambda: bool(status), status=lambda: status, records=lambda: [{}] * done
    )
    finished = status == "finished"
    return Mock(spec=Job, run=run, epochs=epochs, needs=needs, is_finished=lambda: finished)


# --- What is left ---


@pytest.fixture
def measured(monkeypatch):
    """Steps of 2 s, of a teacher 3 s, and passes of 0.5 s; the methods that were measured."""
    seen = []
    monkeypatch.setattr(
        estimate,
        "measure_student",
        lambda _, config, __: seen.append(config.method) or Cost(2.0, 0.5),
    )
    monkeypatch.setattr(
        estimate, "measure_teacher", lambda config, _: seen.append("teacher") or Cost(3.0, 0.5)
    )
    return seen


def test_the_time_is_that_of_steps_validation_test_and_evaluation(measured):
    """64 images in steps of 16, and 40 each to validate on, to test and to evaluate on."""
    settings = {"batch_size": 16, "epochs": 6, "teacher_epochs": 5}
    configs = [
        resolve(settings | {"method": method, "seed": seed})
        for seed in (0, 1)
        for method in ("rslad", "sat")
    ]
    teachers = [job(5, 5, "finished"), job(5)]
    students = [
        *[job(6, 6, "finished", (teachers[0],)), job(6, 4, "interrupted")],
        *[job(6, needs=(teachers[1],)), job(6)],
    ]
    evaluation = EvaluationConfig(attacks="clean,pgd6", checks=False)
    labels = ["rslad", "sat"] * 2
    left = [
        *estimate.trainings_left(labels, configs, [*teachers, *students], evaluation, few_digits())
    ]
    pgd20 = 40 * (20 + 2 / 3) * 0.5  # two forwards are two thirds of a pass
    epoch, own = 4 * 2.0 + pgd20, 40 * (1 / 3 + 6 / 2) * 0.5  # half of the images are attacked
    assert [each.name for each in left] == ["sat", "teacher", "rslad", "sat"]
    assert [each.seconds for each in left] == pytest.approx(
        [
            2 * epoch + pgd20 + own,  # two of six epochs are left
            5 * (4 * 3.0 + pgd20),
            6 * epoch + pgd20 + own,
            6 * epoch + pgd20 + own,
        ]
    )
    assert measured == ["sat", "teacher", "rslad"]  # each kind once


def test_the_evaluation_has_all_its_attacks_restarts_and_checks():
    images = few_digits()
    config = resolve({})

    def passes(**settings):
        return estimate.evaluation_passes(EvaluationConfig(**settings), config, images)

    assert passes(attacks="clean", checks=False) == pytest.approx(40 / 3)
    assert passes(attacks="pgd20,cw30", checks=False, restarts=2) == pytest.approx(
        40 * (1 / 3 + 50)
    )
    assert passes(attacks="autoattack", checks=False, examples=10) == pytest.approx(
        10 * (1 / 3 + 4500 / 2)
    )
    assert passes(attacks="clean") - passes(attacks="clean", checks=False) == pytest.approx(
        40 * COST
    )


def test_the_checks_cost_what_is_said():
    """Passes are counted: a forward whose gradient is taken is one, another one a third.

    The network is right on all images, and robust in a ball without radius: all are attacked.
    """
    images = few_digits().test
    counts = {True: 0, False: 0}

    class Counted(nn.Linear):
        def forward(self, x):
            counts[x.requires_grad] += len(x)
            return super().forward(x.flatten(1))

    network = Counted(192, 10, bias=False)
    x = pixels(images.rows(slice(None))).flatten(1)
    logits = 20.0 * nn.functional.one_hot(images.labels) - 9.0 * torch.rand(40, 10)
    network.weight.data = (torch.linalg.pinv(x) @ logits).T.contiguous()
    evaluation = evaluate(network, images, epsilon=0.0, attacks="clean")
    assert evaluation.robust.all()
    counts.update({True: 0, False: 0})
    list(run_checks(network, images, evaluation))
    of_half = 0.5 * (2 * 50 + 300 / 3)  # of the robust ones, half of which COST counts
    assert (counts[True] + counts[False] / 3) / len(images) == pytest.approx(
        COST + of_half, rel=0.2
    )


# --- When it is measured, and what is said ---


@pytest.mark.parametrize(
    ("launcher", "epochs", "status", "measures"),
    [
        (HERE, 500, "", True),
        (HERE, 400, "", False),  # too short
        (HERE, 500, "finished", False),  # its own time is known
        (HERE, 500, "running", True),
        (LauncherSettings(launcher="local"), 500, "", True),
        (LauncherSettings(launcher="slurm"), 500, "", False),
    ],
)
def test_a_large_comparison_is_measured_unasked(launcher, epochs, status, measures):
    config = resolve({"batch_size": 32, "device": "cpu"})
    jobs = [job(epochs, 0, status)]
    assert estimate.is_worthwhile(jobs, [config], few_digits(), launcher) == measures


def test_the_forecast_has_the_measured_time():
    jobs = [job(4), job(6)]
    assert "2 trainings; about 1:00 by a few steps" in forecast(jobs, 2, 2, 120.0)
    assert "after the first one, or by --estimate" in forecast(jobs, 2, 2)
    assert "after the first one, or by --estimate" in forecast(jobs, 2, None, 120.0)


def test_the_first_call_is_not_measured(monkeypatch):
    clock, taken = [0.0], iter([60.0, 0.3, 0.5, 0.4, 9.0])
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])

    def work():
        clock[0] += next(taken)

    assert estimate.seconds_of(work, torch.device("cpu")) == pytest.approx(
        0.3
    )  # a slow one is called twice
    taken = iter([0.1, 0.3, 0.2, 0.3, 9.0])
    assert estimate.seconds_of(work, torch.device("cpu")) == pytest.approx(0.3)


# --- The commands ---


def test_an_estimate_trains_nothing_and_draws_no_random_numbers(capfd):
    before = torch.get_rng_state()
    assert main("compare", *TWO, "--estimate", "--json") == 0
    assert torch.equal(torch.get_rng_state(), before) and not Path("runs").exists()
    results = json.loads(capfd.readouterr().out)
    assert results["schema"] == "absld-estimate-1" and results["at_a_time"] == 1
    rows = results["trainings"]
    assert [row["name"] for row in rows] == ["teacher", "rslad", "sat"]
    assert results["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
    assert all(row["step"] > 0 and row["left"] == 1 for row in rows)


def test_a_sweep_is_estimated(capfd):
    flags = [*QUICK, "--attacks", "fgsm", "--no-checks", "--launcher", "local", "--jobs", "2"]
    assert main("sweep", "--over", "adv_weight=0.5,0.9", *flags, "--estimate") == 0
    said = capfd.readouterr().out
    assert said.count("\nadv_weight=") == 2 and re.search(
        r"in all .*; \d:\d\d if 2 at a time", said
    )


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--estimate", "--status"], "--status and --estimate print different things"),
        (["--estimate", "--baseline", "ard"], "there is no 'ard' to compare with"),
        (["--status", "--baseline", "ard"], "there is no 'ard' to compare with"),
    ],
)
def test_what_looks_ahead_refuses_what_the_comparison_refuses(flags, cause, capfd):
    assert main("compare", *TWO, *flags) == 2
    assert cause in capfd.readouterr().err
    if "--baseline" not in flags:
        assert main("sweep", "--over", "adv_weight=0.5", *QUICK, *flags) == 2
        assert cause in capfd.readouterr().err


def test_a_teacher_that_has_yet_to_be_fetched_is_not_trained(monkeypatch, capfd):
    monkeypatch.setattr(estimate, "measure_student", lambda *given: Cost(2.0, 0.5))
    flags = ["--teacher", "published:Zhang2019Theoretically", "--estimate", "--json"]
    assert main("compare", *TWO, *flags) == 0
    rows = json.loads(capfd.readouterr().out)["trainings"]
    assert [row["name"] for row in rows] == ["rslad", "sat"]


def test_measuring_changes_no_training(monkeypatch, capfd):
    """The comparison that has been measured computes the weights of the one that has not."""
    digests = []
    for worth, folder in ((1, "measured"), (1000, "not")):
        monkeypatch.setattr(estimate, "WORTH", worth)
        assert main("compare", *TWO, "--out", folder) == 0
        assert ("by a few steps" in capfd.readouterr().out) == (worth == 1)
        results = [
            json.loads(path.read_text()) for path in sorted(Path(folder).glob("*/result.json"))
        ]
        digests.append([(each["teacher_sha256"], each["student_sha256"]) for each in results])
    assert len(digests[0]) == 2 and digests[0] == digests[1]


def test_the_seconds_of_a_training_are_those_of_its_parts():
    assert Training("sat", 3, 0.1, 2.0, 5.0, 7.0).seconds == 18.0
