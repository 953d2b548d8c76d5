"""Time PGD-20 of 1,000 images by absld, foolbox and torchattacks on the same network.

    pip install foolbox torchattacks
    absld train && OMP_NUM_THREADS=1 python docs/results/attack_speed.py runs/digits-absld-*

Prints the table of docs/performance.md: seconds, and ratios within each round. All three attack the
same images, which are correct when clean, in the same batches, and classify the result.
"""

import random
import statistics
import sys
import time

import foolbox
import torch
import torchattacks

import absld
from absld.data.dataset import InMemoryImages
from absld.evaluation.attacks import parse_attack

EPSILON, STEPS, IMAGES, BATCH, ROUNDS = 0.1, 20, 1000, 250, 15


def correct_digits(model, splits):
    """Return IMAGES digits that the network classifies correctly."""
    images = torch.cat([part.images for part in splits]) / 255
    labels = torch.cat([part.labels for part in splits])
    with torch.no_grad():
        correct = (model(images).argmax(1) == labels).nonzero().squeeze(1)[:IMAGES]
    assert len(correct) == IMAGES
    return InMemoryImages(images[correct], labels[correct], splits.test.classes)


def main(run):
    model = absld.load_network(run, 10, ("speed",)).model.eval()
    data = correct_digits(model, absld.load_data("digits", ""))
    step = parse_attack("pgd20").step_size * EPSILON
    foolbox_model = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    foolbox_pgd = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS)
    torchattacks_pgd = torchattacks.PGD(model, EPSILON, step, STEPS)

    def batches():
        return zip(data.images.split(BATCH), data.labels.split(BATCH), strict=True)

    def by_absld():
        evaluation = absld.evaluate(
            model, data, epsilon=EPSILON, attacks="pgd20", batch_size=BATCH, each=True
        )
        return int(evaluation.robust.sum())

    def by_foolbox():
        return sum(
            int((~foolbox_pgd(foolbox_model, x, y, epsilons=EPSILON)[2]).sum())
            for x, y in batches()
        )

    def by_torchattacks():
        with_labels = ((torchattacks_pgd(x, y), y) for x, y in batches())
        return sum(int((model(x_adv).argmax(1) == y).sum()) for x_adv, y in with_labels)

    libraries = {"absld": by_absld, "foolbox": by_foolbox, "torchattacks": by_torchattacks}
    robust = {name: attack() for name, attack in libraries.items()}  # warm-up
    seconds = {name: [] for name in libraries}
    for number in range(ROUNDS):
        for name in random.Random(number).sample(list(libraries), len(libraries)):
            start = time.perf_counter()
            libraries[name]()
            seconds[name].append(time.perf_counter() - start)
    print("| | seconds, median (range) | time over absld's, median (range) | correct after it |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times, seconds["absld"], strict=True)]
        print(
            f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}) | "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{robust[name]} of {IMAGES} |"
        )


if __name__ == "__main__":
    main(sys.argv[1])
