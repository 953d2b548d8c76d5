"""Methods: each is one step of a batch on the shared leaves, and what it does after an epoch.

A step takes the student, the teacher, a batch and the training attack, and reads like the
algorithm box of its paper. The trainer does the rest. The settings that a method's paper trains
with are its recipe, in absld.config.settings.METHODS. Adding one: docs/adding-a-method.md.
"""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, kl
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.loss import absld_loss, soft_label_kl
from absld.methods.base import Method, Step, taught
from absld.metrics import ClassMean
from absld.temperature import ClassTemperature

# --- Without a teacher ---


# --- Distillation ---


class Absld(Method):
    """Anti-Bias Soft Label Distillation: D1 to D6.

    `attacked`, `observe` and `weights` are what combinations with other ideas change.
    """

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.temperature = ClassTemperature(
            num_classes,
            lower=config.temperature_lower,
            upper=config.temperature_upper,
            fidelity=config.fidelity,
        )

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, _ = batch
        soft_adv, soft_nat = self.temperature.soft_labels(taught(teacher, x_nat), labels)
        x_adv = self.attacked(student, soft_adv, batch, attack)
        student.train()
        # Two forwards in this order: batch norm sees the adversarial images first, never both
        # at once.
        adv_logits, nat_logits = student(x_adv), student(x_nat)  # D3
        self.observe(adv_logits, nat_logits, labels)
        loss = absld_loss(
            adv_logits,
            nat_logits,
            soft_adv,
            soft_nat,
            adv_weight=self.config.adv_weight,
            kl_scale=self.config.kl_scale,
            weights=self.weights(labels),
        )
        parts = {
            "adv_kl": soft_label_kl(adv_logits.detach(), soft_adv),
            "nat_kl": soft_label_kl(nat_logits.detach(), soft_nat),
        }
        return Step(loss, parts)

    def attacked(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        """The adversarial images of a batch. Source: D2."""
        return attack(student, kl(soft_adv), batch.x_nat, batch.noise)

    def observe(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> None:
        """Take the logits of a batch into what the epoch's end needs. Source: D5."""
        self.temperature.observe(adv_logits, nat_logits, labels)

    def weights(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        """Factors of the images in the loss; None where all count alike."""
        return None

    def class_means(self) -> list[ClassMean]:
        return [self.temperature.adv_risk, self.temperature.nat_risk]

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        risk = self.temperature.step(rate)
        return {
            "temperature_adv": self.temperature.adv,
            "temperature_nat": self.temperature.nat,
            "class_risk_adv": risk.adv,
            "class_risk_nat": risk.nat,
        }

    def state_dict(self) -> dict[str, Tensor]:
        return self.temperature.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.temperature.load_state_dict({k: state[k] for k in self.temperature.state_dict()})


class Rslad(Absld):
    """Robust Soft Label Adversarial Distillation: ABSLD whose temperatures stay 1."""

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        return super().end_epoch(0.0)


# --- What methods are made of ---
