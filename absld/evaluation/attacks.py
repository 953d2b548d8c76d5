"""The attacks of an evaluation, by the names under which the field reports them.

`fgsm`, `pgd20` (the step of TRADES), `pgd20-sat` (the longer step of plain adversarial training) and
`cw30` (PGD on the margin), with any number of steps; `autoattack` is the four parts of AutoAttack.
Each is an attack in the norm of its batch.

Random numbers are keyed by the image's number in its set, or a batch's by that of its first image.
"""

import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from absld.attack import (
    Objective,
    cross_entropy,
    geometry,
    margin,
    margins,
    pgd,
    uniform_noise_,
)
from absld.config.imports import import_extra
from absld.errors import UsageError
from absld.evaluation.surrogates import Images, differentiable
from absld.norms import Norm
from absld.seeding import Key, generator, global_generator

OBJECTIVES: dict[str, Callable[[Tensor], Objective]] = {
    "cross-entropy": cross_entropy,
    "margin": margin,
}


@dataclass(frozen=True, eq=False)
class AttackBatch:
    """Images to attack, and the settings of this attempt.

    Attributes:
        x_nat: (n,channels,H,W), clean images, pixels in [0,1].
        labels: (n,) in 0..C-1.
        index: (n,) the images' numbers in their set.
        epsilon: radius of the ball.
        seed: of the evaluation.
        restart: number of the attempt, from 0.
        norm: of the ball.
    """

    x_nat: Images
    labels: Int[Tensor, " n"]
    index: Int[Tensor, " n"]
    epsilon: float
    seed: int = 0
    restart: int = 0
    norm: Norm = "linf"

    def key(self, attack: str, row: int = 0) -> Key:
        """Return the key of an attack's random numbers for the image in this row of the batch."""
        return "evaluate", self.seed, attack, self.restart, int(self.index[row])


@runtime_checkable
class Attack(Protocol):
    """An attack of an evaluation: any object with these members, such as a dataclass."""

    @property
    def name(self) -> str: ...

    @property
    def restarts(self) -> int:
        """Number of attempts, each on the images that no earlier one broke."""

    @property
    def cost(self) -> float:
        """Approximate forward-backward passes for an image and an attempt, to estimate the time."""

    def perturb(self, model: nn.Module, batch: AttackBatch) -> Images:
        """Return adversarial images; what leaves the ball is projected into it afterwards.

        The network is called in the mode it is in; see `absld.frozen_eval`.
        """


@dataclass(frozen=True)
class GradientAttack:
    """PGD in the ball (arXiv 1706.06083).

    step_size: norm of a step, in multiples of epsilon. The first attempt starts at the image, or
    uniformly in the ball if `uniform_start`; restarts start uniformly.
    """

    name: str
    objective: Literal["cross-entropy", "margin"]
    steps: int
    step_size: float
    uniform_start: bool
    restarts: int = 1

    @property
    def cost(self) -> float:
        return float(self.steps)

    def perturb(self, model: nn.Module, batch: AttackBatch) -> Images:
        x_nat, epsilon = batch.x_nat, batch.epsilon
        noise = torch.zeros(x_nat.shape)
        if self.uniform_start or batch.restart:
            # Keyed by the image: batch size, a subset and an interruption do not change it.
            for row in range(len(noise)):
                random = generator(*batch.key(self.name, row))
                uniform_noise_(noise[row : row + 1], epsilon, batch.norm, random)
        return pgd(
            differentiable(model),
            OBJECTIVES[self.objective](batch.labels),
            x_nat,
            noise.to(x_nat),
            epsilon=epsilon,
            step_size=self.step_size * epsilon,
            steps=self.steps,
            norm=batch.norm,
        )


# Approximate forward-backward passes for an image: 100 steps; 100 towards each of nine classes; the
# same with two passes a step; 5000 forwards.
AUTOATTACK_COSTS = {"apgd-ce": 100.0, "apgd-t": 900.0, "fab-t": 1800.0, "square": 1700.0}
AUTOATTACK_NORMS = {"linf": "Linf", "l2": "L2"}
SQUARE_SIDE = 5  # it begins with a pattern of five by five tiles


@dataclass(frozen=True)
class AutoAttackPart:
    """One of the four attacks of AutoAttack (arXiv 2003.01690), from the package pyautoattack.

    Settings are those of its `standard` version; with fewer than ten classes every other class is a
    target. An image that is not broken may come back unchanged. Images are float32.
    """

    name: str
    restarts: int = 1

    @property
    def cost(self) -> float:
        return AUTOATTACK_COSTS[self.name]

    def perturb(self, model: nn.Module, batch: AttackBatch) -> Images:
        x_nat = batch.x_nat.contiguous()  # it views images as vectors
        if batch.norm == "l2" and self.name == "square" and min(x_nat.shape[2:]) < SQUARE_SIDE:
            raise UsageError(
                f"AutoAttack's square in the L2 norm needs images of {SQUARE_SIDE}x{SQUARE_SIDE} "
                f"pixels or more, not {x_nat.shape[2]}x{x_nat.shape[3]}",
                "needed: larger images, or other attacks, such as pgd20 and cw30",
            )
        forward, device = differentiable(model), x_nat.device

        def logits(x: Tensor) -> Tensor:
            return forward(x).clone()  # it writes to them, and they may be a view of the image

        suite = import_autoattack().AutoAttack(
            logits,
            norm=AUTOATTACK_NORMS[batch.norm],
            eps=batch.epsilon,
            seed=0,
            version="standard",
            device=device,
        )
        suite.apgd.loss = "ce"
        suite.fab.targeted = True
        targets = forward(x_nat[:1]).shape[1] - 1
        for targeted in (suite.fab, suite.apgd_targeted):
            targeted.n_target_classes = min(targeted.n_target_classes, targets)
        attacks = (suite.apgd, suite.apgd_targeted, suite.fab, suite.square)
        attack = dict(zip(AUTOATTACK_COSTS, attacks, strict=True))[self.name]
        random = global_generator(*batch.key(self.name), device=device)
        with one_autoattack, random, torch.no_grad():
            # The parts seed torch's global generators, each with its own number.
            attack.seed = int(torch.randint(2**31, ()))
            x_adv: Tensor = attack.perturb(x_nat, batch.labels)
        return x_adv


def autoattack_parts(num_classes: int) -> list[AutoAttackPart]:
    """Return the parts; the loss of apgd-t is undefined for three or fewer classes."""
    return [
        AutoAttackPart(name) for name in AUTOATTACK_COSTS if num_classes > 3 or name != "apgd-t"
    ]


one_autoattack = threading.Lock()  # torch's global generators are those of all threads


def import_autoattack() -> Any:
    """Import pyautoattack. Raises UsageError if it is not installed."""
    pyautoattack = import_extra("pyautoattack", "autoattack", "autoattack")
    # Its warnings are replaced by the sanity checks.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    return pyautoattack


@dataclass(frozen=True)
class SquareSearch:
    """Random search without gradients: squares of +-epsilon are kept where the margin grows.

    A simplified Square attack (arXiv 1912.00049) with one square for the whole batch, which the
    sanity checks compare with PGD; `autoattack` has the original. In the L2 norm, squares of
    +-epsilon / sqrt(d), d the numbers of an image, are added to what was kept before. Source:
    decided here.
    """

    name: str
    queries: int
    restarts: int = 1

    @property
    def cost(self) -> float:
        return self.queries / 3

    def perturb(self, model: nn.Module, batch: AttackBatch) -> Images:
        x_nat, labels, epsilon = batch.x_nat, batch.labels, batch.epsilon
        project, l2 = geometry(batch.norm).project, batch.norm == "l2"
        random = generator(*batch.key(self.name))
        n, channels, height, width = x_nat.shape
        size = epsilon / (channels * height * width) ** 0.5 if l2 else epsilon

        def random_corners(*shape: int) -> Tensor:
            return size * (torch.randint(2, shape, generator=random) * 2 - 1)

        # All is drawn ahead and copied at once, so that no query waits for the device.
        stripes = random_corners(n, channels, 1, width).to(x_nat)
        corners = torch.empty(self.queries, n, channels, 1, 1)
        windows = []
        for query in range(self.queries):
            share = 0.8 * 0.5 ** (8 * query / self.queries)  # of the pixels: large, then small
            side = max(1, round((share * height * width) ** 0.5))
            side = min(side, height, width)
            top = int(torch.randint(height - side + 1, (), generator=random))
            left = int(torch.randint(width - side + 1, (), generator=random))
            windows.append((..., slice(top, top + side), slice(left, left + side)))
            corners[query] = random_corners(n, channels, 1, 1)
        with torch.no_grad():
            x_adv = project(x_nat + stripes, x_nat, epsilon)
            best = margins(model(x_adv), labels)
            for window, corner in zip(windows, corners.to(x_nat), strict=True):
                candidate = x_adv.clone()
                candidate[window] = (x_adv if l2 else x_nat)[window] + corner
                candidate = project(candidate, x_nat, epsilon)
                reached = margins(model(candidate), labels)
                better = reached > best
                x_adv = torch.where(better.view(-1, 1, 1, 1), candidate, x_adv)
                best = torch.where(better, reached, best)
        return x_adv


def parse_attacks(
    names: str, num_classes: int, restarts: int = 1, norm: Norm = "linf"
) -> tuple[Attack, ...]:
    """Return the attacks that `names`, separated by commas, mean in a norm.

    `clean` is left out: it is always evaluated. restarts: of PGD and CW. Raises UsageError.
    """
    attacks: list[Attack] = []
    for name in filter(None, map(str.strip, names.lower().split(","))):
        if name == "autoattack":
            import_autoattack()  # a missing package is reported before any work
            attacks += autoattack_parts(num_classes)
        elif name != "clean":
            attacks.append(parse_attack(name, restarts, norm))
    if len({attack.name for attack in attacks}) < len(attacks):
        raise UsageError(f"an attack is named twice in {names!r}", "name each once")
    return tuple(attacks)


# Objective, step size in multiples of epsilon, uniform start.
STYLES: dict[str, tuple[Literal["cross-entropy", "margin"], float, bool]] = {
    "pgd": ("cross-entropy", 0.003 / (8 / 255), True),
    "pgd-sat": ("cross-entropy", 2 / 8, True),
    "cw": ("margin", 2 / 8, False),
}


def parse_attack(name: str, restarts: int = 1, norm: Norm = "linf") -> GradientAttack:
    """Return fgsm, pgdN, pgdN-sat or cwN, of N steps.

    The steps are those of TRADES (arXiv 1901.08573), in the L2 norm of arXiv 2002.11569; for -sat
    and cw of arXiv 1706.06083. Raises UsageError.
    """
    if name == "fgsm":
        return GradientAttack(name, "cross-entropy", 1, 1.0, uniform_start=False)
    match = re.fullmatch(r"(pgd|cw)([1-9][0-9]{0,4})(-sat)?", name)
    style = STYLES.get(match[1] + (match[3] or "")) if match else None
    if match is None or style is None:
        raise UsageError(
            f"there is no attack {name!r}",
            "there are clean, fgsm, pgd20, pgd20-sat, cw30, autoattack; 20 and 30 are steps",
        )
    objective, step_size, uniform_start = style
    if norm == "l2" and match[1] == "pgd" and not match[3]:
        step_size = 15 / 128
    return GradientAttack(name, objective, int(match[2]), step_size, uniform_start, restarts)
