"""What sample-based methods make of the classes: weights of the loss, and margins of the attack.

Pure functions of one figure a class, NaN for a class that was not seen: it keeps its 1, and does
not count.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import Objective, TrainingAttack, kl
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.methods.absld import Absld, Rslad
from absld.metrics import ClassMean, class_sums


def class_weights(
    attack_steps: Float[Tensor, " c"], *, lower: float, upper: float
) -> Float[Tensor, " c"]:
    """Weights of the classes from how many attack steps their images withstand on average.

    In proportion to the inverse square, of mean 1 before they are clipped to [lower, upper]; a
    class that withstands none takes all the weight. Source: spec, peers (fair-rslad).
    """
    seen = ~attack_steps.isnan()
    if not seen.any():
        return torch.ones_like(attack_steps)
    steps = attack_steps[seen]
    least = steps.min()
    # Of the least, so that 0 is the limit of small numbers and divides nothing.
    share = torch.where(steps == least, 1, (least / steps) ** 2)
    weights = torch.ones_like(attack_steps)
    weights[seen] = (len(steps) * share / share.sum()).clamp(lower, upper)
    return weights


def class_margins(robust_accuracy: Float[Tensor, " c"], offset: float) -> Float[Tensor, " c"]:
    """Factors of the attack's epsilon: a class is attacked the harder, the more robust it is.

    robust_accuracy in [0,1]. Source: spec, peers (cfa).
    """
    return torch.where(robust_accuracy.isnan(), 1, offset + robust_accuracy)


class AbsldWeights(Absld):
    """ABSLD with Fair-ARD's class weights: a class whose images give way early in the attack
    counts more in the next epoch. Source: spec, peers (fair-rslad, combinations)."""

    lower, upper = 5 / 6, 5 / 2

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.class_weight = torch.ones(num_classes)
        self.withstood = ClassMean(num_classes)  # attack steps

    def attacked(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        objective = Counting(kl(soft_adv), batch.labels)
        x_adv = attack(student, objective, batch.x_nat, batch.noise)
        sums = class_sums(objective.right.float(), batch.labels, len(self.class_weight))
        self.withstood.add(*sums)
        return x_adv

    def weights(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        self.class_weight = self.class_weight.to(labels.device)
        return self.class_weight[labels]

    def class_means(self) -> list[ClassMean]:
        return [*super().class_means(), self.withstood]

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        withstood = self.withstood.mean()
        self.class_weight = class_weights(withstood, lower=self.lower, upper=self.upper)
        self.withstood.reset()
        report = super().end_epoch(rate)
        return report | {"attack_steps_withstood": withstood, "class_weight": self.class_weight}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {
            "class_weight": self.class_weight.clone(),
            "withstood_sums": self.withstood.sums.clone(),
            "withstood_counts": self.withstood.counts.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.class_weight = state["class_weight"].clone()
        self.withstood.sums = state["withstood_sums"].clone()
        self.withstood.counts = state["withstood_counts"].clone()


class FairRslad(Rslad, AbsldWeights):
    """Fair-RSLAD: RSLAD with the class weights of the Fair-ARD family. Source: spec, peers."""


class AbsldMargins(Absld):
    """ABSLD with CFA's class margins: a class is attacked within (0.3 + its robust accuracy in the
    epoch before) epsilon. 0.3 is CFA's for TRADES, whose attack climbs a KL as this one does; it
    begins after a twentieth of the run, as CFA after 10 epochs. Source: spec, peers (cfa,
    combinations); the twentieth: decided here."""

    offset = 0.3

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.margin = torch.ones(num_classes)
        self.robust = ClassMean(num_classes)
        self.epochs = 0

    def attacked(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        self.margin = self.margin.to(batch.labels.device)
        margin = self.margin[batch.labels].view(-1, 1, 1, 1).to(batch.x_nat.dtype)
        return super().attacked(
            student, soft_adv, batch, replace(attack, epsilon=attack.epsilon * margin)
        )

    def observe(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> None:
        super().observe(adv_logits, nat_logits, labels)
        right = (adv_logits.argmax(1) == labels).float()
        self.robust.add(*class_sums(right, labels, len(self.margin)))

    def class_means(self) -> list[ClassMean]:
        return [*super().class_means(), self.robust]

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        self.epochs += 1
        if self.epochs >= round(self.config.epochs / 20):
            self.margin = class_margins(self.robust.mean(), self.offset)
        self.robust.reset()
        return super().end_epoch(rate) | {"class_margin": self.margin}

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {
            "margin": self.margin.clone(),
            "robust_sums": self.robust.sums.clone(),
            "robust_counts": self.robust.counts.clone(),
            "epochs": torch.tensor(self.epochs),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.margin, self.epochs = state["margin"].clone(), int(state["epochs"])
        self.robust.sums = state["robust_sums"].clone()
        self.robust.counts = state["robust_counts"].clone()


class Counting:
    """An objective that counts, for each image, the attack steps that find it still right."""

    def __init__(self, objective: Objective, labels: Int[Tensor, " n"]) -> None:
        self.objective, self.labels = objective, labels
        self.right = torch.zeros_like(labels)

    def __call__(self, logits: Tensor) -> Tensor:
        self.right += logits.argmax(1) == self.labels
        return self.objective(logits)
