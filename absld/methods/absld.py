"""Methods: each is one step of a batch on the shared leaves, and what it does after an epoch.

A step takes the student, the teacher, a batch and the training attack, and reads like the
algorithm box of its paper. The trainer does the rest. The settings that a method's paper trains
with are its recipe, in absld.config.settings.METHODS. Adding one: docs/adding-a-method.md.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import Objective, TrainingAttack, cross_entropy, kl
from absld.class_mean import ClassMean, class_sums
from absld.config.imports import import_object
from absld.config.settings import TrainConfig
from absld.data.dataset import Batch
from absld.errors import UsageError
from absld.loss import absld_loss, soft_label_kl
from absld.methods.reweighting import class_margins, class_weights
from absld.temperature import ClassTemperature


class Step(NamedTuple):
    """The loss of a batch, to be differentiated, and its parts by name (nats, no gradient)."""

    loss: Tensor
    parts: dict[str, Tensor]


class Method:
    """What the trainer asks of a method. A class, so that it may carry state between batches."""

    needs_teacher = True
    asks_clean_views = True  # alone, of the teacher: then its answers can be remembered

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        self.config = config

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        """The loss of a batch. Leaves the student in train mode."""
        raise NotImplementedError

    def class_means(self) -> list[ClassMean]:
        """What is gathered over an epoch: where several processes train, summed over them before
        it ends."""
        return []

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        """Adapt, at temperature rate `rate`; what there is to report per class (C,), by name."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """All that the next step depends on."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""


# --- Without a teacher ---


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


# --- What methods are made of ---


class Counting:
    """An objective that counts, for each image, the attack steps that find it still right."""

    def __init__(self, objective: Objective, labels: Int[Tensor, " n"]) -> None:
        self.objective, self.labels = objective, labels
        self.right = torch.zeros_like(labels)

    def __call__(self, logits: Tensor) -> Tensor:
        self.right += logits.argmax(1) == self.labels
        return self.objective(logits)


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


def taught(teacher: nn.Module | None, x: Tensor) -> Tensor:
    """The teacher's logits (N,C), without gradient. Raises UsageError without a teacher."""
    if teacher is None:
        raise UsageError("this method needs a teacher", "pass one, or use method='trades'")
    with torch.no_grad():
        logits: Tensor = teacher(x)
    return logits


METHODS: dict[str, type[Method]] = {
    "absld": Absld,
    "absld-weights": AbsldWeights,
    "absld-margins": AbsldMargins,
    "rslad": Rslad,
    "fair-rslad": FairRslad,
    "ard": Ard,
    "adaad": AdaAd,
    "trades": Trades,
    "sat": Sat,
}


def method_class(name: str) -> type[Method]:
    """The method of a name, or of package.module:Class. Raises UsageError."""
    if name in METHODS:
        return METHODS[name]
    found = import_object(name)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UsageError(
            f"{name} is no method", "needed: a class made of absld.methods.absld.Method"
        )
    return found


def build_method(config: TrainConfig, num_classes: int) -> Method:
    """The method that `config` names, at its start. Raises UsageError."""
    return method_class(config.method)(config, num_classes)
