"""TRADES with class weights that follow the figures of held-out images: WAT and FRL.

The functions are pure: from one figure a class, NaN for a class without held-out images.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, cross_entropy, frozen_eval
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.methods.base import Step
from absld.methods.baselines import Trades, mean_terms, trades_terms
from absld.metrics import ClassMean, class_sums

# --- WAT ---


def hedge_weights(total_costs: Float[Tensor, " experts"], rate: float) -> Float[Tensor, " experts"]:
    """Compute the weights of C classes and, last, of their mean, from their costs so far (nats).

    In proportion to exp(rate * cost), with sum C. Source: WAT (arXiv 2302.04025).
    """
    return (len(total_costs) - 1) * F.softmax(rate * total_costs, dim=0)


class Wat(Trades):
    """Worst-class adversarial training: TRADES with class weights by the Hedge rule, whose experts
    are the classes and their mean, and whose costs are the losses of held-out images.

    An image weighs the weight of its class plus that of the mean. Source: Li and Liu, arXiv 2302.04025.
    """

    family = "fair training"
    uses_validation = True
    rate = 0.1
    most = 1e4  # nats of cost in an epoch: of an infinite one the sum stays finite
    class_weight: Tensor
    total_costs: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        self.register_buffer("class_weight", torch.full((num_classes,), 2.0))
        self.register_buffer("total_costs", torch.zeros(num_classes + 1))
        self.cost = ClassMean(num_classes)

    def loss(self, log_nat: Tensor, log_adv: Tensor, labels: Int[Tensor, " n"]) -> Step:
        natural, robust = trades_terms(log_nat, log_adv, labels)
        weight = self.class_weight[labels]
        loss = (weight * (natural + self.beta * robust)).mean()
        return Step(loss, mean_terms(natural, robust))

    def observe_validation(
        self, student: nn.Module, batches: Iterable[Batch], attack: TrainingAttack
    ) -> None:
        self.cost.reset()
        with frozen_eval(student), torch.no_grad():
            for batch in batches:
                log_nat = F.log_softmax(student(batch.x_nat), dim=1)
                x_adv = self.adversarial_images(student, log_nat.exp(), batch, attack)
                log_adv = F.log_softmax(student(x_adv), dim=1)
                natural, robust = trades_terms(log_nat, log_adv, batch.labels)
                cost = natural + self.beta * robust
                self.cost.add(*class_sums(cost, batch.labels, len(self.class_weight)))

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        by_class, overall = self.cost.mean(), self.cost.mean_of_all()
        costs = torch.cat([by_class, overall.unsqueeze(0)])
        # A class without held-out images moves with the mean.
        costs = torch.where(costs.isnan(), overall, costs).nan_to_num(0.0)
        self.total_costs = self.total_costs + costs.clamp(max=self.most)
        weights = hedge_weights(self.total_costs, self.rate)
        self.class_weight = weights[:-1] + weights[-1]
        self.cost.reset()
        return {"held_out_loss": by_class, "class_weight": self.class_weight}


# --- FRL ---


def raise_multipliers(
    multipliers: Float[Tensor, " c"],
    errors: Float[Tensor, " c"],
    overall: Float[Tensor, ""],
    *,
    rate: float,
    slack: float,
    most: float,
) -> Float[Tensor, " c"]:
    """Compute the multipliers of the constraints that no class errs more than all do, plus `slack`.

    A step of gradient ascent, kept at 0 or more, and of sum `most` or less. errors, and that of all
    images: in [0,1]. A class without held-out images, NaN, keeps its multiplier. Source: FRL (arXiv
    2010.06121).
    """
    excess = (errors - overall - slack).nan_to_num(0.0)
    raised = (multipliers + rate * excess).clamp(min=0)
    return raised * (most / raised.sum().clamp(min=most))


def cost_sensitive_weights(multipliers: Float[Tensor, "... c"]) -> Float[Tensor, "... c"]:
    """Compute class weights of sum 1 from multipliers: what one class gains, all others pay.

    Source: FRL (arXiv 2010.06121), for C classes: 1/C + (1 - 1/C) m_c - 1/C of the others.
    """
    classes = multipliers.shape[-1]
    return multipliers + (1 - multipliers.sum(-1, keepdim=True)) / classes


class Frl(Trades):
    """Fair Robust Learning, its reweighting: fine-tunes a robust network by TRADES, with weights of
    the classes that follow their clean and boundary errors on held-out images.

    Boundary error: correct clean, and not under PGD-20. Source: Xu et al., arXiv 2010.06121.
    """

    family = "fair training"
    uses_validation = True
    needs_robust_start = True
    beta = 1.5
    rate, slack, most, steps = 0.05, 0.1, 0.5, 20
    multipliers: Tensor

    def __init__(self, config: TrainConfig, num_classes: int) -> None:
        super().__init__(config, num_classes)
        # Of clean and of boundary errors.
        self.register_buffer("multipliers", torch.zeros(2, num_classes))
        self.clean_error, self.boundary_error = ClassMean(num_classes), ClassMean(num_classes)

    def loss(self, log_nat: Tensor, log_adv: Tensor, labels: Int[Tensor, " n"]) -> Step:
        terms = trades_terms(log_nat, log_adv, labels)
        weights = cost_sensitive_weights(self.multipliers)[:, labels]
        # Each term is divided by the weights of all images of the batch.
        mean_weight = weights.mean(1)
        self.all_reduce_mean_([mean_weight])
        natural, robust = (torch.stack(terms) * weights).mean(1) / mean_weight
        return Step(natural + self.beta * robust, mean_terms(*terms))

    def observe_validation(
        self, student: nn.Module, batches: Iterable[Batch], attack: TrainingAttack
    ) -> None:
        attack = replace(attack, steps=self.steps)
        self.clean_error.reset()
        self.boundary_error.reset()
        with frozen_eval(student), torch.no_grad():
            for x_nat, labels, noise, _ in batches:
                clean = (student(x_nat).argmax(1) == labels).float()
                x_adv = attack(student, cross_entropy(labels), x_nat, noise)
                robust = (student(x_adv).argmax(1) == labels).float()
                classes = self.multipliers.shape[1]
                self.clean_error.add(*class_sums(1 - clean, labels, classes))
                self.boundary_error.add(*class_sums(clean - robust, labels, classes))

    def end_epoch(self, rate: float) -> dict[str, Tensor]:
        clean, boundary = self.clean_error.mean(), self.boundary_error.mean()
        of_all = self.clean_error.mean_of_all(), self.boundary_error.mean_of_all()
        raised = partial(raise_multipliers, slack=self.slack, most=self.most)
        self.multipliers = torch.stack(
            [
                raised(self.multipliers[0], clean, of_all[0], rate=self.rate),
                raised(self.multipliers[1], boundary, of_all[1], rate=2 * self.rate),
            ]
        )
        self.clean_error.reset()
        self.boundary_error.reset()
        nat, adv = cost_sensitive_weights(self.multipliers)
        return {
            "clean_error": clean,
            "boundary_error": boundary,
            "class_weight_nat": nat,
            "class_weight_adv": adv,
        }
