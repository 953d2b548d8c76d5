"""How robust every class of a classifier is: any attacks, the worst case of every image, and how
sure the figures are.

The minimum over the attacks is taken for each image, then the mean: an image counts as robust if
it withstood all of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval, project_linf
from absld.data.dataset import ImageSet, pixels, stratified
from absld.errors import NonFiniteError, UsageError
from absld.evaluation.attacks import STANDARD, Attack, parse_attacks
from absld.evaluation.intervals import Interval, bootstrap, resampled, wilson
from absld.evaluation.validation import check_network
from absld.metrics import METRICS, present, rho
from absld.seeding import generator

PENDING = -1


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a network said of n images, clean (row 0) and under each attack.

    index: the images' numbers in their set. attacks: the names of the rows, from "clean" on. An
    image that an attack passed over, since it was misclassified before, keeps what was said then;
    PENDING is where the evaluation has not come to. each: has every attack tried all images that
    are right when clean, or only those that were left by the attacks before it?
    """

    classes: tuple[str, ...]
    epsilon: float
    seed: int
    each: bool
    attacks: tuple[str, ...]
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    predictions: Int[Tensor, "a n"]

    @property
    def right(self) -> Bool[Tensor, "a n"]:
        """Is the image classified right, in each row?"""
        return self.predictions == self.labels

    @property
    def withstood(self) -> Bool[Tensor, " n"]:
        """Is the image right in every row? The clean image counts: it is in the ball, too."""
        return self.right.all(0)

    @property
    def clean(self) -> Float[Tensor, " c"]:
        """Accuracy of each class on clean images; NaN for a class without images."""
        return self.class_accuracy(self.right[0])

    @property
    def robust(self) -> Float[Tensor, " c"]:
        """Accuracy of each class in the worst case of every image; NaN without images."""
        return self.class_accuracy(self.withstood)

    def counts(self, chosen: Bool[Tensor, " n"]) -> Int[Tensor, " c"]:
        """How many images of each class are chosen."""
        return self.labels[chosen].bincount(minlength=len(self.classes))

    def class_accuracy(self, right: Bool[Tensor, " n"]) -> Float[Tensor, " c"]:
        """The share of `right` images in each class; NaN for a class without images."""
        return self.counts(right).double() / self.counts(torch.ones_like(right))

    def class_intervals(self, right: Bool[Tensor, " n"]) -> list[Interval]:
        """The share of `right` images in each class, with Wilson's intervals."""
        images = self.counts(torch.ones_like(right))
        return [
            wilson(*pair) for pair in zip(self.counts(right).tolist(), images.tolist(), strict=True)
        ]

    def metrics(self, right: Bool[Tensor, " n"]) -> dict[str, Interval]:
        """Each of `absld.metrics.METRICS`, by name, with its bootstrap interval."""
        accuracy = present(self.class_accuracy(right))
        replicates = resampled(right[None], self.labels, generator("bootstrap", self.seed))[:, 0]
        return {
            name: bootstrap(
                metric(accuracy).item(),
                metric(replicates),
                lowest=0.0,
                highest=math.inf if name == "normalized_std" else 1.0,
            )
            for name, metric in METRICS.items()
        }

    def confusion(self) -> Int[Tensor, "c c"]:
        """True classes (rows) by what was said of them in the worst case: of a broken image, the
        first wrong class."""
        wrong = ~self.right
        first = wrong.int().argmax(0)  # 0, which is right, where nothing is wrong
        said = self.predictions.gather(0, first[None])[0]
        count = len(self.classes)
        return (self.labels * count + said).bincount(minlength=count * count).view(count, count)


class Differences(NamedTuple):
    """The differences in each metric, ours minus theirs, clean and robust, and rho, with paired
    bootstrap intervals over the images."""

    clean: dict[str, Interval]
    robust: dict[str, Interval]
    rho: Interval


def paired(
    ours: "Evaluation | Sequence[Evaluation]", theirs: "Evaluation | Sequence[Evaluation]"
) -> Differences:
    """Two networks on the same images; or as many of one kind as of another, pair by pair, such as
    those of several seeds: then the means over the pairs. An image that is drawn counts for all
    networks. Raises UsageError if the images are not the same.

    Source: spec, peers (rho).
    """
    ours = [ours] if isinstance(ours, Evaluation) else ours
    theirs = [theirs] if isinstance(theirs, Evaluation) else theirs
    first = ours[0]
    check_same_images(*ours, *theirs)

    def both(right: Callable[[Evaluation], Tensor]) -> tuple[Tensor, Tensor]:
        """Accuracies (2,pairs,p) of the classes, and (2,pairs,r,p) of resampled images."""
        stacked = torch.stack([right(each) for each in (*ours, *theirs)])
        accuracy = torch.stack([present(first.class_accuracy(row)) for row in stacked])
        replicates = resampled(stacked, first.labels, generator("bootstrap", first.seed))
        apart = 2, len(ours)
        return (
            accuracy.reshape(*apart, *accuracy.shape[1:]),
            replicates.transpose(0, 1).reshape(*apart, *replicates[:, 0].shape),
        )

    def differences(accuracy: Tensor, replicates: Tensor) -> dict[str, Interval]:
        result = {}
        for name, metric in METRICS.items():
            (mine, other), (mine_r, other_r) = metric(accuracy), metric(replicates)
            result[name] = bootstrap((mine - other).mean().item(), (mine_r - other_r).mean(0))
        return result

    accuracy, replicates = both(lambda each: each.withstood)
    return Differences(
        clean=differences(*both(lambda each: each.right[0])),
        robust=differences(accuracy, replicates),
        rho=bootstrap(rho(*accuracy).mean().item(), rho(*replicates).mean(0)),
    )


def check_same_images(first: Evaluation, *others: Evaluation) -> None:
    """Raise UsageError if evaluations are of different images."""
    for other in others:
        if not torch.equal(first.index, other.index) or not torch.equal(first.labels, other.labels):
            raise UsageError(
                "the networks were not evaluated on the same images",
                "give all the same --dataset, --data, --split and --examples",
            )


# --- Running the attacks ---


class Progress(NamedTuple):
    """`done` of `total` images of an attack; `cost`: of the evaluation so far, and of all of it, in
    forwards with their backwards, if no more images break."""

    attack: str
    done: int
    total: int
    cost: tuple[float, float]


OnBatch = Callable[[Progress, Evaluation], None]


def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    attacks: str | Sequence[Attack] = STANDARD,
    restarts: int = 1,
    each: bool = False,
    examples: int | None = None,
    seed: int = 0,
    batch_size: int = 500,
    before: Int[Tensor, "a n"] | None = None,
    on_batch: OnBatch = lambda progress, evaluation: None,
) -> Evaluation:
    """Attack a classifier of images in [0,1] with a budget of `epsilon` in the L-infinity norm.

    attacks: names, as in "fgsm,pgd20,cw30,autoattack", or `absld.evaluation.attacks` attacks; restarts are those
    of the named PGD and CW. An image that is misclassified already is not attacked again, unless
    `each` asks every attack for a figure of its own. examples: so many images, in proportion to
    the classes. `on_batch` hears of every batch and may raise; `before`, the predictions so far,
    then goes on from there, to the same result.

    The network is attacked in eval mode and is as before afterwards. Raises CheckpointError if it
    does not take the images or gives no logits (N,C), NonFiniteError for logits of NaN or
    infinity, UsageError for settings out of range. Source: spec, Evaluation.
    """
    check_settings(epsilon, restarts, examples, batch_size)
    if isinstance(attacks, str):
        attacks = parse_attacks(attacks, data.num_classes, restarts)
    if any(isinstance(attack, str) for attack in attacks):
        raise UsageError("attacks is a list of names", "needed: names in one text, with commas")
    check_network(model, data, "the network")
    index = stratified(data.labels, data.num_classes, examples, "examples", seed)
    rows = 1 + len(attacks)
    started = torch.full((rows, len(index)), PENDING) if before is None else before.clone()
    evaluation = Evaluation(
        classes=data.classes,
        epsilon=epsilon,
        seed=seed,
        each=each,
        attacks=("clean", *(attack.name for attack in attacks)),
        index=index,
        labels=data.labels.cpu()[index],
        predictions=started,
    )
    with frozen_eval(model), torch.no_grad():
        layout = fast_layout(model, pixels(data.images[:2]))
        for row in range(rows):
            pending = to_do(evaluation, row)
            for start in range(0, len(pending), batch_size):
                batch = pending[start : start + batch_size]
                images = data.images[evaluation.index[batch].to(data.images.device)]
                x_nat = pixels(images).contiguous(memory_format=layout)
                said = said_of(model, x_nat, evaluation, batch, attacks[row - 1] if row else None)
                evaluation.predictions[row, batch] = said.cpu()
                on_batch(progress(evaluation, row, attacks), evaluation)
    return evaluation


def check_settings(epsilon: float, restarts: int, examples: int | None, batch_size: int) -> None:
    """Raise UsageError for what would look like a result and be none."""
    if not 0 <= epsilon <= 1:
        raise UsageError(f"epsilon must be in [0, 1], not {epsilon}", "pixels are in [0,1]")
    for name, value in (("restarts", restarts), ("examples", examples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be 1 or more, not {value}", "leave it out")


def fast_layout(model: nn.Module, some: Tensor) -> torch.memory_format:
    """How images are laid out for the network: channels-last on a CPU, whose convolutions are
    faster so (docs/performance.md), unless the network cannot view them."""
    on_cpu = some.device.type == "cpu"
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    try:
        model(some.contiguous(memory_format=layout))
    except RuntimeError:
        layout = torch.contiguous_format
    return layout


def to_do(evaluation: Evaluation, row: int) -> Int[Tensor, " m"]:
    """The images of a row that are still to be looked at; those that it passes over are given what
    was said before."""
    said = evaluation.predictions[row]
    if row:
        earlier = evaluation.predictions[0 if evaluation.each else row - 1]
        passed_over = earlier != evaluation.labels
        said[passed_over] = earlier[passed_over]
    return (said == PENDING).nonzero().squeeze(1)


def said_of(
    model: nn.Module, x_nat: Tensor, evaluation: Evaluation, batch: Tensor, attack: Attack | None
) -> Tensor:
    """What the network says of a batch: clean (None), or under an attack that is tried
    `attack.restarts` times, each time on the images that are still right."""
    if attack is None:
        return predicted(model, x_nat, "of clean images")
    labels = evaluation.labels[batch].to(x_nat.device)
    said = labels.clone()
    for restart in range(attack.restarts):
        left = (said == labels).nonzero().squeeze(1)
        if not len(left):
            break
        x_left = x_nat[left]
        x_adv = attack.perturb(
            model,
            x_left.clone(),  # an attack, or a network, may write to it
            labels[left],
            evaluation.index[batch[left.cpu()]],
            restart=restart,
            epsilon=evaluation.epsilon,
            seed=evaluation.seed,
        )
        # Whatever an attack returns, what is judged is in the ball; NaN is no image.
        x_adv = torch.where(x_adv.isfinite(), x_adv, x_left)
        x_adv = project_linf(x_adv, x_left, evaluation.epsilon)
        said[left] = predicted(model, x_adv, f"under {attack.name}")
    return said


def predicted(model: nn.Module, x: Tensor, of_what: str) -> Tensor:
    """The classes (n,) that the network says. Raises NonFiniteError."""
    logits = model(x)
    if not logits.isfinite().all():
        raise NonFiniteError(
            f"the network gives NaN or infinity {of_what}", "needed: a network with finite logits"
        )
    classes: Tensor = logits.argmax(1)
    return classes


def progress(evaluation: Evaluation, row: int, attacks: Sequence[Attack]) -> Progress:
    """Where an evaluation stands, in this row."""
    costs = [1 / 3] + [attack.cost * attack.restarts for attack in attacks]
    right, pending = evaluation.right, evaluation.predictions == PENDING
    done, rest = 0.0, 0.0
    tried = torch.ones(len(evaluation.labels), dtype=torch.bool)
    for k, cost in enumerate(costs):
        if k == 1 or (k and not evaluation.each):
            # Where an earlier row is pending, too, nothing is known to be broken.
            tried = tried & (right[k - 1] | pending[k - 1])
        done += cost * int((tried & ~pending[k]).sum())
        rest += cost * int((tried & pending[k]).sum())
    now = pending[row]
    total = int(right[0 if evaluation.each else row - 1].sum()) if row else len(now)
    return Progress(evaluation.attacks[row], total - int(now.sum()), total, (done, done + rest))
