"""Anti-Bias Soft Label Distillation, and RSLAD, which it becomes with all temperatures 1."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, kl
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.loss import absld_loss, soft_label_kl
from absld.methods.base import Family, Method, Step, teacher_logits
from absld.temperature import ClassTemperature


class Absld(Method):
    """Anti-Bias Soft Label Distillation: D1 to D6. Source: arXiv 2312.05508.

    Combinations with other ideas override `adversarial_images`, `observe` and `weights`.
    """

    family: Family = "ABSLD"
    settings: tuple[str, ...] = (
        "adv_weight", "kl_scale", "fidelity",
        "temperature_rate", "temperature_lower", "temperature_upper",
        "temperature_start", "temperature_move",
    )  # fmt: skip

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        lower, upper = config.temperature_lower, config.temperature_upper
        given = config.temperature_start
        # Where it is calibrated, `begin` computes it.
        start: float = min(max(1.0, lower), upper) if isinstance(given, str) else given
        self.temperature = ClassTemperature(
            num_classes,
            lower=lower,
            upper=upper,
            start=start,
            move=config.temperature_move,
            fidelity=config.fidelity,
        )

    def begin(self, calibrated: Callable[[], float]) -> str:
        if self.config.temperature_start != "calibrated":
            return ""
        best = calibrated()
        start = self.temperature.start_at(best)
        of = "temperature of least cross-entropy on the validation images"
        if start == best:
            return f"class temperatures start at {start:.4g}, the teacher's {of}"
        flag = "lower" if best < start else "upper"
        return (
            f"class temperatures start at {start:.4g}: the teacher's {of}, {best:.4g}, is outside "
            f"their bounds (--temperature-{flag})"
        )

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels = batch.x_nat, batch.labels
        soft_adv, soft_nat = self.temperature.soft_labels(teacher_logits(teacher, batch), labels)
        x_adv = self.adversarial_images(student, soft_adv, batch, attack)
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

    def adversarial_images(
        self, student: nn.Module, soft_adv: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        """Attack the student on a batch. Source: D2."""
        return attack(student, kl(soft_adv), batch.x_nat, batch.noise)

    def observe(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> None:
        """Add the training logits of a batch to the class risks. Source: D5."""
        self.temperature.observe(adv_logits, nat_logits, labels)

    def weights(self, labels: Int[Tensor, " n"]) -> Float[Tensor, " n"] | None:
        """Return factors of the images in the loss; None where all count alike."""
        return None

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        risk = self.temperature.step(rate)
        return {
            "temperature_adv": self.temperature.adv,
            "temperature_nat": self.temperature.nat,
            "class_risk_adv": risk.adv,
            "class_risk_nat": risk.nat,
        }


class Rslad(Absld):
    """Robust Soft Label Adversarial Distillation: ABSLD whose temperatures stay 1.

    Source: arXiv 2108.07969.
    """

    family: Family = "robust distillation"
    settings = ("adv_weight", "kl_scale")

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        one = replace(config, temperature_lower=1.0, temperature_start=1.0, temperature_upper=1.0)
        super().__init__(one, num_classes)

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        return super().end_epoch(0.0)
