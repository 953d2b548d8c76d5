"""Balance Adversarial Training: adversarial images on both sides of the decision boundary."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import TrainingAttack, geometry, kl
from absld.data.augmentation import Batch
from absld.methods.base import Method, Step


class Bat(Method):
    """Balance Adversarial Training: TRADES on the iterates of its attack that are next to the
    decision boundary, with predictions there drawn towards the uniform ones.

    Cross-entropy on the last correct iterate, beta KL(f(x) || f(first wrong one)), and the KL of
    both predictions to the uniform distribution. Source: arXiv 2209.07534.
    """

    family = "fair training"
    needs_teacher = False
    beta = 6.0

    def step(
        self, student: nn.Module, teacher: nn.Module | None, batch: Batch, attack: TrainingAttack
    ) -> Step:
        x_nat = batch.x_nat
        student.eval()
        with torch.no_grad():
            clean = F.softmax(student(x_nat), dim=1)
        last_correct, first_wrong = boundary_images(student, clean, batch, attack)
        student.train()
        log_correct, log_wrong, log_nat = (
            F.log_softmax(student(x), dim=1) for x in (last_correct, first_wrong, x_nat)
        )
        correct = F.nll_loss(log_correct, batch.labels)
        robust = F.kl_div(log_wrong, log_nat, log_target=True, reduction="batchmean")
        uniform = kl_to_uniform(log_correct) + kl_to_uniform(log_wrong)
        parts = {"cross_entropy": correct, "kl": robust, "uniform_kl": uniform}
        parts = {name: part.detach() for name, part in parts.items()}
        return Step(correct + self.beta * robust + uniform, parts)


def kl_to_uniform(log_q: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    """Compute KL(q || uniform) from log-probabilities: mean over the images."""
    return (log_q.exp() * log_q).sum(1).mean() + math.log(log_q.shape[1])


def boundary_images(
    student: nn.Module, clean: Float[Tensor, "n c"], batch: Batch, attack: TrainingAttack
) -> tuple[Float[Tensor, "n *shape"], Float[Tensor, "n *shape"]]:
    """Attack as TRADES does, and return each image's iterates around its first misclassification.

    The last iterate still classified correctly, and the first one that is not. If the start is
    misclassified, both are the start; if no iterate that a step begins at is, both are the end,
    whose class is not computed.

    clean: the student's probabilities for the clean images.
    """
    watched = WatchedNetwork(student, batch.labels, batch.x_nat + batch.noise)
    objective = kl(clean)
    # A lambda keeps the attack from being a CUDA graph, whose network would be that of this batch.
    x_adv = attack(watched, lambda logits: objective(logits), batch.x_nat, batch.noise)
    watched.keep(x_adv, watched.correct)
    project = geometry(attack.norm).project  # the start need not be an image in the ball
    last_correct, first_wrong = (
        project(x, batch.x_nat, attack.epsilon) for x in (watched.last_correct, watched.first_wrong)
    )
    return last_correct, first_wrong


class WatchedNetwork(nn.Module):
    """A network under attack that keeps each image's iterates around its first misclassification.

    Attributes:
        correct: (N,) whether all iterates so far are classified correctly.
        last_correct: (N,...) the last iterate before the first misclassification.
        first_wrong: (N,...) the first misclassified iterate; the latest where there is none.
    """

    def __init__(
        self, network: nn.Module, labels: Int[Tensor, " n"], start: Float[Tensor, "n *shape"]
    ) -> None:
        super().__init__()
        self.network, self.labels = network, labels
        self.correct = torch.ones_like(labels, dtype=torch.bool)
        self.last_correct = self.first_wrong = start

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        self.keep(x.detach(), logits.argmax(1) == self.labels)
        return logits

    def keep(self, x: Float[Tensor, "n *shape"], correct: Bool[Tensor, " n"]) -> None:
        """Take the next iterate, of which `correct` says whether it is classified correctly."""
        shape = -1, *[1] * (x.ndim - 1)
        self.first_wrong = torch.where(self.correct.view(shape), x, self.first_wrong)
        self.correct = self.correct & correct
        self.last_correct = torch.where(self.correct.view(shape), x, self.last_correct)
