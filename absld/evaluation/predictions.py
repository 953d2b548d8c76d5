"""Predictions of a network for a batch of images, clean or under attack."""

from dataclasses import replace
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.attack import geometry
from absld.errors import NonFiniteError, UsageError
from absld.evaluation.attacks import Attack, AttackBatch


def fastest_memory_format(model: nn.Module, images: Tensor) -> torch.memory_format:
    """Return channels-last on a CPU, whose convolutions are faster so (docs/performance.md).

    A network that cannot view such images as vectors gets contiguous ones.
    """
    on_cpu = images.device.type == "cpu"
    fastest = torch.channels_last if on_cpu else torch.contiguous_format
    try:
        model(images.contiguous(memory_format=fastest))
    except RuntimeError:
        return torch.contiguous_format
    return fastest


def predict_under_attack(
    model: nn.Module, networks: list[nn.Module], batch: AttackBatch, attack: Attack
) -> tuple[Int[Tensor, " n"], Float[Tensor, "n ch h w"]]:
    """Predict the classes of the worst of an attack's attempts; return them, and its images.

    networks: those to attack in place of `model`; each attempt is for the images that are still
    correct. The restart of `batch` is not used.
    """
    predictions, worst = batch.labels.clone(), batch.x_nat.clone()
    for restart, network in product(range(attack.restarts), networks):
        left = (predictions == batch.labels).nonzero().squeeze(1)
        if not len(left):
            break
        x_left = batch.x_nat[left]
        attempt = replace(
            batch,
            x_nat=x_left.clone(),  # an attack, or a network, may write to it
            labels=batch.labels[left],
            index=batch.index[left.to(batch.index.device)],
            restart=restart,
        )
        x_adv = as_images(attack.perturb(network, attempt), x_left, attack.name)
        # Only images in the ball count, whatever an attack returns; NaN is the clean image.
        x_adv = torch.where(x_adv.isfinite(), x_adv, x_left)
        x_adv = geometry(batch.norm).project(x_adv, x_left, batch.epsilon)
        worst[left] = x_adv
        predictions[left] = predict(model, x_adv, f"under {attack.name}")
    return predictions, worst


def as_images(returned: object, x_nat: Tensor, attack: str) -> Tensor:
    """Return what an attack returned in the type of the images. Raises UsageError if it cannot be."""
    given: object = type(returned).__name__
    if isinstance(returned, Tensor):
        given = tuple(returned.shape) if returned.is_floating_point() else returned.dtype
        if given == tuple(x_nat.shape):
            return returned.to(x_nat)
    raise UsageError(
        f"the attack {attack} returned {given} for images {tuple(x_nat.shape)}",
        "needed: floating images of the same shape",
    )


def predict(model: nn.Module, x: Tensor, condition: str) -> Int[Tensor, " n"]:
    """Predict the classes. Raises NonFiniteError, which names the condition."""
    logits = model(x)
    if not logits.isfinite().all():
        raise NonFiniteError(
            f"the network gives NaN or infinity {condition}", "needed: a network with finite logits"
        )
    classes: Tensor = logits.argmax(1)
    return classes
