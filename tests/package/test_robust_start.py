"""Methods that fine-tune a robust network: where it comes from, and what of a run depends on it."""

import json
from pathlib import Path

import pytest
import torch
from helpers.program import QUICK, main, refused, the_run

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.resolve import resolve
from absld.methods import METHODS
from absld.methods.absld import Rslad
from absld.progress import SILENT
from absld.runs.comparison import build_configs
from absld.runs.launching import plan_jobs
from absld.runs.planning import load_splits, plan
from absld.storage.checkpoint import load
from absld.storage.files import digest

pytestmark = pytest.mark.usefixtures("few_digits_in_an_empty_folder")
FRL = [*QUICK, "--method", "frl"]
SHORT = {"epochs": 1, "teacher_epochs": 1, "max_steps": 1, "batch_size": 32, "device": "cpu"}


def runs():
    return sorted(path.name.split("-seed")[0] for path in Path("runs").glob("digits-*"))


def session(run):
    return json.loads((run / "environment.json").read_text())[-1]


def test_the_student_starts_from_a_network_trained_as_a_teacher_is(capfd):
    """With a learning rate of 0 its parameters stay there."""
    assert main("train", *FRL, "--learning-rate", "0") == 0
    start, run = the_run("teacher"), the_run("frl")
    shown = capfd.readouterr().out
    assert "robust start: trained here by TRADES; another: --student FILE" in shown
    assert f"robust start: {start}" in shown and "student by frl: convnet" in shown
    robust, student = (load(path / "best.pt")["model"] for path in (start, run))
    assert session(run)["robust_start_sha256"] == digest(robust)
    assert all(torch.equal(student[name], robust[name]) for name in robust if "weight" in name)


def test_a_start_is_the_teacher_of_another_run_with_the_same_architecture(capfd):
    assert main("train", *QUICK, "--method", "rslad") == 0
    assert main("train", *FRL) == 0
    assert runs() == ["digits-frl", "digits-rslad", "digits-teacher"]
    assert (
        session(the_run("frl"))["robust_start_sha256"]
        == session(the_run("rslad"))["teacher_sha256"]
    )
    capfd.readouterr()
    assert main("train", *FRL, "--resume") == 0
    assert "epoch     lr" not in capfd.readouterr().out, "all are finished"


def test_a_given_student_is_fine_tuned_as_it_is(capfd):
    assert main("train", *QUICK, "--method", "sat") == 0
    given = the_run("sat")
    assert main("train", *FRL, "--student", given, "--learning-rate", "0") == 0
    assert runs() == ["digits-frl", "digits-sat"]
    before, after = (load(path / "best.pt")["model"] for path in (given, the_run("frl")))
    assert all(torch.equal(before[name], after[name]) for name in before if "weight" in name)
    capfd.readouterr()
    refused(capfd, 2, "trains no teacher: its method needs none", "absld train",
            "teacher", "train", *FRL, "--student", given)  # fmt: skip


def test_a_start_trained_alone_is_that_of_the_run():
    assert main("teacher", "train", *FRL) == 0
    assert runs() == ["digits-teacher"]
    trained = (the_run("teacher") / "best.pt").stat().st_mtime_ns
    assert main("train", *FRL) == 0
    assert runs() == ["digits-frl", "digits-teacher"]
    assert (the_run("teacher") / "best.pt").stat().st_mtime_ns == trained


def planned(**settings):
    config = resolve({**SHORT, "method": "frl", **settings})
    return plan(config, SILENT)


def test_what_decides_the_start_decides_the_run():
    """Its schedule, but not that of the method: a start is the same for every learning rate."""
    first = planned()
    assert planned(teacher_epochs=2).run.path != first.run.path
    other = planned(learning_rate=0.5)
    assert other.run.path != first.run.path
    assert other.inputs["robust_start"] == first.inputs["robust_start"]
    assert "robust_start" not in planned(method="wat").inputs


class Both(Rslad):
    """A method with a teacher and a robust start."""

    needs_robust_start = True


def test_starts_are_jobs_before_their_students_and_shared_with_teachers(monkeypatch):
    monkeypatch.setitem(METHODS, "sat", Both)
    labels = "rslad", "frl", "sat"
    configs = [resolve({**SHORT, "method": name}) for name in labels]
    wide = [resolve({**SHORT, "method": "sat", "teacher_model": "wrn-10-1"})]
    splits = load_splits(configs[0], torch.device("cpu"), SILENT)
    jobs = plan_jobs([*labels, "wide"], configs + wide, EvaluationConfig(), splits, SILENT)
    titles = [job.title for job in jobs]
    assert titles == ["teacher, seed 0", "teacher, seed 0", *(f"{n}, seed 0" for n in labels),
                      "wide, seed 0"]  # fmt: skip
    shared, of_wide, rslad, frl, both, wide_one = jobs
    assert rslad.needs == frl.needs == both.needs == (shared,)
    assert {*wide_one.needs} == {shared, of_wide}


def test_a_comparison_leaves_its_schedule_to_a_method_that_fine_tunes():
    Path("slow.toml").write_text('method = "frl"\nlearning_rate = 1e-4\n')
    labels, configs, notes = build_configs(["trades", "frl", "slow.toml"], [0], {"epochs": 5})
    assert [config.learning_rate for config in configs] == [0.1, 1e-3, 1e-4]
    assert [config.weight_decay for config in configs] == [2e-4, 5e-4, 5e-4]
    assert [config.epochs for config in configs] == [5, 5, 5], "flags are for all"
    assert labels == ["trades", "frl", "slow"]
    alone = "fine-tunes a robust network, with the schedule of its recipe"
    assert notes == [f"frl: {alone}", f"slow: frl learning_rate=0.0001; {alone}"]


@pytest.mark.parametrize("method", ["wat", "frl"])
def test_a_method_that_learns_from_the_images_that_select_refuses_test_images(method, capfd):
    refused(capfd, 2, f"{method} learns from the images that select", "leave out --select-on",
            "train", *QUICK, "--method", method, "--select-on", "test")  # fmt: skip
