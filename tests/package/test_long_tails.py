"""Training where some classes have hundreds of images, and others one or none."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import strategies as draw
from helpers.small_training import CONFIG, train

from absld.data.dataset import InMemoryImages
from absld.data.sources import hold_out
from absld.methods.registry import METHODS
from absld.storage.run_directory import RunDirectory

TAILS = {
    "100 to 1": [300, 30, 3],
    "1000 to 1": [1000, 31, 1],
    "most classes of one image": [40, 1, 1],
    "a class without images": [40, 0, 2],
}
SHORT = replace(CONFIG, epochs=2, batch_size=16, attack_steps=1, max_steps=6)


def long_tail(counts):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = draw.images(0, len(labels), side=4, dtype=torch.float32)
    images = (images + labels.view(-1, 1, 1, 1) / len(counts)) / 2
    return hold_out(InMemoryImages(images, labels, ("head", "body", "tail")))


@pytest.mark.parametrize(
    ("method", "tail"),
    [*((method, "1000 to 1") for method in METHODS), *(("absld", tail) for tail in TAILS)],
)
def test_every_method_trains_on_a_long_tail(method, tail, tmp_path):
    """A class that validation lacks has no accuracy there, and does not select the epoch."""
    data = long_tail(TAILS[tail])
    absent = [count == 0 for count in data[1].class_counts()]
    run = RunDirectory(tmp_path)
    with run:
        student, reports = train(replace(SHORT, method=method), data=data, run=run)
    for report, record in zip(reports, run.records(), strict=True):
        assert report.accuracies.robust.isnan().tolist() == absent
        assert [value is None for value in record["clean"]] == absent
        assert 0 <= report.score <= 2 and report.loss == report.loss
        assert json.dumps(record, allow_nan=False)
        for name, values in report.per_class.items():
            if name.startswith(("temperature", "class_weight", "class_margin")):
                assert values.isfinite().all(), name
    assert any(report.is_best for report in reports)
    assert all(value.isfinite().all() for value in student.state_dict().values())


@pytest.mark.parametrize("counts", TAILS.values(), ids=TAILS)
def test_classes_that_an_epoch_lacks_keep_their_temperature(counts):
    """Of 40 images and one, an epoch of two batches of 16 may leave out the one."""
    data = long_tail(counts)
    _, reports = train(replace(SHORT, epochs=1), data=data)
    for kind in ("adv", "nat"):
        temperature = reports[0].per_class[f"temperature_{kind}"]
        unseen = reports[0].per_class[f"class_risk_{kind}"].isnan()
        assert (temperature[unseen] == 1).all() and (
            (temperature >= 0.5) & (temperature <= 5)
        ).all()
