"""The four parts of AutoAttack, from the optional package pyautoattack.

Settings are that package's `standard` ones. With fewer than ten classes every other class is a
target; with three or fewer the loss of `apgd-t` does not exist, and that part is left out.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from absld.errors import UsageError
from absld.seeding import Key, global_generator

# What an image costs, in forwards and backwards, about: 100 steps; 100 towards each of nine
# classes; the same with two of them a step; 5000 forwards.
COSTS = {"apgd-ce": 100.0, "apgd-t": 900.0, "fab-t": 1800.0, "square": 1700.0}


def parts(num_classes: int) -> list[str]:
    """The parts that exist for so many classes."""
    return [part for part in COSTS if num_classes > 3 or part != "apgd-t"]


def library() -> Any:
    """The package pyautoattack. Raises UsageError where it is not installed."""
    try:
        import pyautoattack
    except ImportError as error:
        raise UsageError(
            f"autoattack needs the package pyautoattack: {error}", "pip install 'absld[autoattack]'"
        ) from error
    # Its warnings are for people who watch it; our checks say what they say.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


def perturb(
    part: str,
    forward: Callable[[Tensor], Tensor],
    x_nat: Float[Tensor, "n channels height width"],
    labels: Int[Tensor, " n"],
    *,
    epsilon: float,
    key: Key,
) -> Float[Tensor, "n channels height width"]:
    """What one part of AutoAttack makes of images (float32), with random numbers from `key`.

    An image for which it finds nothing may come back as it was. forward: with a gradient in x.
    """
    num_classes = forward(x_nat[:1]).shape[1]

    def logits(x: Tensor) -> Tensor:
        return forward(x).clone()  # it writes to them, and they may be a view of the image

    whole = library().AutoAttack(
        logits, norm="Linf", eps=epsilon, seed=0, version="standard", device=x_nat.device
    )
    whole.apgd.loss = "ce"
    whole.fab.targeted = True
    for targeted in (whole.fab, whole.apgd_targeted):
        targeted.n_target_classes = min(targeted.n_target_classes, num_classes - 1)
    attack = {
        "apgd-ce": whole.apgd,
        "apgd-t": whole.apgd_targeted,
        "fab-t": whole.fab,
        "square": whole.square,
    }[part]
    with global_generator(*key, device=x_nat.device), torch.no_grad():
        # The parts seed torch's global generators, each with its own number.
        attack.seed = int(torch.randint(2**31, ()))
        x_adv: Tensor = attack.perturb(x_nat, labels)
    return x_adv
