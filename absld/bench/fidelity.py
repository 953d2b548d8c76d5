"""The strength of a faster attack, relative to the plain one."""

import torch
import torch.nn.functional as F

from absld.attack import frozen_eval, kl
from absld.bench.contenders import BenchConfig, PlainStep
from absld.config.settings import TrainConfig
from absld.data.dataset import pixels
from absld.engine.engine import Engine, training_attack
from absld.engine.precision import float32_precision, to_memory_format
from absld.seeding import generator

STARTS = 4  # of the plain attack, whose spread is the reference


class Fidelity:
    """The mean objective that attacks reach, by the plain step's student in full precision.

    All attacks have the same starts; the reference is the spread of the plain attack over them.
    """

    def __init__(self, bench: BenchConfig, plain: PlainStep) -> None:
        self.bench = bench
        self.weights = {k: v.clone() for k, v in plain.student.state_dict().items()}
        labels = self.normal((bench.batch_size, bench.classes), "labels")
        self.objective = kl(F.softmax(3 * labels, dim=1))
        self.x_nat = pixels(bench.image_set().images[: bench.batch_size])
        self.plain = self.objectives(TrainConfig(), STARTS)

    def normal(self, shape: tuple[int, ...], *key: str | int) -> torch.Tensor:
        device = self.bench.resolved_device
        random = generator("bench", *key, device=device)
        return torch.randn(shape, generator=random, device=device)

    def objectives(self, config: TrainConfig, starts: int) -> list[float]:
        """Attack by the engine with these settings, from each of the first starts."""
        judge, student = (self.bench.network("student") for _ in range(2))
        for network in (judge, student):
            network.load_state_dict(self.weights)
        engine = Engine(to_memory_format(student, config.channels_last), config)
        attack, reached = training_attack(config), []
        for start in range(starts):
            noise = 0.001 * self.normal(tuple(self.x_nat.shape), "noise", start)
            x_adv = attack(engine, self.objective, self.x_nat, noise)
            with float32_precision("fp32"), frozen_eval(judge), torch.no_grad():
                reached.append(float(self.objective(judge(x_adv))) / len(x_adv))
        return reached

    def compare(self, config: TrainConfig) -> dict[str, float]:
        """Return the objective from the first start, as a share of the plain attack's.

        Least and greatest are the shares that the plain attack itself has from all starts.
        """
        (reached,) = self.objectives(config, 1)
        shares = [objective / self.plain[0] for objective in self.plain]
        return {"share": reached / self.plain[0], "least": min(shares), "greatest": max(shares)}
