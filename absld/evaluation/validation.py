"""Validation during training: checks of a network, and class accuracies that select an epoch."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from absld.attack import cross_entropy, frozen_eval, pgd, uniform_noise_
from absld.config.fields import check_epsilon, check_range
from absld.data.dataset import ImageSet, pixels
from absld.engine.distributed import SINGLE_PROCESS, Distributed
from absld.errors import CheckpointError, NonFiniteError, Stopped
from absld.metrics import ClassAccuracies, class_hits, fairness
from absld.norms import Norm
from absld.seeding import generator
from absld.shapes import describe_kind, is_dense

ABOVE_CHANCE = 0.05  # accuracy from which a network has learned something


@torch.inference_mode(False)  # the attack needs gradients
def validate(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    norm: Norm = "linf",
    steps: int = 20,
    batch_size: int = 128,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    distributed: Distributed = SINGLE_PROCESS,
) -> ClassAccuracies:
    """Compute class accuracies, clean and under PGD-20 as in TRADES (arXiv 1901.08573).

    The attack takes steps of 0.003 (at epsilon 8/255; in proportion otherwise) on the cross-entropy
    from a uniform start in the ball, drawn from a fixed key; in the L2 norm the steps are 15/128 of
    epsilon, as in Rice et al. (arXiv 2002.11569). For figures to publish: absld.evaluate.

    Args:
        on_batch: receives the number of batches done, and of all.
        distributed: processes that share the batches; all return the same accuracies.

    Raises:
        NonFiniteError: logits of a clean image are not finite.
        CheckpointError: the network does not take the images, writes to them, or gives no logits.
        UsageError: epsilon, steps or batch_size is out of range.
    """
    check_epsilon(epsilon, norm, math.prod(data.image_shape))
    for name, value, least in (("steps", steps, 0), ("batch_size", batch_size, 1)):
        check_range(name, value, least, math.inf)
    check_network(model, data, "the network")
    step_size = 0.003 * epsilon / (8 / 255) if norm == "linf" else 15 / 128 * epsilon
    attack = partial(pgd, epsilon=epsilon, step_size=step_size, steps=steps, norm=norm)
    device = data.device
    random = generator("evaluate", device=device)
    # Of each class: hits clean, hits under attack, images. Nothing is read before the last batch:
    # no batch waits for the device.
    counts = torch.zeros(3, data.num_classes, dtype=torch.long, device=device)
    not_finite = torch.zeros((), dtype=torch.long, device=device)
    total = -(-len(data) // batch_size)
    with frozen_eval(model), torch.no_grad():
        for done, (images, labels) in enumerate(data.batches(batch_size), 1):
            x_nat, labels = pixels(images), labels.clone()  # which may be inference tensors
            # Drawn for all batches, so that the noise does not depend on the process.
            noise = uniform_noise_(torch.empty_like(x_nat), epsilon, norm, random)
            if done % distributed.world_size == distributed.rank:
                with read_only(x_nat, "the network"):
                    nat_logits = model(x_nat)
                not_finite += (~nat_logits.isfinite()).sum()
                x_adv = attack(model, cross_entropy(labels), x_nat, noise)
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


@contextmanager
def read_only(x: Tensor, name: str) -> Iterator[None]:
    """Raise CheckpointError if the code inside writes into `x`; does not wait for the device."""
    version = x._version
    yield
    if x._version != version:
        raise input_written(name)


def input_written(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} writes into its input", "write x = x - m instead of x -= m; use inplace=False"
    )


def check_network(model: nn.Module, data: ImageSet, name: str) -> None:
    """Raise CheckpointError unless `model` takes the images of `data` and gives logits (N,C).

    It must leave its input alone, and autograd must be able to use its weights.
    """
    check_state(model, name)
    x, before = (pixels(data.rows(slice(2))) for _ in range(2))
    needed = (len(x), data.num_classes)
    weights = [*model.parameters(), *model.buffers()]
    if any(tensor.is_inference() for tensor in weights):
        raise CheckpointError(
            f"{name} was made under torch.inference_mode: it has no gradients",
            "make or load it outside of inference_mode",
        )
    try:
        with frozen_eval(model), torch.no_grad(), read_only(x, name):
            logits = model(x)
    except (CheckpointError, Stopped):
        raise
    except (Exception, SystemExit) as error:  # whatever somebody's network raises
        cause = str(error) if isinstance(error, Exception) and str(error) else repr(error)
        dtypes = {tensor.dtype for tensor in weights if tensor.is_floating_point()}
        hint = (
            "needed: another network, or images of another size (--image-size)"
            if dtypes <= {x.dtype}
            else f"its weights must be {x.dtype}"
        )
        raise CheckpointError(
            f"{name} does not take images {tuple(x.shape)} of {x.dtype}: {cause}", hint
        ) from error
    if not torch.equal(x, before):  # by x.data, of which the version does not tell
        raise input_written(name)
    given: object = type(logits).__name__
    if isinstance(logits, Tensor):
        given = tuple(logits.shape) if logits.is_floating_point() else logits.dtype
    if given != needed:
        raise CheckpointError(
            f"{name} gives {given} for {len(x)} images, not logits {needed}",
            "needed: a network of these classes",
        )


def check_state(model: nn.Module, name: str) -> None:
    """Raise CheckpointError unless `model` is a module with a state dict of dense tensors alone."""
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"{name} is a {describe_kind(model)}", "needed: an nn.Module")
    for key, value in model.state_dict().items():
        if not is_dense(value):
            raise CheckpointError(
                f"{name}: {key} in its state dict is {describe_kind(value)}",
                "needed: dense tensors in memory; a lazy layer has its own after a first forward",
            )


def freeze(teacher: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and turn off its parameters' gradients, for good."""
    teacher.eval()  # which may return None: some networks override `train`
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return teacher


def near_chance(accuracy: float, num_classes: int) -> bool:
    """Return whether a network of this average accuracy has hardly learned anything."""
    return accuracy < 1 / num_classes + ABOVE_CHANCE


def check_teacher(teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool) -> float:
    """Return the teacher's average clean accuracy on validation images.

    Raises CheckpointError if it does not fit the images and classes, its logits are not finite, or,
    unless `allow_weak`, its accuracy is within five points of chance.
    """
    check_network(teacher, validation, name)
    try:
        accuracy = fairness(validate(teacher, validation, epsilon=0.0, steps=0).clean).average
    except NonFiniteError as error:
        raise CheckpointError(
            f"{name}: {error}", "needed: a teacher that gives finite logits"
        ) from error
    if near_chance(accuracy, validation.num_classes) and not allow_weak:
        raise CheckpointError(
            f"{name}: near chance on validation images, {accuracy:.1%} clean",
            "needed: a better network, longer training of it, or --allow-weak-teacher",
        )
    return accuracy
