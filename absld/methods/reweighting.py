"""What sample-based methods make of the classes: weights of the loss, and margins of the attack.

Pure functions of one figure a class, NaN for a class that was not seen: it keeps its 1, and does
not count.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def class_weights(
    attack_steps: Float[Tensor, " c"], *, lower: float, upper: float
) -> Float[Tensor, " c"]:
    """Weights of the classes from how many attack steps their images withstand on average.

    In proportion to the inverse square, of mean 1 before they are clipped to [lower, upper]; a
    class that withstands none takes all the weight. Source: spec, peers (fair-rslad).
    """
    seen = ~attack_steps.isnan()
    if not seen.any():
        return torch.ones_like(attack_steps)
    steps = attack_steps[seen]
    least = steps.min()
    # Of the least, so that 0 is the limit of small numbers and divides nothing.
    share = torch.where(steps == least, 1, (least / steps) ** 2)
    weights = torch.ones_like(attack_steps)
    weights[seen] = (len(steps) * share / share.sum()).clamp(lower, upper)
    return weights


def class_margins(robust_accuracy: Float[Tensor, " c"], offset: float) -> Float[Tensor, " c"]:
    """Factors of the attack's epsilon: a class is attacked the harder, the more robust it is.

    robust_accuracy in [0,1]. Source: spec, peers (cfa).
    """
    return torch.where(robust_accuracy.isnan(), 1, offset + robust_accuracy)
