"""Networks that the attacks differentiate in place of one that hides its gradients.

Its predictions remain those of the network itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from absld.errors import Stopped

Images = Float[Tensor, "n channels height width"]
Outputs = Float[Tensor, "n classes"]
PROBED = 8  # images that are enough where each pixel or each output counts
INSIDE = 1e-6  # the shift towards the middle of the pixel range, relative to the distance from it


def surrogates(model: nn.Module, x: Images) -> list[nn.Module]:
    """Return the networks to attack, judged by the images `x`: an ordinary network alone is its own.

    The network is called in the mode it is in.
    """
    bounds = output_bounds(model, x)
    attacked = InsideRange(model) if clamps_input(model, x) else model
    if refuses_outside(model, x):
        attacked = Clipped(attacked)
    return [attacked, LogOdds(attacked, *bounds)] if bounds else [attacked]


def differentiable(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the forward function of a network, with a zero gradient where the network cuts its own.

    Attacks then run and find nothing, and the sanity checks say why.
    """

    def forward(x: Tensor) -> Tensor:
        logits: Tensor = model(x)
        if torch.is_grad_enabled() and not logits.requires_grad:
            logits = logits + 0 * x.flatten(1).sum(1, keepdim=True)
        return logits

    return forward


def outputs_outside(model: nn.Module, x: Images) -> Outputs | None:
    """Return the outputs for pixels that may be outside of [0,1]; None if the network refuses them."""
    try:
        outputs: Tensor = model(x)
    except Stopped:
        raise
    except (Exception, SystemExit):  # whatever somebody's network raises
        return None
    return outputs


# --- Networks that refuse pixels outside of [0,1], or clamp their input ---


class Clipped(nn.Module):
    """A network that gets no pixel outside of [0,1], where the random start of PGD may be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + (x.clamp(0, 1) - x).detach())  # has the gradient of x
        return logits


def refuses_outside(model: nn.Module, x: Images) -> bool:
    """Tell whether pixels outside of [0,1] end in an exception, or in outputs that are not finite."""
    few = some(x)
    with torch.no_grad():
        outputs = outputs_outside(model, torch.cat([few - 1, few + 1]))
    return outputs is None or not bool(outputs.isfinite().all())


def some(x: Images) -> Float[Tensor, "some channels height width"]:
    """Return a few of the images, from all over the batch."""
    return x[:: -(-len(x) // PROBED)]


class InsideRange(nn.Module):
    """A network whose pixels are moved off the ends of [0,1], where a clamp has no gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x + INSIDE * (0.5 - x))
        return logits


def clamps_input(model: nn.Module, x: Images) -> bool:
    """Tell whether most pixels of 0, or of 1, have a gradient only just inside of the range.

    Every third pixel is set to that end, all others are inside: where a whole region is black, a
    ReLU may have no gradient either.
    """
    few = some(x)
    third = (torch.arange(x[0].numel(), device=x.device) % 3 == 0).view(x[0].shape)
    for end in (0.0, 1.0):
        probe = torch.where(third, end, 0.25 + 0.5 * few)
        at_end, inside = (pixel_gradient(net, probe) != 0 for net in (model, InsideRange(model)))
        alive = inside & third
        if 2 * int((alive & ~at_end).sum()) > int(alive.sum()):
            return True
    return False


def pixel_gradient(model: nn.Module, x: Images) -> Images:
    """Compute the gradient, by pixel, of a sum of logits in which no two weigh the same."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = differentiable(model)(x)
        weights = torch.arange(1, 1 + logits.shape[1], device=x.device)
        (gradient,) = torch.autograd.grad((weights * logits).sum(), x)
    return gradient


# --- Networks with bounded outputs ---


def output_bounds(model: nn.Module, x: Images) -> tuple[float, float] | None:
    """Return the bounds of a network's outputs if it ends in a sigmoid or the like; else None.

    Such outputs stay in [0,1] for images far outside of the pixel range, too; or are at one of
    their bounds there; or, where far images tell nothing, are at a bound for most images of `x`.
    The network is called without gradient.
    """
    from_middle = some(x) - 0.5
    with torch.no_grad():
        near: Tensor = model(x)
        far = outputs_outside(model, torch.cat([1e6 * from_middle, -1e7 * from_middle]))
    far = near[:0] if far is None else far[far.isfinite().all(1)]
    low, high = (end.item() for end in torch.cat([near, far]).aminmax())
    if 0 <= low < high <= 1 + 1e-4:
        return 0.0, 1.0
    at_bounds = torch.minimum(far - low, high - far) < 1e-3 * (high - low)
    if at_bounds.float().mean() > 0.99:
        return low, high
    low, high = (end.item() for end in near.aminmax())
    # Log-probabilities are logits: all but one may be as low as they like.
    log_probabilities = bool((near.logsumexp(1).abs() < 1e-2).all())
    saturated = saturates(near - low) or (saturates(high - near) and not log_probabilities)
    return (low, high) if saturated else None


def saturates(distance: Outputs) -> bool:
    """Tell whether most images are at one end of the outputs, by the distances from it.

    An image is at the end if one of its outputs is there, and is far from it for another image:
    the outputs of an untrained network hardly depend on the image.
    """
    nearest, classes = distance.min(1)
    whole = distance.amax()
    at_end = (nearest < 0.01 * whole) & (distance.amax(0)[classes] > 0.5 * whole)
    return int(at_end.sum()) - 1 >= 0.5 * len(distance)  # one image is there in any case


class LogOdds(nn.Module):
    """A network with log-odds in place of its bounded outputs, which hide its gradients.

    It predicts the same classes.
    """

    def __init__(self, model: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.model, self.low, self.high = model, low, high

    def forward(self, x: Tensor) -> Tensor:
        share = (self.model(x) - self.low) / (self.high - self.low)
        return torch.logit(share, eps=torch.finfo(share.dtype).eps)
