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

WARM_UP = 20  # batches, for batch statistics
STARTS = 4  # of the plain attack, whose spread is the reference


class Fidelity:
    """The gain in mean objective of attacks on a student, judged by it in full precision.

    The student has the batch statistics of the attacked images: those of an untrained network would
    hardly let its outputs differ. All attacks have the same starts; `plain` holds what the plain
    attack gains from each.
    """

    def __init__(self, bench: BenchConfig, weights: Mapping[str, Tensor]) -> None:
        self.device = bench.resolved_device
        self.judge = bench.network("student")
        self.judge.load_state_dict(weights)
        labels = self.normal((bench.batch_size, bench.classes), "labels")
        self.objective = kl(F.softmax(3 * labels, dim=1))
        self.x_nat = pixels(bench.image_set().images[: bench.batch_size])
        with float32_precision("fp32"), torch.no_grad():
            for _ in range(WARM_UP):
                self.judge.train()(self.x_nat)
        self.weights = {name: value.clone() for name, value in self.judge.state_dict().items()}
        self.clean = self.judged(self.x_nat)
        attack = training_attack(TrainConfig(), Techniques())
        self.plain = [self.reached(attack, self.judge, start) for start in range(STARTS)]

    def normal(self, shape: tuple[int, ...], *key: str | int) -> Tensor:
        random = generator("bench", *key, device=self.device)
        return torch.randn(shape, generator=random, device=self.device)

    def reached(self, attack: TrainingAttack, student: nn.Module, start: int) -> float:
        """Return the gain of the images of an attack from one of the starts."""
        noise = 0.001 * self.normal(tuple(self.x_nat.shape), "noise", start)
        return self.judged(attack(student, self.objective, self.x_nat, noise)) - self.clean

    def judged(self, x: Tensor) -> float:
        """Return the mean objective of images."""
        with float32_precision("fp32"), frozen_eval(self.judge), torch.no_grad():
            return float(self.objective(self.judge(x))) / len(x)

    def compare(self, stepper: Stepper) -> float:
        """Return the gain of a training's attack from the first start, as a share of the plain
        attack's. The student gets the weights of the judge."""
        stepper.student.load_state_dict(self.weights)
        return self.reached(stepper.attack, stepper.engine, 0) / self.plain[0]

    def plain_range(self) -> tuple[float, float]:
        """Return the least and the greatest share that the plain attack has from all starts."""
        shares = [gain / self.plain[0] for gain in self.plain]
        return min(shares), max(shares)
