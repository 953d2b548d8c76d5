"""Trackers: what is sent, once and in order, whatever happens to the training or to the store."""

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.small_training import CONFIG, TRAIN, VALIDATION, locked, network

import absld
from absld.cli.compare_command import with_those_of_both
from absld.config.files import read_recipe, to_toml
from absld.config.settings import Config
from absld.errors import Interrupted, UsageError
from absld.metrics import ClassAccuracies
from absld.progress import Observer, Observers
from absld.runs.run_record import deciding_settings
from absld.tracking import start
from absld.tracking.tracker import Tracker
from absld.tracking.values import class_names, epoch_values, values_on_test

PACKAGE = Path(absld.__file__).parent
ODD = ("a/b", "a b", "..", "", "猫", "a_b", "A_B", "x" * 200, "\x1b[31m", "%s<b>")


def record(classes, epoch=1, **changes):
    """Return the record of an epoch with all values 0.5."""
    lists = dict.fromkeys(("clean", "robust", "temperature_adv"), [0.5] * classes)
    return {"epoch": epoch, "loss": 1.0, "adv": 2.0, "is_best": True, **lists, **changes}


# --- Values ---


def test_the_values_of_an_epoch_have_the_names_of_the_classes():
    values = epoch_values(record(3, robust=[0.0, 1.0, None]), ("cat", "dog", "owl"))
    assert values["training/loss"] == 1.0 and values["training/adv"] == 2.0
    assert values["validation/robust_average"] == 0.5 and values["validation/robust_worst"] == 0.0
    assert values["validation/robust_nsd"] == 1.0
    assert values["temperature_adv/owl"] == 0.5
    assert "validation_robust/owl" not in values  # it has no images
    assert "training/is_best" not in values


def test_many_classes_make_no_more_values_than_few():
    few, many = (epoch_values(record(n), [str(k) for k in range(n)]) for n in (20, 1000))
    assert len(many) < len(few)
    spread = [k / 100 for k in range(101)]
    values = epoch_values(record(101, temperature_adv=spread), [str(k) for k in range(101)])
    of_temperatures = {n: v for n, v in values.items() if n.startswith("temperature_adv/")}
    assert list(of_temperatures.values()) == pytest.approx([0.0, 0.1, 0.5, 0.9, 1.0])


def test_names_of_classes_are_distinct_and_such_as_every_tracker_takes():
    names = class_names(ODD)
    assert len({name.casefold() for name in names}) == len(ODD)
    assert all(re.fullmatch(r"[\w-]{1,60}", name) for name in names)
    assert class_names(("cat", "dog-2")) == ["cat", "dog-2"]


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_what_is_not_a_finite_number_is_not_tracked(value):
    values = epoch_values(record(2, loss=value, temperature_adv=[value, 1.0]), ("a", "b"))
    assert all(map(math.isfinite, values.values()))
    assert values["temperature_adv/b"] == 1.0
    accuracies = ClassAccuracies(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 0.5]))
    assert values_on_test(accuracies, ("a", "b"))["test/robust_average"] == 0.5


# --- The tracker ---


class Stored:
    """A store in memory, which fails at chosen calls."""

    def __init__(self, *failing):
        self.failing, self.calls = set(failing), 0
        self.logged, self.runs = [], []

    def may_fail(self):
        self.calls += 1
        if self.calls in self.failing:
            raise OSError("disk full\n\x1b[31m")

    def start(self, out):
        return "memory"

    def begin(self, run):
        self.may_fail()
        self.runs.append(run.key)
        return {name: value for values, _ in self.logged for name, value in values.items()}

    def log(self, values, step):
        self.may_fail()
        self.logged.append((values, step))

    def attach(self, evaluation, step):
        pass

    def close(self, completed):
        self.may_fail()


def fit(observer, run=None):
    with locked(run):
        networks = network("student"), network("teacher")
        return list(absld.fit(*networks, TRAIN, VALIDATION, CONFIG, run=run, observer=observer))


def track(store, run=None, observers=()):
    """Train with a tracker; return its warnings."""
    warnings = []
    tracker = Tracker("memory", store, warnings.append)
    try:
        fit(Observers(*observers, tracker), run)
    finally:
        tracker.close(completed=True)
    return warnings


def steps(store):
    return [step for values, step in store.logged if "epoch" in values]


# Calls: begin, log, log, log, close.
@pytest.mark.parametrize("failing", [(), (1,), (3,), (2, 3, 4)])
def test_a_store_that_fails_for_a_while_has_every_epoch_once(failing, tmp_path):
    store = Stored(*failing)
    warnings = track(store, absld.RunDirectory(tmp_path))
    assert steps(store) == [1, 2, 3]
    assert len(warnings) == bool(failing)
    assert all("disk full" in text and "\n" not in text for text in warnings)


def test_a_store_that_always_fails_costs_two_lines_and_no_epoch_of_training():
    warnings, store = [], Stored(*range(100))
    tracker = Tracker("memory", store, warnings.append)
    assert [report.epoch for report in fit(tracker)] == [1, 2, 3]
    tracker.close(completed=True)
    assert len(warnings) == 2 and "lacks the last 3 reports" in warnings[1]


class Stopping(Observer):
    """An observer that asks to stop in an epoch."""

    def __init__(self, epoch):
        self.at = epoch

    def step(self, report):
        if report.epoch == self.at:
            raise Interrupted(15)


def test_a_resumed_training_goes_on_in_its_tracked_run(tmp_path):
    store, run = Stored(), absld.RunDirectory(tmp_path)
    with pytest.raises(Interrupted):
        track(store, run, [Stopping(2)])
    assert steps(store) == [1]
    track(store, run)
    assert steps(store) == [1, 2, 3] and len(set(store.runs)) == 1
    track(store, run)  # it is finished
    assert steps(store) == [1, 2, 3]


def test_epochs_of_an_untracked_session_are_tracked_by_the_next_one(tmp_path):
    store, run = Stored(), absld.RunDirectory(tmp_path)
    with pytest.raises(Interrupted):
        fit(Stopping(3), run)
    track(store, run)
    assert steps(store) == [1, 2, 3]


def test_trainings_without_a_directory_are_runs_of_their_own():
    store = Stored()
    track(store)
    track(store)
    assert len(set(store.runs)) == 2


def test_several_observers_all_receive_every_report():
    hooks = [name for name in vars(Observer) if not name.startswith("_")]
    heard = []

    class Listening(Observer):
        def __init__(self, name):
            for hook in hooks:
                setattr(self, hook, lambda *given, hook=hook: heard.append((name, hook, *given)))

    both = Observers(Listening("a"), Listening("b"))
    for hook in hooks:
        getattr(both, hook)(1)
    assert heard == [(name, hook, 1) for hook in hooks for name in ("a", "b")]


# --- The start ---


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ImportError("no module"), r"pip install 'absld\[mlflow\]'"),
        (OSError("refused"), "/tracking/ says"),
    ],
)
def test_a_tracker_that_cannot_start_is_refused(error, hint, monkeypatch, tmp_path):
    class Unreachable(Stored):
        def start(self, out):
            raise error

    monkeypatch.setitem(start.STORES, "mlflow", Unreachable)
    trackers = start.tracked("mlflow", tmp_path, Observer())
    with pytest.raises(UsageError, match=str(error)) as caught, trackers:
        pytest.fail("it began")
    assert re.search(hint, caught.value.hint)


def test_only_the_main_process_tracks(monkeypatch, tmp_path):
    observer = Observer()
    with start.tracked("mlflow", tmp_path, observer, is_main=False) as given:
        assert given is observer


@pytest.mark.parametrize("text", ["tensorbord", "mlflow,other", "a\x1b"])
def test_unknown_trackers_are_refused(text):
    with pytest.raises(UsageError, match="track takes tensorboard, mlflow, wandb, trackio"):
        Config(track=text)


def test_trackers_do_not_decide_which_run_it_is():
    assert deciding_settings(Config(track="mlflow")) == deciding_settings(Config())


def test_a_run_that_was_tracked_sends_nothing_when_it_is_a_recipe(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config(track="wandb")))
    with pytest.raises(UsageError, match="nothing is sent"):
        read_recipe(str(path))
    assert read_recipe(str(path), {"track": ""})["track"] == "wandb"  # the flag overrides it


def test_trackers_of_a_recipe_track_the_evaluations_of_a_comparison_too():
    recipe = {"track": "tensorboard", "class_order": "by-position", "epochs": 3}
    evaluation = with_those_of_both({"attacks": "clean"}, recipe)
    assert (evaluation.track, evaluation.attacks) == ("tensorboard", "clean")


def test_no_library_of_a_tracker_is_imported_with_the_package():
    libraries = {"tensorboard", "mlflow", "wandb", "trackio"}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & libraries, path


# --- The stores ---


def latest(name, run):
    """Return the epochs, and the last temperature of a class, as the tracker's own API reads them."""
    folder, key = run.path.parent, f"temperature_adv/{TRAIN.classes[1]}"
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run.path)).Reload()
        return [e.step for e in events.Scalars("epoch")], events.Scalars(key)[-1].value
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
        (found,) = client.search_runs([client.get_experiment_by_name("absld").experiment_id])
        history = client.get_metric_history(found.info.run_id, "epoch")
        return [metric.step for metric in history], found.data.metrics[key]
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("absld", run.path.name)
    return [log["step"] for log in logs], logs[-1][key]


def stored(name, run):
    """Train in two sessions with a real store; return the epochs and the temperatures in it."""
    for observers in ([Stopping(2)], []):
        warnings = []
        listener = Observer()
        listener.warn = warnings.append
        try:
            with start.tracked(name, run.path.parent, listener) as observer:
                fit(Observers(*observers, observer), run)
        except Interrupted:
            pass
        assert len(warnings) == 1  # where it writes
    return latest(name, run)


def test_tensorboard_has_a_training_without_a_directory(tmp_path):
    with start.tracked("tensorboard", tmp_path, Observer()) as observer:
        fit(observer)
    (folder,) = tmp_path.iterdir()
    assert latest("tensorboard", absld.RunDirectory(folder))[0] == [1, 2, 3]


@pytest.mark.parametrize(
    "name",
    [
        "tensorboard",
        pytest.param("mlflow", marks=pytest.mark.slow),
        pytest.param("trackio", marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_real_store_has_every_epoch_of_a_resumed_training_once(name, tmp_path, monkeypatch):
    pytest.importorskip(name)
    for variable in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = absld.RunDirectory(tmp_path / "run")
    epochs, temperature = stored(name, run)
    assert epochs == [1, 2, 3]
    assert temperature == pytest.approx(run.records()[-1]["temperature_adv"][1], rel=1e-6)
