"""Weight averaging: the average by hand, and what is validated, kept and resumed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.small_training import CONFIG, C, image_set, locked, network, train
from helpers.weight_files import same
from torch import nn

import absld
from absld.attack import TrainingAttack, cross_entropy
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.data.augmentation import held_out_batches
from absld.engine.weight_averaging import first_averaged_epoch
from absld.errors import Interrupted, UsageError
from absld.methods import Cfa, Trades, build_method
from absld.progress import StepReport
from absld.runs.grid import uses
from absld.runs.planning import describe_averaging
from absld.runs.run_record import deciding_settings
from absld.storage.checkpoint import load
from absld.storage.run_directory import RunDirectory
from absld.trainer import fit, training_identity

AVERAGED = replace(
    CONFIG, method="trades", epochs=4, weight_averaging=0.8, averaging_start=0.5
)  # from epoch 2 on


class Picky(Trades):
    """A method that lets the weights of some epochs enter the average, and counts the others."""

    accepted = (3, 4)

    def __init__(self, config, num_classes):
        super().__init__(config, num_classes)
        self.register_buffer("epoch", torch.tensor(1))

    def accepts_epoch(self):
        return int(self.epoch) in self.accepted

    def end_epoch(self, rate):
        self.epoch = self.epoch + 1
        return {}


@pytest.fixture
def data():
    """Training and validation images in float64, which then is torch's default type."""
    torch.set_default_dtype(torch.float64)
    yield [image_set(n, seed=seed, dtype=torch.float64) for n, seed in ((12, 0), (9, 1))]
    torch.set_default_dtype(torch.float32)


def epochs(config, data, run):
    """Train; yield the report of each epoch, and the state that it saved."""
    with locked(run):
        for report in fit(network("student"), None, *data, config, run=run):
            yield report, load(run.last)


def moving_average(states, decay):
    """The average by hand, of all in the state dicts; counts of batches are cut to whole ones."""
    average = {name: value.numpy().copy() for name, value in states[0].items()}
    for state in states[1:]:
        for name, value in average.items():
            new = decay * value + (1 - decay) * state[name].numpy()
            average[name] = new.astype(value.dtype)
    return average


@pytest.mark.parametrize(
    ("method", "entered"), [("trades", [2, 3, 4]), (f"{__name__}:Picky", [3, 4])]
)
def test_the_average_is_that_by_hand_and_is_what_is_validated_and_kept(
    method, entered, data, tmp_path
):
    run, weights, scores = RunDirectory(tmp_path), {}, []
    config = replace(AVERAGED, method=method)
    for report, state in epochs(config, data, run):
        weights[report.epoch] = state["model"]
        expected = state["model"]
        if taken := [weights[epoch] for epoch in entered if epoch <= report.epoch]:
            expected = moving_average(taken, 0.8)
            for name, value in expected.items():
                found = state["average"][f"module.{name}"].numpy()
                np.testing.assert_allclose(found, value, rtol=1e-12, atol=1e-14, err_msg=name)
        student = network("student")
        student.load_state_dict({name: torch.as_tensor(v) for name, v in expected.items()})
        by_hand = absld.validate(student, data[1], epsilon=config.epsilon)
        assert same(tuple(report.accuracies), tuple(by_hand))
        if report.score > max(scores, default=-1):
            best = expected
        scores.append(report.score)
        saved = load(run.best)["model"]
        for name, value in best.items():
            np.testing.assert_allclose(saved[name].numpy(), value, rtol=1e-12, atol=1e-14)
    assert sorted(weights) == [1, 2, 3, 4]


def test_the_student_trains_on_as_it_would_without(data, tmp_path):
    runs = [RunDirectory(tmp_path / name) for name in ("with", "without")]
    configs = AVERAGED, replace(AVERAGED, weight_averaging=0.0)
    states = [
        [state for _, state in epochs(config, data, run)]
        for config, run in zip(configs, runs, strict=True)
    ]
    for averaged, plain in zip(*states, strict=True):
        assert same(averaged["model"], plain["model"])
        assert averaged.keys() - plain.keys() == {"average", "last_averaged_epoch"}


AN_EPOCH = 3 + 3  # batches of training and of validation


@pytest.mark.parametrize("method", ["trades", "cfa"])
def test_a_training_interrupted_after_every_batch_averages_as_one_that_was_not(
    method, data, tmp_path, monkeypatch
):
    """Also inside a validation, before which the weights have entered."""
    monkeypatch.setattr(Cfa, "least_accuracy", 0.0)
    config = replace(AVERAGED, method=method)
    runs = [RunDirectory(tmp_path / name) for name in ("whole", "stopped")]
    whole, _ = train(config, network("student"), data=data, run=runs[0])
    heard, sessions = set(), 0

    def stop_once(report: StepReport):
        if str(report) not in heard:
            heard.add(str(report))
            raise Interrupted(2)

    while True:
        student = network("student")
        try:
            train(config, student, data=data, run=runs[1], on_step=stop_once)
            break
        except Interrupted:
            sessions += 1
    assert sessions >= 4 * AN_EPOCH
    assert same(student.state_dict(), whole.state_dict())
    ends = [load(run.last) for run in runs]
    assert same(ends[0]["average"], ends[1]["average"]) and ends[1]["average"]["n_averaged"] == 3
    assert same(ends[0]["method"], ends[1]["method"])


def test_cfa_accepts_an_epoch_by_its_worst_class_on_held_out_images():
    ours = build_method(TrainConfig(method="cfa", weight_averaging=0.85), C)
    for counts, accepted in (
        ([2, 9, 9], True), ([1, 9, 9], False), ([10, 10, 10], True), ([0, 0, 0], False)
    ):  # fmt: skip
        ours.held_out.reset()
        ours.held_out.add(torch.tensor(counts).float(), torch.tensor([10, 10, 10]))
        assert ours.accepts_epoch() == accepted
    ours.held_out.reset()
    ours.held_out.add(torch.tensor([0.0, 9, 9]), torch.tensor([0, 10, 10]))
    assert ours.accepts_epoch(), "a class without images does not count"


def test_cfa_measures_held_out_images_under_its_attack_on_the_cross_entropy(data):
    config = replace(AVERAGED, method="cfa", epochs=1)
    student, (report,) = train(config, network("student"), data=data)
    attack = TrainingAttack(0.1, 0.1 * 0.25, 2)
    batches = held_out_batches(
        data[1],
        0,
        "student",
        1,
        "validation",
        batch_size=4,
        start="normal",
        radius=0.001,
        norm="linf",
    )
    expected = [[] for _ in range(C)]
    for batch in batches:
        x_adv = attack(student, cross_entropy(batch.labels), batch.x_nat, batch.noise)
        predictions = student.eval()(x_adv).argmax(1)
        for prediction, label in zip(predictions.tolist(), batch.labels.tolist(), strict=True):
            expected[label].append(prediction == label)
    found = report.per_class["held_out_robust"]
    assert found.tolist() == pytest.approx([sum(hits) / len(hits) for hits in expected], rel=1e-6)
    assert 0 < found.sum() < C


@pytest.mark.parametrize(
    ("start", "epochs", "first"), [(0.25, 200, 50), (0.25, 40, 10), (0.0, 5, 1), (1.0, 5, 5)]
)
def test_averaging_starts_at_a_fraction_of_the_run(start, epochs, first):
    config = TrainConfig(averaging_start=start, epochs=epochs)
    assert first_averaged_epoch(config) == first


def test_the_default_averages_nothing_and_keeps_the_identity_of_runs(data):
    config, own = resolve({}), {"weight_averaging", "averaging_start"}
    identity = training_identity(network("student"), None, *data, config.training(), "student")
    assert not own & (deciding_settings(config).keys() | identity.keys())
    assert describe_averaging(config) == []
    averaged = resolve({"method": "cfa", "epochs": 40})
    assert own & deciding_settings(averaged).keys() == {"weight_averaging"}
    assert describe_averaging(averaged) == ["weights: averaged from epoch 10 on, with decay 0.85"]
    assert uses(averaged, "averaging_start") and not uses(config, "averaging_start")


@pytest.mark.parametrize("error", [TypeError, AttributeError])
def test_a_student_that_cannot_be_copied_is_refused(data, error):
    class Own(nn.Sequential):
        def __deepcopy__(self, memo):
            raise error("it is one of a kind")

    student = Own(*network("student"))
    with pytest.raises(UsageError, match=r"weights cannot be averaged: .* one of a kind") as caught:
        train(AVERAGED, student, data=data)
    assert caught.value.hint == "--weight-averaging 0"
