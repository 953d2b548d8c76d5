"""Methods that adapt to held-out images: when they see which, and after interruptions."""

from dataclasses import replace

import pytest
import torch
from helpers.small_training import CONFIG, VALIDATION, network, train
from helpers.weight_files import same

from absld.errors import Interrupted
from absld.methods import METHODS
from absld.methods.baselines import Trades
from absld.storage.checkpoint import load
from absld.storage.run_directory import RunDirectory

AN_EPOCH = 9  # three batches of training, three of held-out images, three of validation


class Witness(Trades):
    """TRADES that writes down what it is asked, and for which images."""

    uses_validation = True

    def step(self, student, teacher, batch, attack):
        events.append("step")
        return super().step(student, teacher, batch, attack)

    def observe_validation(self, student, batches, attack):
        for batch in batches:
            events.append("held out")
            seen.append(batch.x_nat)
            assert batch.noise.abs().max() > 0 and len(batch.labels) == len(batch.x_nat)

    def end_epoch(self, rate):
        events.append("end")
        return {}


events, seen = [], []


def test_a_method_sees_each_held_out_image_once_an_epoch_after_its_steps(monkeypatch):
    monkeypatch.setitem(METHODS, "trades", Witness)
    events.clear()
    seen.clear()
    train(replace(CONFIG, method="trades", epochs=2))
    assert events == 2 * [*3 * ["step"], *3 * ["held out"], "end"]
    shown = torch.cat(seen).view(2, *VALIDATION.images.shape)
    for of_epoch in shown:
        torch.testing.assert_close(of_epoch, VALIDATION.images / 255)


def final_state(config, path, on_step=None):
    run = RunDirectory(path)
    student, _ = train(config, network("student"), run=run, on_step=on_step)
    return {"student": dict(student.state_dict()), "last": load(run.last)}


def stopping(at):
    """Return an on_step that asks to stop at its nth call."""
    left = iter(range(at - 1, -1, -1))

    def on_step(report):
        if next(left) == 0:
            raise Interrupted(15)

    return on_step


@pytest.mark.parametrize("method", ["wat", "frl"])
def test_interrupted_among_held_out_images_or_in_the_validation_after_them_it_resumes(
    method, tmp_path
):
    config = replace(CONFIG, method=method, epochs=2)
    whole = final_state(config, tmp_path / "whole")
    moved = {"wat": "total_costs", "frl": "multipliers"}[method]
    assert whole["last"]["method"][moved].any()
    for at in range(4, AN_EPOCH + 1):
        stopped = tmp_path / str(at)
        with pytest.raises(Interrupted):
            final_state(config, stopped, stopping(at))
        assert same(final_state(config, stopped), whole), f"after batch {at}"
