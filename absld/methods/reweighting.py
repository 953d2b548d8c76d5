"""Class weights: ABSLD and RSLAD combined with Fair-ARD, which weights the images of a class."""

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
    """Compute loss weights of the classes from how many attack steps their images stay robust.

    In proportion to the inverse square of the mean number of steps, of mean 1 before they are
    clipped to [lower, upper]; a class at 0 steps takes all the weight. Source: Fair-ARD (Yue et
    al., NeurIPS 2023). A class that was not seen, NaN, keeps its 1 and does not count.
    """
    seen = ~attack_steps.isnan()
    if not seen.any():
        return torch.ones_like(attack_steps)
    steps = attack_steps[seen]
    least = steps.min()
    # Relative to the least, so that 0 is the limit of small numbers and divides nothing.
    share = torch.where(steps == least, 1, (least / steps) ** 2)
    weights = torch.ones_like(attack_steps)
    weights[seen] = (len(steps) * share / share.sum()).clamp(lower, upper)
    return weights


class AbsldWeights(Absld):
    """ABSLD with Fair-ARD's class weights: a class whose images are misclassified early in the
    attack counts more in the next epoch. Source: Fair-ARD (Yue et al., NeurIPS 2023); the
    combination: arXiv 2506.08611."""

    lower, upper = 5 / 6, 5 / 2
    class_weight: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.register_buffer("class_weight", torch.ones(num_classes))
        self.robust_steps = ClassMean(num_classes)

    def adversarial_images(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        objective = CountingObjective(kl(soft_adv), batch.labels)
        x_adv = attack(student, objective, batch.x_nat, batch.noise)
        counts = objective.correct.float()
        self.robust_steps.add(*class_sums(counts, batch.labels, len(self.class_weight)))
        return x_adv

    def weights(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        return self.class_weight[labels]

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        steps = self.robust_steps.mean()
        self.class_weight = class_weights(steps, lower=self.lower, upper=self.upper)
        self.robust_steps.reset()
        report = super().end_epoch(rate)
        return report | {"robust_attack_steps": steps, "class_weight": self.class_weight}


class FairRslad(Rslad, AbsldWeights):
    """Fair-RSLAD: RSLAD with the class weights of Fair-ARD (Yue et al., NeurIPS 2023)."""

    family = "fair training"


class CountingObjective:
    """An objective that counts, for each image, the attack steps at which it is still correct."""

    def __init__(self, objective: Objective, labels: Int[Tensor, " n"]) -> None:
        self.objective, self.labels = objective, labels
        self.correct = torch.zeros_like(labels)

    def __call__(self, logits: Tensor) -> Tensor:
        self.correct += logits.argmax(1) == self.labels
        return self.objective(logits)
