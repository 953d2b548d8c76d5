"""One of the two processes of test_distributed.py; its results go to FILE.RANK.

In tests/: torchrun --nproc-per-node 2 -m helpers.two_processes FILE
"""

import contextlib
import sys
from dataclasses import replace

import torch
from torch import nn

from absld.engine.distributed import SINGLE_PROCESS, init_distributed
from absld.errors import NonFiniteError
from absld.evaluation.validation import validate
from absld.seeding import global_generator
from helpers.small_training import CONFIG, image_set, train

METHODS = {
    name: {"method": name}
    for name in ("absld", "absld-weights", "absld-margins", "trades", "wat", "frl")
}
AVERAGED = {"weight_averaging": 0.7, "averaging_start": 0.0}
METHODS |= {name: {"method": name} | AVERAGED for name in ("cfa", "dafa")}
METHODS["calibrated and relative"] = {
    "temperature_start": "calibrated", "temperature_move": "relative", "temperature_upper": 100.0,
}  # fmt: skip


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm with fixed statistics: its output does not depend on the rest of the batch."""

    def train(self, mode=True):
        return super().train(False)


def network(key):
    with global_generator("two processes", key):
        norm = FrozenNorm(4)
        norm.running_mean.normal_(0, 0.1)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )
    return net.double()


@contextlib.contextmanager
def float64():
    """Compute in float64, also on images: sets of them have torch's default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@float64()
def results(distributed=SINGLE_PROCESS):
    """Train by each method, ABSLD in two ways; return weights, temperatures, losses and accuracies."""
    data = image_set(16, seed=5, dtype=torch.float64), image_set(9, seed=6, dtype=torch.float64)
    by_method = {}
    for method, settings in METHODS.items():
        config = replace(CONFIG, batch_size=8, epochs=4, attack_steps=3, **settings)
        student, reports = train(
            config, network("student"), network("teacher"), data, distributed=distributed
        )
        by_method[method] = {
            "weights": dict(student.state_dict()),
            "per_class": [report.per_class for report in reports],
            "loss": torch.tensor([report.loss for report in reports]),
            "robust": torch.stack([report.accuracies.robust for report in reports]),
        }
    return by_method


def validation_error(distributed):
    """Return the error of validating a network that gives NaN for one image alone."""
    data = image_set(8)
    broken = data.images[5]

    def logits(x):
        is_broken = (x == broken).flatten(1).all(1, keepdim=True)
        return x.flatten(1)[:, :3].masked_fill(is_broken, torch.nan)

    network = nn.Module()
    network.forward = logits
    try:
        validate(network, data, epsilon=0.1, steps=1, batch_size=4, distributed=distributed)
    except NonFiniteError as error:
        return str(error)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_distributed("cpu") as distributed:
        shared = {
            "max": distributed.all_reduce_max(10 + distributed.rank),
            "error": validation_error(distributed),
        }
        torch.save(results(distributed) | shared, f"{sys.argv[1]}.{distributed.rank}")
