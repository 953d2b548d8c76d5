"""Validation during training: checks of a network, and class accuracies that select an epoch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from absld.attack import cross_entropy, frozen_eval, pgd
from absld.data.dataset import ImageSet, pixels
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.errors import CheckpointError, NonFiniteError
from absld.metrics import ClassAccuracies, class_hits, fairness
from absld.seeding import generator

ABOVE_CHANCE = 0.05  # accuracy from which a network has learned something


def validate(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    steps: int = 20,
    batch_size: int = 128,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    distributed: Distributed = SINGLE_PROCESS,
) -> ClassAccuracies:
    """Compute class accuracies, clean and under PGD-20 as in TRADES (arXiv 1901.08573).

    The attack takes steps of 0.003 (at epsilon 8/255; in proportion otherwise) on the cross-entropy
    from a uniform start in the ball, drawn from a fixed key. For figures to publish see
    `absld.evaluate`.

    on_batch receives the number of batches done, and of all. The processes of `distributed` share
    the batches, and all return the same accuracies. The model is as before afterwards.

    Raises:
        NonFiniteError: logits of a clean image are not finite.
    """
    device = data.labels.device
    random = generator("evaluate", device=device)
    # Of each class: hits clean, hits under attack, images. Nothing is read before the last batch:
    # no batch waits for the device.
    counts = torch.zeros(3, data.num_classes, dtype=torch.long, device=device)
    not_finite = torch.zeros((), dtype=torch.long, device=device)
    total = -(-len(data) // batch_size)
    split = (torch.split(tensor, batch_size) for tensor in (data.images, data.labels))
    with frozen_eval(model), torch.no_grad():
        for done, (images, labels) in enumerate(zip(*split, strict=True), 1):
            x_nat = pixels(images)
            # Drawn for all batches, so that the noise does not depend on the process.
            noise = torch.empty_like(x_nat).uniform_(-epsilon, epsilon, generator=random)
            if done % distributed.world_size == distributed.rank:
                nat_logits = model(x_nat)
                not_finite += (~nat_logits.isfinite()).sum()
                x_adv = pgd(
                    model,
                    cross_entropy(labels),
                    x_nat,
                    noise,
                    epsilon=epsilon,
                    step_size=0.003 * epsilon / (8 / 255),
                    steps=steps,
                )
                predictions = nat_logits.argmax(1), model(x_adv).argmax(1), labels
                counts += torch.stack(
                    [class_hits(each, labels, data.num_classes) for each in predictions]
                )
            if done % distributed.world_size == 0 or done == total:
                on_batch(done, total)
    if distributed.all_reduce_sum(not_finite):
        raise NonFiniteError("the network gives NaN or infinity", "a lower learning_rate may help")
    # Integer counts over the whole set, never an average of averages.
    clean, robust, images = distributed.all_reduce_sum(counts)
    return ClassAccuracies(clean / images, robust / images)


def check_network(model: nn.Module, data: ImageSet, name: str) -> None:
    """Raise CheckpointError unless `model` takes the images of `data` and gives logits (N,C)."""
    x = pixels(data.images[:2]).clone()  # the network may write to it
    needed = (len(x), data.num_classes)
    try:
        with frozen_eval(model), torch.no_grad():
            logits = model(x)
    except Exception as error:  # whatever somebody's network raises
        raise CheckpointError(
            f"{name} does not take images {tuple(x.shape)}: {error}", "needed: another network"
        ) from error
    given: object = type(logits).__name__
    if isinstance(logits, Tensor):
        given = tuple(logits.shape) if logits.is_floating_point() else logits.dtype
    if given != needed:
        raise CheckpointError(
            f"{name} gives {given} for {len(x)} images, needed are logits {needed}",
            "needed: a network of these classes",
        )


def freeze(teacher: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and turn off its parameters' gradients, for good."""
    return teacher.eval().requires_grad_(False)


def check_teacher(teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool) -> float:
    """Return the teacher's average clean accuracy on validation images.

    Raises CheckpointError if it does not fit the images and classes, its logits are not finite, or,
    unless `allow_weak`, its accuracy is within five points of chance.
    """
    check_network(teacher, validation, name)
    try:
        accuracy = fairness(validate(teacher, validation, epsilon=0.0, steps=0).clean).average
    except NonFiniteError as error:
        raise CheckpointError(f"{name}: {error}", "needed: a sound teacher") from error
    if accuracy < 1 / validation.num_classes + ABOVE_CHANCE and not allow_weak:
        raise CheckpointError(
            f"{name}: near chance on validation images, {accuracy:.1%} clean",
            "needed: a better teacher, longer training of it, or --allow-weak-teacher",
        )
    return accuracy
