"""Projected gradient descent in the L-infinity ball (D2) and its objectives, for training and for
the named attacks of an evaluation (absld.evaluation.attacks).

The attack takes a forward function and an objective of its outputs; teachers, labels and methods
are in the objective. Pixels, epsilon and step size are in [0,1] units.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

Objective = Callable[[Tensor], Tensor]
"""Outputs (N,C) -> scalar to maximise, summed over the batch, so that an image's gradient does not
depend on the rest of the batch."""

Budget = float | Float[Tensor, "n 1 1 1"]
"""Radius of the L-infinity ball, one for all images or one for each; pixels in [0,1]."""


def project_linf(
    x_adv: Float[Tensor, "*shape"], x_nat: Float[Tensor, "*shape"], epsilon: Budget
) -> Float[Tensor, "*shape"]:
    """Project `x_adv` into the ball of radius `epsilon` around `x_nat`, then into the box [0,1].

    The box comes last: the result is an image. Source: D2.
    """
    return x_adv.clamp(x_nat - epsilon, x_nat + epsilon).clamp(0, 1)


def pgd(
    forward: Callable[[Tensor], Tensor],
    objective: Objective,
    x_nat: Float[Tensor, "n *shape"],
    noise: Float[Tensor, "n *shape"],
    *,
    epsilon: Budget,
    step_size: float,
    steps: int,
) -> Float[Tensor, "n *shape"]:
    """Maximise `objective(forward(x))` by signed gradient steps from `x_nat + noise`, in the ball.

    The start is not clipped before the first step: noise moves it off the centre, where the
    gradient of a KL is zero. No gradients are left on parameters and no global state changes; for
    the mode of the network see `frozen_eval`. Source: D2.
    """
    x_adv = x_nat + noise
    for _ in range(steps):
        x_adv.requires_grad_()
        # Gradients for the image alone. enable_grad: callers may be under no_grad.
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(objective(forward(x_adv)), x_adv)
        step = step_size * gradient.sign()
        x_adv = project_linf(x_adv.detach() + step, x_nat, epsilon)  # D2
    return x_adv


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Set `model` to eval mode, its parameters not requiring gradients, inside the context.

    The attack then leaves batch norm alone, and no gradients of weights are computed. On leaving,
    also by an exception, the training flag of every module and `requires_grad` of every parameter
    are restored. Source: D2.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield model
    finally:
        for parameter in trainable:
            parameter.requires_grad_()
        for module, training in modes:
            module.training = training


def kl(soft_labels: Float[Tensor, "n c"]) -> Objective:
    """Make the objective KL(soft_labels || student), summed over classes and batch. Source: D2."""
    return partial(kl_to, soft_labels)


def kl_to(soft_labels: Float[Tensor, "n c"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    return F.kl_div(F.log_softmax(logits, dim=1), soft_labels, reduction="sum")


def cross_entropy(labels: Int[Tensor, " n"]) -> Objective:
    """Make the objective cross-entropy with hard labels, summed over the batch.

    Source: arXiv 1706.06083.
    """
    return partial(cross_entropy_of, labels)


def cross_entropy_of(labels: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits, labels, reduction="sum")


def margins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Compute the largest wrong logit minus the true one: above 0, the image is misclassified."""
    true = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    is_true = F.one_hot(labels, logits.shape[1]).bool()
    return logits.masked_fill(is_true, -torch.inf).amax(1) - true


def margin(labels: Int[Tensor, " n"], confidence: float = 50.0) -> Objective:
    """Make the objective of CW: margins in logits, capped at `confidence`, summed over the batch.

    Source: arXiv 1608.04644.
    """

    def objective(logits: Tensor) -> Tensor:
        return margins(logits, labels).clamp(max=confidence).sum()

    return objective


@dataclass(frozen=True)
class TrainingAttack:
    """The inner maximisation: PGD on a frozen network in eval mode.

    epsilon and step_size are in [0,1] pixel units; epsilon may differ by image. Source: D2.
    """

    epsilon: Budget
    step_size: float
    steps: int

    def __call__(
        self,
        student: nn.Module,
        objective: Objective,
        x_nat: Float[Tensor, "n *shape"],
        noise: Float[Tensor, "n *shape"],
    ) -> Float[Tensor, "n *shape"]:
        with frozen_eval(student):
            return pgd(
                student,
                objective,
                x_nat,
                noise,
                epsilon=self.epsilon,
                step_size=self.step_size,
                steps=self.steps,
            )
