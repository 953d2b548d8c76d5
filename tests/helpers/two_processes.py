"""What each of two processes does in test_ranks.py: some trainings, and what came of them.

torchrun --nproc-per-node 2 tests/two_processes.py FILE
"""

import sys
from dataclasses import replace

import torch
from test_trainer import CONFIG, image_set, train
from torch import nn

from absld.engine.distributed import ALONE, launched
from absld.seeding import global_generator

METHODS = ["absld", "absld-weights", "absld-margins", "trades"]
DATA = image_set(16, seed=5, dtype=torch.float64), image_set(9, seed=6, dtype=torch.float64)


class FrozenNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are given: what a batch is made of does not matter to it."""

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


def results(ranks=ALONE):
    """Weights, temperatures, losses and accuracies of a training by each method."""
    found = {}
    for method in METHODS:
        config = replace(CONFIG, method=method, batch_size=8, epochs=4, attack_steps=3)
        student, reports = train(config, network("student"), network("teacher"), DATA, ranks=ranks)
        found[method] = {
            "weights": dict(student.state_dict()),
            "per_class": [report.per_class for report in reports],
            "loss": torch.tensor([report.loss for report in reports]),
            "robust": torch.stack([report.accuracies.robust for report in reports]),
        }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launched("cpu") as ranks:
        torch.save(results(ranks), f"{sys.argv[1]}.{ranks.rank}")
