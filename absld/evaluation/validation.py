"""What training asks of a network: does it fit the images, and how good is each class by now?"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from absld.attack import cross_entropy, frozen_eval, pgd
from absld.data.dataset import ImageSet, pixels
from absld.engine.distributed import ALONE, Ranks
from absld.errors import CheckpointError, NonFiniteError
from absld.metrics import ClassAccuracies, class_hits, fairness
from absld.seeding import generator


def validate(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    steps: int = 20,
    batch_size: int = 128,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> ClassAccuracies:
    """Class accuracies, clean and under PGD-20 in the TRADES style; what selects the best epoch.

    The attack: `steps` steps of 0.003 (for epsilon 8/255; in proportion otherwise) on the
    cross-entropy, from a uniform start in the ball, drawn from a fixed key. `model` is as before
    afterwards. `on_batch` hears of every batch done. ranks: processes that share the batches, and
    all get the same accuracies. For figures to publish see `absld.evaluate`. Raises NonFiniteError
    if the network's logits of a clean image are not finite. Source: spec, Evaluation.
    """
    random = generator("evaluate", device=data.labels.device)
    hits = torch.zeros(2, data.num_classes, dtype=torch.long, device=data.labels.device)
    total = -(-len(data) // batch_size)
    with frozen_eval(model), torch.no_grad():
        for done, (images, labels) in enumerate(
            zip(
                torch.split(data.images, batch_size),
                torch.split(data.labels, batch_size),
                strict=True,
            ),
            1,
        ):
            x_nat = pixels(images)
            # Drawn for all batches, so that each has the same noise whoever takes it.
            noise = torch.empty_like(x_nat).uniform_(-epsilon, epsilon, generator=random)
            if done % ranks.count == ranks.rank:
                nat_logits = model(x_nat)
                if not nat_logits.isfinite().all():
                    raise NonFiniteError(
                        "the network gives NaN or infinity", "a lower learning_rate may help"
                    )
                x_adv = pgd(
                    model,
                    cross_entropy(labels),
                    x_nat,
                    noise,
                    epsilon=epsilon,
                    step_size=0.003 * epsilon / (8 / 255),
                    steps=steps,
                )
                for row, logits in zip(hits, (nat_logits, model(x_adv)), strict=True):
                    row += class_hits(logits.argmax(1), labels, data.num_classes)
            if done % ranks.count == 0 or done == total:
                on_batch(done, total)
    # Integer counts over the whole set, never an average of averages.
    clean, robust = ranks.total(hits) / data.labels.bincount(minlength=data.num_classes)
    return ClassAccuracies(clean, robust)


def check_network(model: nn.Module, data: ImageSet, name: str) -> None:
    """Raise CheckpointError unless `model` takes the images of `data` and gives logits (N,C)."""
    some = pixels(data.images[:2]).clone()  # the network may write to it
    needed = (len(some), data.num_classes)
    try:
        with frozen_eval(model), torch.no_grad():
            logits = model(some)
    except Exception as error:  # whatever somebody's network raises
        raise CheckpointError(
            f"{name} does not take images {tuple(some.shape)}: {error}", "needed: another network"
        ) from error
    given: object = type(logits).__name__
    if isinstance(logits, Tensor):
        given = tuple(logits.shape) if logits.is_floating_point() else logits.dtype
    if given != needed:
        raise CheckpointError(
            f"{name} gives {given} for {len(some)} images, needed are logits {needed}",
            "needed: a network of these classes",
        )


MARGIN = 0.05


def freeze(teacher: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and its parameters to ask for no gradient, for good."""
    return teacher.eval().requires_grad_(False)


def check_teacher(teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool) -> float:
    """The teacher's clean average on validation images.

    Raises CheckpointError if it does not fit the images and classes, gives no finite logits, or is
    within five points of chance, unless that is allowed.
    """
    check_network(teacher, validation, name)
    try:
        accuracy = fairness(validate(teacher, validation, epsilon=0.0, steps=0).clean).average
    except NonFiniteError as error:
        raise CheckpointError(f"{name}: {error}", "needed: a sound teacher") from error
    if accuracy < 1 / validation.num_classes + MARGIN and not allow_weak:
        raise CheckpointError(
            f"{name}: near chance on validation images, {accuracy:.1%} clean",
            "needed: a better teacher, longer training of it, or --allow-weak-teacher",
        )
    return accuracy
