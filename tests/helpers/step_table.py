"""Count the waits and operations of a training step, by both artefacts and all engines.

In tests/: python -m helpers.step_table, which writes docs/results/device-steps.md
"""

import contextlib
import copy
import functools
import io
import tempfile
from pathlib import Path
from unittest import mock

import torch

import absld
import absld.trainer
import absld_min
from absld.config.settings import TrainConfig
from absld.data.dataset import InMemoryImages
from absld.engine.logit_cache import LogitCacheSettings
from helpers.cuda_device import ROOT
from helpers.cuda_steps import StepRecords
from helpers.pretend_cuda import PretendCuda
from helpers.small_training import OnStep

STUDENT, TEACHER, BATCH, SIDE, CLASSES = "resnet18", "wrn-34-10", 4, 8, 10
PAGE = """# Waits and operations of a training step

This page counts how often the host waits for the device in a training step, and how many operations it
launches there. They are counted on the pretend device of the tests (`tests/helpers/pretend_cuda.py`), on a CPU:
counts are no times, and an operation may be several kernels.

    cd tests && python -m helpers.step_table

A step of ABSLD: a {student} student, a {teacher} teacher, an attack of 10 steps. The counts do not depend on the
number or size of the images. The first step of an epoch is not counted: it makes the graph. Compiling was off. A CUDA
graph counts as one operation. With `auto` and `fast`, every 50th step also checks for NaN, and waits once.

| step | teacher's logits | waits | operations |
|---|---|---|---|
{rows}

torch {torch}
"""


def images(count: int) -> InMemoryImages:
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    return InMemoryImages(pixels, torch.arange(count) % CLASSES, tuple("abcdefghij"))


def step_of_the_file(folder: str) -> tuple[int, int]:
    """Return the waits and operations of a step of absld_min.py."""
    with PretendCuda() as cuda:
        records = StepRecords(cuda)
        config = absld_min.Config(device=cuda.device, epochs=1, batch_size=BATCH, out=folder)
        student, teacher = networks(cuda.device, torch.channels_last)
        data = [(part.images, part.labels) for part in [images(3 * BATCH).to(cuda.device)] * 3]
        # What an evaluation does is not counted, and takes longest.
        chance = torch.full((2, CLASSES), 1 / CLASSES)
        with (
            contextlib.redirect_stdout(io.StringIO()),
            mock.patch("absld_min.evaluate", lambda *_: chance),
            mock.patch("absld_min.batches", records.of_batches(absld_min.batches)),
        ):
            absld_min.train(config, student, teacher.requires_grad_(False).eval(), data)
    return counts(records)


def step_of_the_package(engine: str, folder: str | None) -> tuple[int, int]:
    """Return the waits and operations of a step of an engine; folder: of the logit cache."""
    with PretendCuda() as cuda:
        records = StepRecords(cuda)
        student, teacher = networks(cuda.device, torch.contiguous_format)
        config = TrainConfig(
            engine=engine, compile=False, epochs=2, batch_size=BATCH, padding=0, flip=0.0
        )  # each image has one view, so that the cache is whole after an epoch
        cache = None if folder is None else LogitCacheSettings(Path(folder), 1.0)
        data = images(3 * BATCH), images(2)
        short = functools.partial(absld.trainer.validate, steps=1)
        with mock.patch("absld.trainer.validate", short):
            list(
                absld.fit(
                    student, teacher, *data, config, observer=OnStep(records), logit_cache=cache
                )
            )
    return counts(records)


@functools.cache
def network(name: str) -> torch.nn.Module:
    """Build a network, whose names of weights are the same in both artefacts."""
    return absld.build_model(name, CLASSES, name)


def networks(device: str, layout: torch.memory_format) -> list[torch.nn.Module]:
    """Return the student and the teacher on a device."""
    on_cpu = (copy.deepcopy(network(name)) for name in (STUDENT, TEACHER))
    return [net.to(device).to(memory_format=layout) for net in on_cpu]


def counts(records: StepRecords) -> tuple[int, int]:
    """Return the waits and operations of the last step."""
    return len(records[-1].waits), records[-1].operations


def rows() -> list[str]:
    """Return the rows of the table."""
    with tempfile.TemporaryDirectory() as folder:
        table = [("absld_min.py", "evaluated", *step_of_the_file(folder))]
        for engine in ("plain", "auto", "fast"):
            for logits, cache in (("evaluated", None), ("cached, on the device", folder)):
                name = f"absld train --engine {engine}"
                table.append((name, logits, *step_of_the_package(engine, cache)))
    return [f"| {' | '.join(map(str, row))} |" for row in table]


if __name__ == "__main__":
    torch.set_num_threads(1)
    page = PAGE.format(
        rows="\n".join(rows()), student=STUDENT, teacher=TEACHER, torch=torch.__version__
    )
    (ROOT / "docs" / "results" / "device-steps.md").write_text(page)
    print(page)
