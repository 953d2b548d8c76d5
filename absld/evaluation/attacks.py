"""The attacks of an evaluation, by the names under which this field reports them.

`fgsm`, `pgd20` (TRADES' step), `pgd20-sat` (the longer step of plain adversarial training), `cw30`
(PGD on the margin), with any number of steps; `autoattack` is its four parts (absld.evaluation.autoattack).

Random numbers are made for an image by its number in its set, or for a batch by that of its first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import Objective, cross_entropy, margin, margins, pgd, project_linf
from absld.errors import UsageError
from absld.evaluation import autoattack
from absld.seeding import generator

STANDARD = "clean,fgsm,pgd20,cw30"
OBJECTIVES: dict[str, Callable[[Tensor], Objective]] = {
    "cross-entropy": cross_entropy,
    "margin": margin,
}


class Attack(Protocol):
    """What an evaluation asks of an attack."""

    @property
    def name(self) -> str: ...

    @property
    def restarts(self) -> int:
        """How often it is tried, each time on the images that it has not broken."""

    @property
    def cost(self) -> float:
        """Of an image and a try, in forwards with their backwards, about: for the time left."""

    def perturb(
        self,
        model: nn.Module,
        x_nat: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, " n"],
        index: Int[Tensor, " n"],
        *,
        restart: int,
        epsilon: float,
        seed: int,
    ) -> Float[Tensor, "n channels height width"]:
        """Images that the network may misclassify. index: their numbers in their set. The network
        is called in the mode it is in; see `absld.frozen_eval`."""


@dataclass(frozen=True)
class SignedGradient:
    """PGD. step_size: in epsilons, so that it scales with them.

    The first start is the image, or uniform in the ball; those of restarts are uniform.
    Source: spec, Evaluation.
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

    def perturb(
        self,
        model: nn.Module,
        x_nat: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, " n"],
        index: Int[Tensor, " n"],
        *,
        restart: int,
        epsilon: float,
        seed: int,
    ) -> Float[Tensor, "n channels height width"]:
        noise = torch.zeros(x_nat.shape)
        if self.uniform_start or restart:
            # By the image's number: batch size, a subset and an interruption change nothing.
            for row, number in zip(noise, index.tolist(), strict=True):
                random = generator("evaluate", seed, self.name, restart, number)
                row.uniform_(-epsilon, epsilon, generator=random)
        return pgd(
            differentiable(model),
            OBJECTIVES[self.objective](labels),
            x_nat,
            noise.to(x_nat),
            epsilon=epsilon,
            step_size=self.step_size * epsilon,
            steps=self.steps,
        )


@dataclass(frozen=True)
class AutoAttackPart:
    """One of the four attacks of AutoAttack."""

    name: str
    restarts: int = 1

    @property
    def cost(self) -> float:
        return autoattack.COSTS[self.name]

    def perturb(
        self,
        model: nn.Module,
        x_nat: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, " n"],
        index: Int[Tensor, " n"],
        *,
        restart: int,
        epsilon: float,
        seed: int,
    ) -> Float[Tensor, "n channels height width"]:
        key = ("evaluate", seed, self.name, restart, int(index[0]))
        forward = differentiable(model)
        x_nat = x_nat.contiguous()  # it views images as vectors
        return autoattack.perturb(self.name, forward, x_nat, labels, epsilon=epsilon, key=key)


@dataclass(frozen=True)
class SquareSearch:
    """A search without gradients: squares of +-epsilon, kept where the margin grows.

    The idea of the Square attack (Andriushchenko et al. 2020), with one square for a whole batch;
    the checks set it against PGD, `autoattack` has the real one. Source: decided here.
    """

    name: str
    queries: int
    restarts: int = 1

    @property
    def cost(self) -> float:
        return self.queries / 3

    def perturb(
        self,
        model: nn.Module,
        x_nat: Float[Tensor, "n channels height width"],
        labels: Int[Tensor, " n"],
        index: Int[Tensor, " n"],
        *,
        restart: int,
        epsilon: float,
        seed: int,
    ) -> Float[Tensor, "n channels height width"]:
        random = generator("evaluate", seed, self.name, restart, int(index[0]))
        n, channels, height, width = x_nat.shape

        def corners(*shape: int) -> Tensor:
            signs = torch.randint(2, shape, generator=random) * 2 - 1
            return (epsilon * signs).to(x_nat)

        with torch.no_grad():
            x_adv = project_linf(x_nat + corners(n, channels, 1, width), x_nat, epsilon)  # stripes
            best = margins(model(x_adv), labels)
            for query in range(self.queries):
                share = 0.8 * 0.5 ** (8 * query / self.queries)  # of the pixels: large, then small
                side = max(1, round((share * height * width) ** 0.5))
                side = min(side, height, width)
                top = int(torch.randint(height - side + 1, (), generator=random))
                left = int(torch.randint(width - side + 1, (), generator=random))
                window = (..., slice(top, top + side), slice(left, left + side))
                tried = x_adv.clone()
                tried[window] = x_nat[window] + corners(n, channels, 1, 1)
                tried = project_linf(tried, x_nat, epsilon)
                found = margins(model(tried), labels)
                better = found > best
                x_adv[better], best[better] = tried[better], found[better]
        return x_adv


def parse_attacks(names: str, num_classes: int, restarts: int = 1) -> tuple[Attack, ...]:
    """The attacks that `names`, separated by commas, mean, without `clean`, which is always done.

    restarts: of PGD and CW. Raises UsageError.
    """
    attacks: list[Attack] = []
    for name in filter(None, map(str.strip, names.lower().split(","))):
        if name == "autoattack":
            autoattack.library()  # if it is missing, say so now
            attacks += map(AutoAttackPart, autoattack.parts(num_classes))
        elif name != "clean":
            attacks.append(parse_attack(name, restarts))
    if len({attack.name for attack in attacks}) < len(attacks):
        raise UsageError(f"an attack is named twice in {names!r}", "name each once")
    return tuple(attacks)


def parse_attack(name: str, restarts: int = 1) -> SignedGradient:
    """fgsm, pgdN, pgdN-sat or cwN, of N steps. Source of the step sizes: spec, Evaluation."""
    if name == "fgsm":
        return SignedGradient(name, "cross-entropy", 1, 1.0, uniform_start=False)
    attack = None
    if found := re.fullmatch(r"(pgd|cw)([1-9]\d{0,4})(-sat)?", name):
        kind, steps, sat = found.groups()
        long_step = 2 / 8
        if kind == "pgd":
            step_size = long_step if sat else 0.003 / (8 / 255)
            attack = SignedGradient(
                name, "cross-entropy", int(steps), step_size, uniform_start=True
            )
        elif not sat:
            attack = SignedGradient(name, "margin", int(steps), long_step, uniform_start=False)
    if attack is None:
        raise UsageError(
            f"there is no attack {name!r}",
            "there are clean, fgsm, pgd20, pgd20-sat, cw30, autoattack; 20 and 30 are steps",
        )
    return replace(attack, restarts=restarts)


def differentiable(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward of a network, with a gradient of zero where the network has cut its own.

    Attacks then run and find nothing, and the checks of an evaluation say why.
    """

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        if torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits

    return forward
