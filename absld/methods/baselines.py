"""Baselines that treat all classes alike: adversarial training, TRADES, ARD, AdaAD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from absld.attack import TrainingAttack, cross_entropy, kl
from absld.data.augmentation import Batch
from absld.loss import absld_loss, soft_label_kl
from absld.methods.base import Method, Step, teacher_logits


class Sat(Method):
    """PGD adversarial training: cross-entropy on adversarial images. Source: arXiv 1706.06083."""

    family = "adversarial training"
    needs_teacher = False

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_adv = attack(student, cross_entropy(batch.labels), batch.x_nat, batch.noise)
        student.train()
        loss = F.cross_entropy(student(x_adv), batch.labels)
        return Step(loss, {"cross_entropy": loss.detach()})


class Trades(Method):
    """TRADES: cross-entropy on clean images + beta KL(f(x) || f(x_adv)), with the gradient through
    both sides of the KL. It also trains teachers. Source: arXiv 1901.08573."""

    family = "adversarial training"
    needs_teacher = False
    beta = 6.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat = batch.x_nat
        student.eval()
        with torch.no_grad():
            clean = F.softmax(student(x_nat), dim=1)
        x_adv = attack(student, kl(clean), x_nat, batch.noise)
        student.train()
        log_nat, log_adv = (F.log_softmax(student(x), dim=1) for x in (x_nat, x_adv))
        robust = F.kl_div(log_adv, log_nat, log_target=True, reduction="batchmean")
        natural = F.nll_loss(log_nat, batch.labels)
        parts = {"cross_entropy": natural.detach(), "kl": robust.detach()}
        return Step(natural + self.beta * robust, parts)


class Ard(Method):
    """Adversarially Robust Distillation: the student's predictions on adversarial images follow the
    teacher's on clean ones, both at temperature 30. Source: arXiv 1905.09747."""

    family = "robust distillation"
    settings = ("adv_weight", "kl_scale")
    distillation_temperature = 30.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        config, t = self.config, self.distillation_temperature
        soft_labels = F.softmax(teacher_logits(teacher, batch) / t, dim=1)
        x_adv = attack(student, cross_entropy(batch.labels), batch.x_nat, batch.noise)
        student.train()
        adv_logits, nat_logits = student(x_adv), student(batch.x_nat)
        adv = t**2 * soft_label_kl(adv_logits / t, soft_labels)
        nat = F.cross_entropy(nat_logits, batch.labels)
        loss = config.kl_scale * config.adv_weight * adv + (1 - config.adv_weight) * nat
        return Step(loss, {"adv_kl": adv.detach(), "cross_entropy": nat.detach()})


class AdaAd(Method):
    """Adaptive Adversarial Distillation: the attack maximises the divergence between student and
    teacher, and the teacher labels the adversarial images. Source: Huang et al., CVPR 2023."""

    family = "robust distillation"
    caches_teacher = False
    settings = ("adv_weight", "kl_scale")

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        soft_nat = F.softmax(teacher_logits(teacher, batch), dim=1)
        assert teacher is not None  # or there were no labels
        pair = StudentAndTeacher(student, teacher)
        x_adv = attack(pair, teacher_student_kl, batch.x_nat, batch.noise)
        soft_adv = F.softmax(
            teacher_logits(teacher, batch._replace(x_nat=x_adv, views=None)), dim=1
        )
        student.train()
        adv_logits, nat_logits = student(x_adv), student(batch.x_nat)
        loss = absld_loss(
            adv_logits,
            nat_logits,
            soft_adv,
            soft_nat,
            adv_weight=self.config.adv_weight,
            kl_scale=self.config.kl_scale,
        )
        parts = {
            "adv_kl": soft_label_kl(adv_logits.detach(), soft_adv),
            "nat_kl": soft_label_kl(nat_logits.detach(), soft_nat),
        }
        return Step(loss, parts)


class StudentAndTeacher(nn.Module):
    """Student and teacher as one network, for an attack on both: logits (2,N,C)."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.student(x), self.teacher(x)])


def teacher_student_kl(logits: Float[Tensor, "2 n c"]) -> Float[Tensor, ""]:
    """Objective: KL(teacher || student) of the logits of both, summed over classes and batch."""
    student, teacher = F.log_softmax(logits, dim=2)
    return F.kl_div(student, teacher, log_target=True, reduction="sum")
