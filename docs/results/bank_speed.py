"""A step of ABSLD with a WideResNet-34-10 teacher, asked in every step and remembered, in turn.

    python docs/results/bank_speed.py [STUDENT ...]

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
from absld.engine.logit_cache import RememberingTeacher, open_bank
from absld.methods import build_method
from absld.trainer import train_step

BATCH, ROUNDS, CLASSES = 16, 7, 10


def main() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCH, 3, 32, 32), generator=random, dtype=torch.uint8)
    data = absld.ImageSet(images, torch.arange(BATCH) % CLASSES, tuple("0123456789"))
    views = Views(data, 4)
    teacher = absld.build_model("wrn-34-10", CLASSES, "teacher").eval().requires_grad_(False)
    print("| student | asked, s | remembered, s | ratio, median (range) |")
    print("|---|---|---|---|")
    for name in sys.argv[1:] or ["resnet18", "mobilenetv2"]:
        student = absld.build_model(name, CLASSES, "student")
        method = build_method(TrainConfig(), CLASSES)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        attack = absld.TrainingAttack(8 / 255, 2 / 255, 10)
        with tempfile.TemporaryDirectory() as folder:
            bank = open_bank(Path(folder), teacher, views, flip=0.5, precision="fp32")
            remembering = RememberingTeacher(teacher, bank)
            taken: dict[str, list[float]] = {"asked": [], "remembered": []}
            for number in range(-1, ROUNDS):
                (draw,) = draws(views, number, batch_size=BATCH, flip=0.5, radius=0.001, steps=1)
                batch = views.batch(draw)
                remembering.about_to_see(batch.x_nat, views.numbers(draw))
                remembering(batch.x_nat)  # now the bank has them
                for kind, used in (("asked", teacher), ("remembered", remembering)):
                    start = time.perf_counter()
                    train_step(method, student, used, batch, attack, optimizer)
                    if number >= 0:  # the first warms up
                        taken[kind].append(time.perf_counter() - start)
        ratios = [a / b for a, b in zip(taken["asked"], taken["remembered"], strict=True)]
        asked, remembered = (statistics.median(times) for times in taken.values())
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {asked:.2f} | {remembered:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
