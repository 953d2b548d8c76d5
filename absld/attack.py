"""Projected gradient descent in a ball (D2) and its objectives, for training and for the named
attacks of an evaluation (absld.evaluation.attacks).

The attack takes a forward function and an objective of its outputs; teachers, labels and methods
are in the objective. Pixels, epsilon and step size are in [0,1] units. The ball is that of the
L-infinity norm, as in D2, or of the L2 norm of all pixels and channels of an image.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.errors import UsageError
from absld.module_locks import hold
from absld.norms import NORM_NAMES, Norm
from absld.shapes import check_shape

Objective = Callable[[Tensor], Tensor]
"""Outputs (N,C) -> scalar to maximise, summed over the batch, so that an image's gradient does not
depend on the rest of the batch."""

Budget = float | Float[Tensor, "n 1 1 1"]
"""Radius of the ball, one for all images or one for each; pixels in [0,1]."""


def project_linf(
    x_adv: Float[Tensor, "*shape"], x_nat: Float[Tensor, "*shape"], epsilon: Budget
) -> Float[Tensor, "*shape"]:
    """Project into the L-infinity ball of radius `epsilon` around `x_nat`, then into the box [0,1].

    The box comes last: the result is an image. Raises ValueError for a negative epsilon. Source:
    D2.
    """
    check_radius(epsilon, x_nat)
    return x_adv.clamp(x_nat - epsilon, x_nat + epsilon).clamp(0, 1)


def project_l2(
    x_adv: Float[Tensor, "n *shape"], x_nat: Float[Tensor, "n *shape"], epsilon: Budget
) -> Float[Tensor, "n *shape"]:
    """Project into the L2 ball of radius `epsilon` around each image, then into the box [0,1].

    The box comes last, as in AutoAttack and foolbox: the result is an image. It stays in the ball,
    since no pixel moves away from that of an image `x_nat` by a clamp to [0,1]. Raises ValueError
    for a negative epsilon. Source: arXiv 1706.06083.
    """
    check_radius(epsilon, x_nat)
    delta = x_adv - x_nat
    distance: Tensor = torch.linalg.vector_norm(delta, dim=pixel_dims(delta), keepdim=True)
    on_sphere = x_nat + epsilon * normalize_l2(delta)
    return torch.where(distance <= epsilon, x_adv, on_sphere).clamp(0, 1)


def normalize_l2(gradient: Float[Tensor, "n *shape"]) -> Float[Tensor, "n *shape"]:
    """Divide each image by its L2 norm; one that is zero stays zero.

    The largest entry is divided out first: else squares of tiny gradients would vanish, and a
    network could hide by small logits. An entry that is NaN counts as 0, and one that is infinite
    as the largest: a network cannot hide an image by one of its pixels.
    """
    dims = pixel_dims(gradient)
    gradient = gradient.nan_to_num()
    largest = gradient.abs().amax(dims, keepdim=True)
    scaled = torch.where(largest == 0, 0.0, gradient / largest)
    norm: Tensor = torch.linalg.vector_norm(scaled, dim=dims, keepdim=True)
    return scaled / norm.clamp_min(1)  # at least 1, but for a zero image


def pixel_dims(x: Tensor) -> tuple[int, ...]:
    """Return all dimensions but that of the batch. Raises ValueError if there is no other."""
    if x.ndim < 2:
        raise ValueError(f"images must have pixels, not the shape {tuple(x.shape)}")
    return tuple(range(1, x.ndim))


class Geometry(NamedTuple):
    """A norm's projection into ball and box, and its direction of steepest ascent of unit norm."""

    project: Callable[[Tensor, Tensor, Budget], Tensor]
    steepest: Callable[[Tensor], Tensor]


GEOMETRIES = {
    "linf": Geometry(project_linf, torch.sign),
    "l2": Geometry(project_l2, normalize_l2),
}


def geometry(norm: Norm) -> Geometry:
    """Return the geometry of a norm. Raises ValueError for a name that is not one."""
    if norm not in GEOMETRIES:
        raise ValueError(f"norm must be one of {', '.join(NORM_NAMES)}, not {norm!r}")
    return GEOMETRIES[norm]


def uniform_noise_(noise: Tensor, epsilon: float, norm: Norm, random: torch.Generator) -> Tensor:
    """Fill `noise` (n,...) with points drawn uniformly in the ball of radius `epsilon`."""
    geometry(norm)
    if norm == "linf":
        return noise.uniform_(-epsilon, epsilon, generator=random)
    # A normal has every direction alike, and a ball of radius r the share r^d of the volume.
    shape = len(noise), *[1] * (noise.ndim - 1)
    direction = normalize_l2(noise.normal_(generator=random))
    share = torch.rand(shape, generator=random, device=noise.device, dtype=noise.dtype)
    return noise.copy_(epsilon * share ** (1 / math.prod(noise.shape[1:])) * direction)


def check_radius(epsilon: Budget, x_nat: Tensor, name: str = "epsilon") -> None:
    """Raise ValueError for a negative radius, NaN, or radii of another shape than (N,1,...,1).

    Radii on an accelerator are not read, which would wait for it.
    """
    if isinstance(epsilon, Tensor):
        check_shape(name, epsilon, len(x_nat), *[1] * (x_nat.ndim - 1))
        on_cpu = epsilon.device.type == "cpu"
        epsilon = epsilon.detach().float().numpy().min(initial=0.0) if on_cpu else 0.0
    if not epsilon >= 0:
        raise ValueError(f"{name} must be 0 or more, not {epsilon:g}")


def check_noise(noise: Tensor, x_nat: Tensor) -> None:
    """Raise ValueError for noise of another shape than the images, or, on a CPU, not finite."""
    check_shape("noise", noise, *x_nat.shape)
    if noise.device.type == "cpu" and noise.numel() and not math.isfinite(sum(noise.aminmax())):
        raise ValueError("noise must be finite")


def pgd(
    forward: Callable[[Tensor], Tensor],
    objective: Objective,
    x_nat: Float[Tensor, "n *shape"],
    noise: Float[Tensor, "n *shape"],
    *,
    epsilon: Budget,
    step_size: Budget,
    steps: int,
    norm: Norm = "linf",
) -> Float[Tensor, "n *shape"]:
    """Maximise `objective(forward(x))` in the ball by steps of `step_size` from `x_nat + noise`.

    A step goes along the sign of the gradient, or in the L2 norm along the gradient of each image;
    where that is zero, there is no step. The start is not clipped before the first step: noise
    moves it off the centre, where the gradient of a KL is zero. Without a step, the start is
    projected. No gradients are left on parameters and no global state changes; for the mode of the
    network see `frozen_eval`. Source: D2; for L2 arXiv 1706.06083.

    Args:
        forward: from images to the outputs that the objective takes, such as a network.
        objective: from outputs to a scalar, summed over the batch.
        x_nat: natural images, pixels in [0,1].
        noise: where the attack starts, relative to `x_nat`; of the same shape.
        epsilon: radius of the ball, one for all images or (N,1,1,1).
        step_size: length of a step, in the norm; one for all images or (N,1,1,1).
        steps: number of steps.
        norm: of the ball, "linf" or "l2".

    Returns:
        Adversarial images, in the ball and in [0,1].

    Raises:
        ValueError: for a negative epsilon, step size or number of steps, or another norm; see also
            `check_noise`.
        UsageError: if no gradient reaches the images.
    """
    project, steepest = geometry(norm)
    check_noise(noise, x_nat)
    check_radius(step_size, x_nat, "step_size")
    if steps < 0 or (isinstance(step_size, float) and math.isinf(step_size)):
        raise ValueError(f"steps must be 0 or more of a finite step_size, not {steps}")
    x_adv = x_nat + noise
    for _ in range(steps):
        x_adv.requires_grad_()
        # Gradients for the image alone. enable_grad: callers may be under no_grad.
        with torch.enable_grad():
            gradient = input_gradient(objective(forward(x_adv)), x_adv)
        step = step_size * steepest(gradient)
        x_adv = project(x_adv.detach() + step, x_nat, epsilon)  # D2
    return x_adv if steps else project(x_adv, x_nat, epsilon)


def input_gradient(value: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of `value` with respect to `x`. Raises UsageError if there is none."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, x, allow_unused=True)
    if gradient is None:
        raise UsageError(
            "no gradient reaches the images: the network cuts it, or torch.inference_mode is on",
            "a forward without detach, rounding or no_grad, called outside of inference_mode",
        )
    return gradient


@contextmanager
def frozen_eval(model: nn.Module) -> Iterator[nn.Module]:
    """Set `model` to eval mode, its parameters not requiring gradients, inside the context.

    The attack then leaves batch norm alone, and no gradients of weights are computed. On leaving,
    also by an exception, the training flag of every module and `requires_grad` of every parameter
    are restored. Another thread that asks for one of these modules waits until then. Source: D2.
    """
    modules = list(model.modules())
    with hold(modules):
        modes = [module.training for module in modules]
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            model.eval()
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield model
        finally:
            for parameter in trainable:
                parameter.requires_grad_()
            for module, training in zip(modules, modes, strict=True):
                module.training = training


def kl(soft_labels: Float[Tensor, "n c"]) -> Objective:
    """Make the objective KL(soft_labels || student), summed over classes and batch. Source: D2."""
    return partial(kl_to, soft_labels)


def kl_to(soft_labels: Float[Tensor, "n c"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    check_shape("soft_labels", soft_labels, *logits.shape)
    return F.kl_div(F.log_softmax(logits, dim=1), soft_labels, reduction="sum")


def cross_entropy(labels: Int[Tensor, " n"]) -> Objective:
    """Make the objective cross-entropy with hard labels in 0..C-1, summed over the batch.

    By torch's convention an image of label -100 is left out, and so not attacked.
    Source: arXiv 1706.06083.
    """
    return partial(cross_entropy_of, labels)


def cross_entropy_of(labels: Int[Tensor, " n"], logits: Float[Tensor, "n c"]) -> Float[Tensor, ""]:
    return F.cross_entropy(logits, labels, reduction="sum")


def margins(logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Compute the largest wrong logit minus the true one: above 0, the image is misclassified."""
    check_shape("labels", labels, len(logits))
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
    """The inner maximisation: PGD on a frozen network in eval mode; see `pgd`. Source: D2.

    Attributes:
        epsilon: radius of the ball, pixels in [0,1]; it may differ by image.
        step_size: length of a step, in the norm; it may differ by image.
        steps: number of steps.
        norm: of the ball, "linf" or "l2".
    """

    epsilon: Budget
    step_size: Budget
    steps: int
    norm: Norm = "linf"

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
                norm=self.norm,
            )
