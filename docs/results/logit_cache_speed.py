"""Time a step of ABSLD with a WideResNet-34-10 teacher, evaluated in every step or cached.

    python docs/results/logit_cache_speed.py [STUDENT ...]

Prints the table of docs/performance.md: seconds a step, and the ratios of neighbouring steps. The
networks are untrained and the images noise: neither changes the arithmetic.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import absld
from absld.config.settings import TrainConfig
from absld.data.augmentation import Views, draws
from absld.engine.logit_cache import CachedTeacher, open_logit_cache
from absld.methods import build_method
from absld.stepper import train_step

BATCH, ROUNDS, CLASSES = 16, 7, 10


def main() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = absld.InMemoryImages(images, torch.arange(BATCH) % CLASSES, tuple("0123456789"))
    views = Views(data, 4)
    teacher = absld.build_model("wrn-34-10", CLASSES, "teacher").eval().requires_grad_(False)
    print("| student | teacher evaluated, s | logits cached, s | ratio, median (range) |")
    print("|---|---|---|---|")
    for name in sys.argv[1:] or ["resnet18", "mobilenetv2"]:
        student = absld.build_model(name, CLASSES, "student")
        method = build_method(TrainConfig(), CLASSES)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        attack = absld.TrainingAttack(8 / 255, 2 / 255, 10)
        with tempfile.TemporaryDirectory() as folder:
            cache = open_logit_cache(
                Path(folder), teacher, views, flip=0.5, precision="fp32", batch_size=BATCH
            )
            cached = CachedTeacher(teacher, cache)
            seconds: dict[str, list[float]] = {"evaluated": [], "cached": []}
            for number in range(-1, ROUNDS):
                (draw,) = draws(views, number, batch_size=BATCH, flip=0.5, radius=0.001, steps=1)
                batch = views.batch(draw)._replace(views=views.numbers(draw))
                cached(batch.x_nat, batch.views)  # fills the cache
                for kind, network, given in (
                    ("evaluated", teacher, batch._replace(views=None)),
                    ("cached", cached, batch),
                ):
                    start = time.perf_counter()
                    train_step(method, student, network, given, attack, optimizer)
                    if number >= 0:  # the first warms up
                        seconds[kind].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(seconds["evaluated"], seconds["cached"], strict=True)]
        evaluated, from_cache = (statistics.median(times) for times in seconds.values())
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {evaluated:.2f} | {from_cache:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
