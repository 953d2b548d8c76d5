"""Baselines that treat all classes alike: SAT, TRADES, MART; distillation by ARD, IAD, AdaAD."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, cross_entropy, kl
from absld.data.augmentation import Batch
from absld.loss import absld_loss, soft_label_kl
from absld.methods.base import CountsEpochs, Family, Method, Step, teacher_logits


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
    both sides of the KL. It also trains teachers. Source: arXiv 1901.08573.

    Methods that treat classes differently override `adversarial_images` and `loss`.
    """

    family: Family = "adversarial training"
    needs_teacher = False
    beta = 6.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat = batch.x_nat
        student.eval()
        with torch.no_grad():
            clean = F.softmax(student(x_nat), dim=1)
        x_adv = self.adversarial_images(student, clean, batch, attack)
        student.train()
        log_nat, log_adv = (F.log_softmax(student(x), dim=1) for x in (x_nat, x_adv))
        return self.loss(log_nat, log_adv, batch.labels)

    def adversarial_images(
        self, student: nn.Module, clean: Tensor, batch: Batch, attack: TrainingAttack
    ) -> Tensor:
        """Attack the student on a batch; clean: its probabilities (N,C) of the clean images."""
        return attack(student, kl(clean), batch.x_nat, batch.noise)

    def loss(self, log_nat: Tensor, log_adv: Tensor, labels: Int[Tensor, " n"]) -> Step:
        """Compute the loss of log-probabilities (N,C) of clean and adversarial images."""
        robust = F.kl_div(log_adv, log_nat, log_target=True, reduction="batchmean")
        natural = F.nll_loss(log_nat, labels)
        parts = {"cross_entropy": natural.detach(), "kl": robust.detach()}
        return Step(natural + self.beta * robust, parts)


def trades_terms(
    log_nat: Float[Tensor, "n c"], log_adv: Float[Tensor, "n c"], labels: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Compute the two terms of TRADES for each image, for methods that weight images: clean
    cross-entropy, and KL(clean || adversarial) of log-probabilities, in nats."""
    return F.nll_loss(log_nat, labels, reduction="none"), kl_of_logs(log_nat, log_adv)


def mean_terms(natural: Float[Tensor, " n"], robust: Float[Tensor, " n"]) -> dict[str, Tensor]:
    """Return the means of both terms of TRADES for the records, all images alike."""
    return {"cross_entropy": natural.detach().mean(), "kl": robust.detach().mean()}


class Mart(Method):
    """MART: adversarial training whose loss also lowers the strongest wrong class, plus the KL of
    TRADES, which counts less for a clean image that is classified with confidence. Source: Wang et
    al., ICLR 2020."""

    family = "adversarial training"
    needs_teacher = False
    beta = 5.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels = batch.x_nat, batch.labels
        x_adv = attack(student, cross_entropy(labels), x_nat, batch.noise)
        student.train()
        log_nat, log_adv = (F.log_softmax(student(x), dim=1) for x in (x_nat, x_adv))
        is_true = F.one_hot(labels, log_adv.shape[1]).bool()
        strongest = log_adv.masked_fill(is_true, -torch.inf).argmax(1)
        is_strongest = F.one_hot(strongest, log_adv.shape[1]).bool()
        # 1 - q'_k is the sum of all others: so it is never rounded to 0.
        log_rest = log_adv.masked_fill(is_strongest, -torch.inf).logsumexp(1)
        boosted = F.nll_loss(log_adv, labels) - log_rest.mean()
        uncertainty = 1 - (-F.nll_loss(log_nat, labels, reduction="none")).exp()
        weighted = (uncertainty * kl_of_logs(log_nat, log_adv)).mean()
        parts = {"boosted_cross_entropy": boosted.detach(), "weighted_kl": weighted.detach()}
        return Step(boosted + self.beta * weighted, parts)


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


class Iad(CountsEpochs):
    """Introspective Adversarial Distillation: as ARD, at temperature 1; and the student follows its
    own predictions on clean images as far as the teacher fails on the adversarial ones. It begins
    to do so after three tenths of the run. Source: arXiv 2106.04928."""

    family = "robust distillation"
    settings = ("adv_weight", "kl_scale")
    exponent = 0.1

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, config = batch.x_nat, batch.labels, self.config
        soft_labels = F.softmax(teacher_logits(teacher, batch), dim=1)
        x_adv = attack(student, cross_entropy(labels), x_nat, batch.noise)
        student.train()
        adv_logits, nat_logits = student(x_adv), student(x_nat)
        adv, nat = soft_label_kl(adv_logits, soft_labels), F.cross_entropy(nat_logits, labels)
        own = torch.zeros_like(adv)
        if self.epochs >= round(0.3 * config.epochs):
            of_adv = teacher_logits(teacher, batch._replace(x_nat=x_adv, views=None))
            trust = F.softmax(of_adv, dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
            log_nat, log_adv = (F.log_softmax(z, dim=1) for z in (nat_logits, adv_logits))
            own = ((1 - trust**self.exponent) * kl_of_logs(log_nat, log_adv)).mean()
        loss = config.kl_scale * config.adv_weight * (adv + own) + (1 - config.adv_weight) * nat
        parts = {"adv_kl": adv.detach(), "own_kl": own.detach(), "cross_entropy": nat.detach()}
        return Step(loss, parts)


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


def kl_of_logs(log_p: Float[Tensor, "n c"], log_q: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
    """Compute KL(p || q) of each image from log-probabilities, with the gradient through both."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
