"""The strength of a faster attack, relative to the plain one."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from absld.attack import TrainingAttack, frozen_eval, kl
from absld.bench.contenders import BenchConfig
from absld.config.settings import TrainConfig
from absld.data.dataset import pixels
from absld.engine.engine import training_attack
from absld.engine.precision import float32_precision
from absld.engine.techniques import Techniques
from absld.seeding import generator
from absld.stepper import Stepper

STARTS = 4  # of the plain attack, whose spread is the reference


class Fidelity:
    """The mean objective that attacks on a student reach, judged by the student in full precision.

    All attacks have the same starts; `plain` holds what the plain attack reaches from each.
    """

    def __init__(self, bench: BenchConfig, weights: Mapping[str, Tensor]) -> None:
        self.device = bench.resolved_device
        self.judge = bench.network("student")
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.judge.load_state_dict(self.weights)
        labels = self.normal((bench.batch_size, bench.classes), "labels")
        self.objective = kl(F.softmax(3 * labels, dim=1))
        self.x_nat = pixels(bench.image_set().images[: bench.batch_size])
        attack = training_attack(TrainConfig(), Techniques())
        self.plain = [self.reached(attack, self.judge, start) for start in range(STARTS)]

    def normal(self, shape: tuple[int, ...], *key: str | int) -> Tensor:
        random = generator("bench", *key, device=self.device)
        return torch.randn(shape, generator=random, device=self.device)

    def reached(self, attack: TrainingAttack, student: nn.Module, start: int) -> float:
        """Return the mean objective of the images of an attack from one of the starts."""
        noise = 0.001 * self.normal(tuple(self.x_nat.shape), "noise", start)
        x_adv = attack(student, self.objective, self.x_nat, noise)
        with float32_precision("fp32"), frozen_eval(self.judge), torch.no_grad():
            return float(self.objective(self.judge(x_adv))) / len(x_adv)

    def compare(self, stepper: Stepper) -> float:
        """Return the objective of a training's attack from the first start, as a share of the
        plain attack's. The student gets the weights of the judge."""
        stepper.student.load_state_dict(self.weights)
        return self.reached(stepper.attack, stepper.engine, 0) / self.plain[0]

    def plain_range(self) -> tuple[float, float]:
        """Return the least and the greatest share that the plain attack has from all starts."""
        shares = [objective / self.plain[0] for objective in self.plain]
        return min(shares), max(shares)
