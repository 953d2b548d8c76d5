"""Both artefacts under one set of names: the laws are tried on each.

Tests look names up in `impl` when they run (`impl.pgd`), so a change to a module is what is
tested. The functions below bring the few differing argument forms together.
"""

import sys

import pytest

import absld
import absld.attack
import absld_min

both = pytest.mark.parametrize("impl", [absld_min, absld], ids=["single file", "package"])


def home(function):
    """Return the module in which a function looks up what it calls: where to put a stand-in."""
    return sys.modules[function.__module__]


def project(impl, x_adv, x_nat, epsilon):
    """Clip `x_adv` to the ball, then to the box; in the single file, by an attack step that moves
    nothing (exact where x_adv - x_nat is)."""
    if impl is not absld_min:
        return impl.project_linf(x_adv, x_nat, epsilon)
    settings = {"epsilon": epsilon, "step_size": 1.0, "steps": 1}
    return absld_min.pgd(lambda x: x, lambda x: 0 * x.sum(), x_nat, x_adv - x_nat, **settings)


def training_attack(impl, epsilon):
    """Return (model, soft_labels, x_nat, noise) -> x_adv, with the settings of training."""
    if impl is absld_min:
        config = absld_min.Config(device="cpu", epsilon=epsilon)
        return lambda model, soft_labels, x_nat, noise: absld_min.training_attack(
            config, model, soft_labels, (x_nat, None, noise)
        )
    attack = absld.TrainingAttack(epsilon, epsilon * 0.25, 10)
    return lambda model, soft_labels, x_nat, noise: attack(
        model, absld.attack.kl(soft_labels), x_nat, noise
    )


def image_set(images, labels):
    """Return the images as a set of the package; classes are named 0, 1, ..."""
    return absld.InMemoryImages(images, labels, tuple(map(str, range(int(labels.max()) + 1))))


def evaluate(impl, model, images, labels, epsilon):
    """Return the (clean, robust) class accuracies."""
    if impl is absld_min:
        return absld_min.evaluate(
            absld_min.Config(device="cpu", epsilon=epsilon), model, images, labels
        )
    return absld.validate(model, image_set(images, labels), epsilon=epsilon)
