"""A training that takes milliseconds: a network, images, settings."""

from contextlib import contextmanager

import torch
from torch import nn

from absld.config.settings import TrainConfig
from absld.data.dataset import InMemoryImages
from absld.progress import Observer
from absld.seeding import global_generator
from absld.trainer import fit
from helpers import strategies as draw

C = 3
CONFIG = TrainConfig(
    epochs=3, batch_size=4, attack_steps=2, padding=1, epsilon=0.1, milestones=(0.34, 0.67)
)


def network(*key, channels=3, classes=C, side=4):
    """Return a network with batch norm, whose buffers a resumed run must restore."""
    with global_generator("test", *key):
        return nn.Sequential(
            nn.Conv2d(channels, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * side * side, classes),
        )


def image_set(n=12, classes=C, seed=0, channels=3, dtype=torch.float32):
    """Return images whose brightness tells their class, so that something can be learned."""
    labels = torch.arange(n) % classes
    images = draw.images(seed, n, side=4, dtype=dtype)[:, :channels]
    images = (images + labels.view(-1, 1, 1, 1) / classes) / 2
    return InMemoryImages(images, labels, tuple(map(str, range(classes))))


def bytes_of(data):
    """Return the set with its images as uint8."""
    return InMemoryImages((data.images * 255).to(torch.uint8), data.labels, data.classes)


TRAIN, VALIDATION = bytes_of(image_set()), bytes_of(image_set(9, seed=1))


@contextmanager
def locked(run):
    """Hold the lock of a run directory, if there is one; its status stays as it is."""
    if run is not None:
        run.lock()
    try:
        yield
    finally:
        if run is not None:
            run.unlock()


class OnStep(Observer):
    """An observer that gives the report of each batch to a function."""

    def __init__(self, on_step):
        self.step = on_step


def train(
    config=CONFIG, student=None, teacher=None, data=(TRAIN, VALIDATION), on_step=None, **settings
):
    """Train to the end; return the student and the reports."""
    student = network("student") if student is None else student
    if teacher is None and config.method != "trades":
        teacher = network("teacher")
    if on_step:
        settings["observer"] = OnStep(on_step)
    with locked(settings.get("run")):
        return student, list(fit(student, teacher, *data, config, **settings))
