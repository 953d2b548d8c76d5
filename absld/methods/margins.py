"""Class margins: a class that is more robust is attacked within a larger ball. CFA, and ABSLD
combined with it."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, cross_entropy, frozen_eval
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.methods.absld import Absld
from absld.methods.base import CountsEpochs, Step
from absld.methods.baselines import Trades, mean_terms, trades_terms
from absld.metrics import ClassMean, class_sums


def class_margins(robust_accuracy: Float[Tensor, " c"], offset: float) -> Float[Tensor, " c"]:
    """Compute factors of the classes, of epsilon or of TRADES' beta: offset + robust accuracy.

    robust_accuracy in [0,1]; a class that was not seen, NaN, has 1. Source: CFA (arXiv 2303.14460).
    """
    return torch.where(robust_accuracy.isnan(), 1, offset + robust_accuracy)


class ClassMargins(CountsEpochs):
    """The part that methods with class margins share: a class is attacked within (0.3 + its robust
    accuracy in the epoch before) epsilon.

    The accuracy is that on adversarial training images. 0.3 is CFA's for TRADES; it begins after a
    twentieth of the run, as CFA after 10 epochs of 200. Source: arXiv 2303.14460; the twentieth:
    decided here.
    """

    offset = 0.3
    margin: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.register_buffer("margin", torch.ones(num_classes))
        self.robust = ClassMean(num_classes)

    def within_margins(self, attack: TrainingAttack, batch: Batch) -> TrainingAttack:
        """Return the attack with an epsilon for each image."""
        margin = self.margin[batch.labels].view(-1, 1, 1, 1)
        return replace(attack, epsilon=attack.epsilon * margin.to(batch.x_nat.dtype))

    def adapt(self, robust_accuracy: Float[Tensor, " c"]) -> None:
        """Set the factors of the next epoch."""
        self.margin = class_margins(robust_accuracy, self.offset)

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        report = super().end_epoch(rate)
        if self.epochs >= round(self.config.epochs / 20):
            self.adapt(self.robust.mean())
        self.robust.reset()
        return report | {"class_margin": self.margin}


def count_correct(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " c"], Int[Tensor, " c"]]:
    """Count the correct predictions and the images of each class."""
    return class_sums((logits.argmax(1) == labels).float(), labels, logits.shape[1])


class AbsldMargins(ClassMargins, Absld):
    """ABSLD with CFA's class margins, for TRADES, whose attack maximises a KL as this one does."""

    def adversarial_images(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        attack = self.within_margins(attack, batch)
        return super().adversarial_images(student, soft_adv, batch, attack)

    def observe(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> None:
        super().observe(adv_logits, nat_logits, labels)
        self.robust.add(*count_correct(adv_logits, labels))


class Cfa(ClassMargins, Trades):
    """Class-wise calibrated Fair Adversarial training on TRADES: class margins, a class's weight of
    the KL, and an average of the weights of fair epochs.

    The loss of an image of class k is (cross-entropy + beta_k KL) / (1 + beta_k), beta_k = (0.5 +
    the class's robust accuracy in the epoch before) 6. Where weights are averaged (a setting of its
    recipe), an epoch enters if every class of the held-out images has an accuracy of at least 0.2
    under the training attack on the cross-entropy. Source: arXiv 2303.14460.
    """

    family = "fair training"
    beta_offset = 0.5
    least_accuracy = 0.2
    class_beta: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.register_buffer("class_beta", torch.full((num_classes,), self.beta))
        self.held_out = ClassMean(num_classes)
        self.uses_validation = config.weight_averaging > 0

    def adversarial_images(
        self, student: nn.Module, clean: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        attack = self.within_margins(attack, batch)
        return super().adversarial_images(student, clean, batch, attack)

    def loss(self, log_nat: Tensor, log_adv: Tensor, labels: Int[Tensor, " n"]) -> Step:
        self.robust.add(*count_correct(log_adv, labels))
        natural, robust = trades_terms(log_nat, log_adv, labels)
        beta = self.class_beta[labels]
        loss = ((natural + beta * robust) / (1 + beta)).mean()
        return Step(loss, mean_terms(natural, robust))

    def adapt(self, robust_accuracy: Float[Tensor, " c"]) -> None:
        super().adapt(robust_accuracy)
        self.class_beta = self.beta * class_margins(robust_accuracy, self.beta_offset)

    def observe_validation(
        self, student: nn.Module, batches: Iterable[Batch], attack: TrainingAttack
    ) -> None:
        self.held_out.reset()
        for batch in batches:
            x_adv = attack(student, cross_entropy(batch.labels), batch.x_nat, batch.noise)
            with frozen_eval(student), torch.no_grad():
                logits = student(x_adv)
            self.held_out.add(*count_correct(logits, batch.labels))

    def accepts_epoch(self) -> bool:
        accuracy = self.held_out.mean()
        return bool((accuracy.isnan() | (accuracy >= self.least_accuracy)).all())

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        report = super().end_epoch(rate) | {"class_beta": self.class_beta}
        if self.uses_validation:
            report["held_out_robust"] = self.held_out.mean()
            self.held_out.reset()
        return report
