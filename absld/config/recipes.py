"""Recipes: the settings that a data set or a method changes, each value with its source."""

from typing import Any

from absld.norms import Norm

Recipe = dict[str, tuple[Any, str]]

RELEASE = "the authors' release"
OWN = "decided here"
DIGITS = "decided here, for digits"
HALF_AND_THREE_QUARTERS = (100 / 200, 150 / 200)


def recipe(source: str, **values: Any) -> Recipe:
    """Return settings with their common source."""
    return {name: (value, source) for name, value in values.items()}


RECIPES: dict[str, Recipe] = {
    "digits": recipe(
        DIGITS,
        dataset="digits",
        student="convnet",
        teacher_model="convnet",
        epochs=40,
        teacher_epochs=30,
        epsilon=0.1,
        padding=1,
        flip=0.0,
    ),
    "cifar10": recipe("the paper", dataset="cifar10"),
    "cifar100": recipe("the paper", dataset="cifar100"),
    "svhn": recipe(OWN, dataset="svhn") | recipe(DIGITS, flip=0.0),  # a mirrored 2 is not a digit
    "tiny-imagenet": recipe(OWN, dataset="tiny-imagenet", image_size=64),
    "folder": recipe(OWN, dataset="folder"),
}

METHOD_RECIPES: dict[str, Recipe] = {
    "absld": {},  # the defaults
    "absld-weights": {},
    "absld-margins": {},
    "rslad": {},
    "fair-rslad": {},
    "ard": recipe(
        "ARD", start="uniform", adv_weight=1.0, epochs=200, milestones=HALF_AND_THREE_QUARTERS
    ),
    "iad": recipe(
        "IAD", start="uniform", adv_weight=1.0, epochs=200, milestones=HALF_AND_THREE_QUARTERS
    ),
    "adaad": recipe(
        "AdaAD", adv_weight=1.0, weight_decay=5e-4, epochs=200, milestones=HALF_AND_THREE_QUARTERS
    ),
    "trades": recipe("TRADES", relative_step_size=0.007 / 0.031, epochs=76, milestones=(75 / 76,)),
    "cfa": recipe(
        "CFA",
        weight_decay=5e-4,
        epochs=200,
        milestones=HALF_AND_THREE_QUARTERS,
        weight_averaging=0.85,
        averaging_start=50 / 200,
    ),
    "dafa": recipe(
        "DAFA",
        relative_step_size=0.007 / 0.031,
        weight_decay=5e-4,
        epochs=110,
        milestones=(99 / 110, 104 / 110),
    ),
    "sat": recipe("PGD adversarial training", start="uniform"),
    "wat": recipe(
        "WAT", relative_step_size=0.007 / 0.031, epochs=100, milestones=(75 / 100, 90 / 100)
    ),
    "frl": recipe("FRL", learning_rate=1e-3, weight_decay=5e-4, epochs=40, milestones=(40 / 40,)),
    "mart": recipe(
        "MART, for a ResNet-18",
        relative_step_size=0.007 / 0.031,
        epochs=120,
        learning_rate=0.01,
        weight_decay=3.5e-3,
        milestones=(75 / 120, 90 / 120, 100 / 120),
    ),
    "bat": recipe(
        "BAT",
        relative_step_size=0.007 / 0.031,
        epochs=200,
        milestones=(75 / 200, 90 / 200, 100 / 200),
    ),
}

# They override those of methods and data sets, whose budgets are of the L-infinity norm.
NORM_RECIPES: dict[Norm, Recipe] = {
    "linf": {},
    "l2": recipe("RobustBench, arXiv 2010.09670", epsilon=0.5)
    | recipe("Rice et al., arXiv 2002.11569", relative_step_size=15 / 128),
}
