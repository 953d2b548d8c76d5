"""What a data set or a method changes about the defaults, each value with its source."""

from typing import Any

RELEASE = "the authors' release"


OWN = "decided here"


DIGITS_SOURCE = "decided here, for digits"


RECIPES: dict[str, dict[str, tuple[Any, str]]] = {
    "digits": {
        "dataset": ("digits", DIGITS_SOURCE),
        "student": ("convnet", DIGITS_SOURCE),
        "teacher_model": ("convnet", DIGITS_SOURCE),
        "epochs": (40, DIGITS_SOURCE),
        "teacher_epochs": (30, DIGITS_SOURCE),
        "epsilon": (0.1, DIGITS_SOURCE),
        "padding": (1, DIGITS_SOURCE),
        "flip": (0.0, DIGITS_SOURCE),
    },
    "cifar10": {"dataset": ("cifar10", "the paper")},
    "cifar100": {"dataset": ("cifar100", "the paper")},
    "svhn": {"dataset": ("svhn", OWN), "flip": (0.0, "decided here: a mirrored digit is none")},
    "tiny-imagenet": {"dataset": ("tiny-imagenet", OWN), "image_size": (64, "its images")},
    "folder": {"dataset": ("folder", OWN)},
}


HALF_AND_THREE_QUARTERS = (100 / 200, 150 / 200)


METHOD_RECIPES: dict[str, dict[str, tuple[Any, str]]] = {
    "absld": {},  # the defaults
    "absld-weights": {},
    "absld-margins": {},
    "rslad": {},
    "fair-rslad": {},
    "ard": {
        "start": ("uniform", "ARD"),
        "adv_weight": (1.0, "ARD"),
        "epochs": (200, "ARD"),
        "milestones": (HALF_AND_THREE_QUARTERS, "ARD"),
    },
    "adaad": {
        "adv_weight": (1.0, "AdaAD"),
        "epochs": (200, "AdaAD"),
        "milestones": (HALF_AND_THREE_QUARTERS, "AdaAD"),
        "weight_decay": (5e-4, "AdaAD"),
    },
    "trades": {
        "relative_step_size": (0.007 / 0.031, "TRADES"),
        "epochs": (76, "TRADES"),
        "milestones": ((75 / 76,), "TRADES"),
    },
    "sat": {"start": ("uniform", "PGD adversarial training")},
}
