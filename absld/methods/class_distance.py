"""Class distance: strength of attack and loss move from an easy class to a hard one that is near.

Two classes are near where the student takes the adversarial images of one for the other.
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.methods.base import CountsEpochs, Step
from absld.methods.baselines import Trades, trades_terms
from absld.metrics import ClassMean

MANY_CLASSES = 100


def distance_weights(probability: Float[Tensor, "c c"], transfer: float) -> Float[Tensor, " c"]:
    """Compute weights of the classes, of mean 1 before those below 0 are set to 0.

    A class i with p(i|i) < p(j|j) takes transfer * p(j|i) p(j|j) from class j. A class that was not
    seen, whose row is NaN, keeps its 1 and does not count. Source: DAFA (arXiv 2401.12532); the 0:
    decided here.

    Args:
        probability: mean probability p(j|i), row i, column j, of class j on the images of class i.
        transfer: how much is moved.
    """
    own = probability.diagonal()
    harder = own.unsqueeze(1) < own
    moved = transfer * probability * own
    seen = ~own.isnan()
    pairs = seen.unsqueeze(1) & seen & ~torch.eye(len(own), dtype=torch.bool, device=own.device)
    return (1 + torch.where(pairs, torch.where(harder, moved, -moved.T), 0).sum(1)).clamp_min(0)


class Dafa(CountsEpochs, Trades):
    """Distance-Aware Fair Adversarial training: TRADES, then with the weights of `distance_weights`
    on epsilon, step size and cross-entropy of the images of a class.

    The weights are computed once, at the end of a warm-up, from the student's probabilities on the
    adversarial training images of its last epoch. The warm-up is 70/110 of the run; the authors
    move 1 with 10 classes and 1.5 with 100: so does this, 1.5 from 100 classes on. Source: arXiv
    2401.12532; the fraction, and other numbers of classes: decided here.
    """

    family = "fair training"
    warm_up = 70 / 110
    class_weight: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.transfer = 1.5 if num_classes >= MANY_CLASSES else 1.0
        self.register_buffer("class_weight", torch.ones(num_classes))
        self.probability = ClassMean(num_classes, num_classes)

    def adversarial_images(
        self, student: nn.Module, clean: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        weight = self.class_weight[batch.labels].view(-1, 1, 1, 1).to(batch.x_nat.dtype)
        epsilon, step_size = attack.epsilon * weight, attack.step_size * weight
        attack = replace(attack, epsilon=epsilon, step_size=step_size)
        return super().adversarial_images(student, clean, batch, attack)

    def loss(self, log_nat: Tensor, log_adv: Tensor, labels: Int[Tensor, " n"]) -> Step:
        member = labels.unsqueeze(1) == torch.arange(log_adv.shape[1], device=labels.device)
        probability = log_adv.detach().exp()
        self.probability.add(probability.T @ member.to(probability.dtype), member.sum(0))
        natural, robust = trades_terms(log_nat, log_adv, labels)
        natural, kl = (self.class_weight[labels] * natural).mean(), robust.mean()
        parts = {"weighted_cross_entropy": natural.detach(), "kl": kl.detach()}
        return Step(natural + self.beta * kl, parts)

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        report = super().end_epoch(rate)
        if self.epochs == max(1, round(self.warm_up * self.config.epochs)):
            self.class_weight = distance_weights(self.probability.mean().T, self.transfer)
        self.probability.reset()
        return report | {"class_weight": self.class_weight}
