"""The loss of the method (D4): from logits and soft labels to a scalar."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from absld.shapes import check_shape


def soft_label_kl(
    logits: Float[Tensor, "n c"],
    soft_labels: Float[Tensor, "n c"],
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute KL(soft_labels || softmax(logits)) in nats: summed over classes, mean over images.

    The student's temperature is 1, and no factor T^2 compensates the teacher's. Finite for logits
    up to 1e4: the logarithm is taken by log_softmax. Source: D4.

    Args:
        logits: (N,C) of the student.
        soft_labels: (N,C); rows sum to 1.
        weights: (N,) factors of the images, for methods that have them.

    Raises:
        ValueError: for other shapes.
    """
    check_shape("logits", logits, "N", "C")
    check_shape("soft_labels", soft_labels, *logits.shape)
    log_q = F.log_softmax(logits, dim=1)
    if weights is None:
        return F.kl_div(log_q, soft_labels, reduction="batchmean")
    check_shape("weights", weights, len(logits))
    return (weights * F.kl_div(log_q, soft_labels, reduction="none").sum(1)).mean()


def absld_loss(
    adv_logits: Float[Tensor, "n c"],
    nat_logits: Float[Tensor, "n c"],
    soft_adv: Float[Tensor, "n c"],
    soft_nat: Float[Tensor, "n c"],
    *,
    adv_weight: float = 5 / 6,
    kl_scale: float = 1.0,
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Compute adv_weight KL(soft_adv || adv) + (1 - adv_weight) KL(soft_nat || nat), in nats.

    Source: D4.

    Args:
        adv_logits: (N,C) of the student for the adversarial images.
        nat_logits: (N,C) of the student for the natural images.
        soft_adv: (N,C) soft labels of the adversarial images.
        soft_nat: (N,C) soft labels of the natural images.
        adv_weight: weight of the adversarial term, in [0,1].
        kl_scale: factor of the loss; 0.1 gives the value of the authors' release, which also
            averages over its ten classes.
        weights: (N,) factors of the images, in both terms.

    Raises:
        ValueError: for other shapes.
    """
    check_shape("adv_logits", adv_logits, "N", "C")
    check_shape("nat_logits", nat_logits, *adv_logits.shape)
    check_shape("soft_adv", soft_adv, *adv_logits.shape)
    check_shape("soft_nat", soft_nat, *adv_logits.shape)
    adv = soft_label_kl(adv_logits, soft_adv, weights)
    nat = soft_label_kl(nat_logits, soft_nat, weights)
    return kl_scale * (adv_weight * adv + (1 - adv_weight) * nat)  # D4
