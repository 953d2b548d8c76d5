"""Methods that ABSLD is compared with, class-blind: adversarial training, TRADES, ARD, AdaAD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from absld.attack import TrainingAttack, cross_entropy, kl
from absld.data.augmentation import Batch
from absld.loss import absld_loss, soft_label_kl
from absld.methods.base import Method, Step, taught


class Sat(Method):
    """Adversarial training: cross-entropy on images that raise it. Source: spec, peers."""

    needs_teacher = False

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, noise = batch
        x_adv = attack(student, cross_entropy(labels), x_nat, noise)
        loss = F.cross_entropy(student.train()(x_adv), labels)
        return Step(loss, {"cross_entropy": loss.detach()})


class Trades(Method):
    """TRADES: cross-entropy on clean images + beta KL(f(x) || f(x_adv)), gradient through both
    sides of the KL. It makes teachers. Source: spec, peers."""

    needs_teacher = False
    beta = 6.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, noise = batch
        with torch.no_grad():
            clean = F.softmax(student.eval()(x_nat), dim=1)
        x_adv = attack(student, kl(clean), x_nat, noise)
        student.train()
        log_nat, log_adv = (F.log_softmax(student(x), dim=1) for x in (x_nat, x_adv))
        robust = F.kl_div(log_adv, log_nat, log_target=True, reduction="batchmean")
        natural = F.nll_loss(log_nat, labels)
        parts = {"cross_entropy": natural.detach(), "kl": robust.detach()}
        return Step(natural + self.beta * robust, parts)


class Ard(Method):
    """Adversarially Robust Distillation: images that raise the cross-entropy are to be judged as
    the teacher judges the clean ones, both at temperature 30. Source: spec, peers."""

    distillation_temperature = 30.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, noise = batch
        t = self.distillation_temperature
        soft_labels = F.softmax(taught(teacher, x_nat) / t, dim=1)
        x_adv = attack(student, cross_entropy(labels), x_nat, noise)
        student.train()
        adv_logits, nat_logits = student(x_adv), student(x_nat)
        adv = t**2 * soft_label_kl(adv_logits / t, soft_labels)
        nat = F.cross_entropy(nat_logits, labels)
        loss = self.config.adv_weight * adv + (1 - self.config.adv_weight) * nat
        return Step(loss, {"adv_kl": adv.detach(), "cross_entropy": nat.detach()})


class AdaAd(Method):
    """Adaptive Adversarial Distillation: the attack drives student and teacher apart, and the
    teacher says of those images what they are. Source: spec, peers."""

    asks_clean_views = False

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, _, noise = batch
        soft_nat = F.softmax(taught(teacher, x_nat), dim=1)
        assert teacher is not None  # or there were no labels
        x_adv = attack(Both(student, teacher), apart, x_nat, noise)
        soft_adv = F.softmax(taught(teacher, x_adv), dim=1)
        student.train()
        adv_logits, nat_logits = student(x_adv), student(x_nat)
        loss = absld_loss(
            adv_logits, nat_logits, soft_adv, soft_nat, adv_weight=self.config.adv_weight
        )
        parts = {
            "adv_kl": soft_label_kl(adv_logits.detach(), soft_adv),
            "nat_kl": soft_label_kl(nat_logits.detach(), soft_nat),
        }
        return Step(loss, parts)


class Both(nn.Module):
    """Student and teacher as one network, for an attack on both: logits (2,N,C)."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.student(x), self.teacher(x)])


def apart(logits: Float[Tensor, "2 n c"]) -> Float[Tensor, ""]:
    """Objective: KL(teacher || student) of the logits of both, summed over classes and batch."""
    student, teacher = F.log_softmax(logits, dim=2)
    return F.kl_div(student, teacher, log_target=True, reduction="sum")
