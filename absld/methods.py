"""Methods: each is one step of a batch on the shared leaves, and what it does after an epoch.

A step takes the student, the teacher, a batch and the training attack, and reads like the
algorithm box of its paper. The trainer does the rest.
"""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from absld.attack import TrainingAttack, kl
from absld.config import TrainConfig
from absld.data import Batch
from absld.errors import UsageError
from absld.loss import absld_loss, soft_label_kl
from absld.temperature import ClassTemperature


class Step(NamedTuple):
    """The loss of a batch, to be differentiated, and its parts by name (nats, no gradient)."""

    loss: Tensor
    parts: dict[str, Tensor]


class Method(Protocol):
    """What the trainer asks of a method. A class, so that it may carry state between batches."""

    needs_teacher: bool

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        """The loss of a batch. Leaves the student in train mode."""

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        """Adapt, at temperature rate `rate`; what there is to report per class (C,), by name."""

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""


class Absld:
    """Anti-Bias Soft Label Distillation: D1 to D6."""

    needs_teacher = True

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.adv_weight, self.kl_scale = config.adv_weight, config.kl_scale
        self.temperature = ClassTemperature(
            num_classes,
            lower=config.temperature_lower,
            upper=config.temperature_upper,
            fidelity=config.fidelity,
        )

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat, labels, noise = batch
        soft_adv, soft_nat = self.temperature.soft_labels(taught(teacher, x_nat), labels)
        x_adv = attack(student, kl(soft_adv), x_nat, noise)
        student.train()
        # Two forwards in this order: batch norm sees the adversarial images first, never both
        # at once.
        adv_logits, nat_logits = student(x_adv), student(x_nat)  # D3
        self.temperature.observe(adv_logits, nat_logits, labels)
        loss = absld_loss(
            adv_logits,
            nat_logits,
            soft_adv,
            soft_nat,
            adv_weight=self.adv_weight,
            kl_scale=self.kl_scale,
        )
        parts = {
            "adv_kl": soft_label_kl(adv_logits.detach(), soft_adv),
            "nat_kl": soft_label_kl(nat_logits.detach(), soft_nat),
        }
        return Step(loss, parts)

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
        self.temperature.load_state_dict(state)


class Rslad(Absld):
    """Robust Soft Label Adversarial Distillation: ABSLD whose temperatures stay 1."""

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        return super().end_epoch(0.0)


class Trades:
    """TRADES: cross-entropy on clean images + beta KL(f(x) || f(x_adv)), gradient through both
    sides of the KL. It needs no teacher, and makes teachers. Source: spec, peers."""

    needs_teacher = False
    beta = 6.0

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        pass

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

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        pass


METHODS: dict[str, type[Absld] | type[Trades]] = {
    "absld": Absld,
    "rslad": Rslad,
    "trades": Trades,
}


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """The method that `config` names, at its start."""
    return METHODS[config.method](config, num_classes)


def taught(teacher: nn.Module | None, x_nat: Tensor) -> Tensor:
    """The teacher's logits (N,C) of clean images. Raises UsageError without a teacher."""
    if teacher is None:
        raise UsageError("this method needs a teacher", "pass one, or use method='trades'")
    with torch.no_grad():
        logits: Tensor = teacher(x_nat)
    return logits
