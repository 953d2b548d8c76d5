"""Class-wise robustness: attacks, the worst case over them, and confidence intervals.

The worst case is taken for each image, then the mean over images: an image is robust if it is
classified correctly when clean and under every attack.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.fields import check_epsilon
from absld.config.parsing import parse, parse_all
from absld.data.dataset import ImageSet, pixels, stratified
from absld.errors import UsageError
from absld.evaluation.attacks import AUTOATTACK_COSTS, Attack, AttackBatch, parse_attacks
from absld.evaluation.intervals import Interval, bootstrap, resample, wilson
from absld.evaluation.predictions import fastest_memory_format, predict, predict_under_attack
from absld.evaluation.surrogates import surrogates
from absld.evaluation.validation import check_network
from absld.metrics import METRICS, present
from absld.norms import Norm
from absld.progress import AttackProgress
from absld.seeding import generator

PENDING = -1
PROBED = 32  # images that tell whether a network hides its gradients


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Predictions of a network for n images, clean (row 0) and under each attack.

    Attributes:
        each: every attack gets all images that are correct when clean, not only unbroken ones; a
            part of AutoAttack only those that its earlier parts have not broken.
        attacks: names of the rows, from "clean" on.
        index: (n,) the images' numbers in their set.
        predictions: (rows,n); a skipped image keeps its earlier one; PENDING is yet to come.
    """

    classes: tuple[str, ...]
    epsilon: float
    seed: int
    each: bool
    attacks: tuple[str, ...]
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    predictions: Int[Tensor, "a n"]
    norm: Norm = "linf"

    @property
    def correct(self) -> Bool[Tensor, "a n"]:
        """The correctly classified images of each row."""
        return self.predictions == self.labels

    @property
    def robust(self) -> Bool[Tensor, " n"]:
        """The images that are correct in every row; the clean image is in the ball, too."""
        return self.correct.all(0)

    @property
    def clean_accuracy(self) -> Float[Tensor, " c"]:
        """Accuracy of each class on clean images; NaN for a class without images."""
        return self.class_accuracy(self.correct[0])

    @property
    def robust_accuracy(self) -> Float[Tensor, " c"]:
        """Share of robust images in each class; NaN for a class without images."""
        return self.class_accuracy(self.robust)

    def counts(self, selected: Bool[Tensor, " n"]) -> Int[Tensor, " c"]:
        """Count the selected images of each class."""
        return self.labels[selected].bincount(minlength=len(self.classes))

    def class_accuracy(self, correct: Bool[Tensor, " n"]) -> Float[Tensor, " c"]:
        """Compute the share of `correct` images in each class; NaN for a class without images."""
        return self.counts(correct).double() / self.counts(torch.ones_like(correct))

    def class_intervals(self, correct: Bool[Tensor, " n"]) -> list[Interval]:
        """Compute the share of `correct` images in each class, with Wilson's intervals."""
        images = self.counts(torch.ones_like(correct)).tolist()
        return [wilson(k, n) for k, n in zip(self.counts(correct).tolist(), images, strict=True)]

    def metrics(self, correct: Bool[Tensor, " n"]) -> dict[str, Interval]:
        """Compute each of `absld.metrics.METRICS`, by name, with its bootstrap interval."""
        accuracy = present(self.class_accuracy(correct))
        replicates = resample(correct[None], self.labels, generator("bootstrap", self.seed))[:, 0]
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
        """Count true classes (rows) by worst-case predictions (columns).

        The worst-case prediction of a broken image is its first wrong one.
        """
        first_wrong = (~self.correct).int().argmax(0)  # 0, the clean row, where none is wrong
        worst = self.predictions.gather(0, first_wrong[None])[0]
        count = len(self.classes)
        return (self.labels * count + worst).bincount(minlength=count * count).view(count, count)


# --- Running the attacks ---


OnBatch = Callable[[AttackProgress, Evaluation], None]
OnImages = Callable[[Evaluation, int, Int[Tensor, " m"], Float[Tensor, "m ch h w"]], None]


@torch.inference_mode(False)  # attacks need gradients
def evaluate(
    model: nn.Module,
    data: ImageSet,
    *,
    epsilon: float,
    norm: Norm = "linf",
    attacks: str | Sequence[Attack] = EvaluationConfig.attacks,
    restarts: int = 1,
    each: bool = False,
    examples: int | None = None,
    seed: int = 0,
    batch_size: int = 500,
    before: Int[Tensor, "a n"] | None = None,
    on_batch: OnBatch = lambda progress, evaluation: None,
    on_images: OnImages = lambda evaluation, row, chosen, images: None,
) -> Evaluation:
    """Attack a classifier in eval mode; it is as before afterwards.

    Networks that clamp their input or bound their outputs are attacked around that.

    Args:
        model: takes images in [0,1] and gives logits (N,C).
        data: the images.
        epsilon: radius of the ball; pixels are in [0,1].
        norm: of the ball.
        attacks: names, as "fgsm,pgd20,cw30,autoattack", or objects (`Attack`). A misclassified
            image is not attacked again.
        restarts: attempts of the named PGD and CW.
        each: let every attack try all images that are correct when clean.
        examples: evaluate on N images, stratified by class.
        seed: of the attacks, the choice of examples and the bootstrap.
        batch_size: number of images in a batch.
        before: predictions of an interrupted evaluation, to continue from.
        on_batch: receives the progress and the evaluation so far; may raise.
        on_images: receives, before, the evaluation, its row, the positions of the images of a batch
            in it, and the images in [0,1] that were classified there.

    Raises:
        CheckpointError: the network does not take the images, writes to them, or gives no logits.
        NonFiniteError: its logits are NaN or infinite.
        UsageError: an argument has the wrong type, is out of range, or belongs to another evaluation.
    """
    if not isinstance(data, ImageSet):
        raise UsageError(f"the data set is a {type(data).__name__}, not an absld.ImageSet")
    given: dict[str, object] = {"norm": norm, "epsilon": epsilon, "restarts": restarts}
    given |= {"each": each, "examples": examples, "seed": seed, "batch_size": batch_size}
    settings = EvaluationConfig(**parse_all(given, EvaluationConfig))
    attacks = list_attacks(attacks, data, settings)
    check_network(model, data, "the network")
    evaluation = start_evaluation(data, settings, [attack.name for attack in attacks], before)
    with frozen_eval(model), torch.no_grad():
        run_attacks(model, data, evaluation, attacks, settings.batch_size, on_batch, on_images)
    return evaluation


def list_attacks(attacks: object, data: ImageSet, settings: EvaluationConfig) -> list[Attack]:
    """Return the attacks that names or objects mean. Raises UsageError for anything else."""
    if isinstance(attacks, str):
        norm = settings.norm or "linf"
        return list(parse_attacks(attacks, data.num_classes, settings.restarts, norm))
    listed: list[Attack] = []
    for attack in attacks if isinstance(attacks, Iterable) else [attacks]:
        if not isinstance(attack, Attack):
            raise UsageError(
                f"{reprlib.repr(attack)} is not an attack",
                "needed: names in one text, with commas, or objects with name, restarts, cost and "
                "perturb",
            )
        restarts = parse("restarts", attack.restarts, EvaluationConfig)
        replace(settings, restarts=restarts)  # checks the range
        listed.append(attack)
    return listed


def start_evaluation(
    data: ImageSet, settings: EvaluationConfig, attacks: Sequence[str], before: object
) -> Evaluation:
    """Make an evaluation with the predictions `before`, or with none if it is None.

    Raises UsageError for predictions of another shape, type or number of classes.
    """
    norm = settings.norm or "linf"
    if settings.epsilon is None:
        raise UsageError("epsilon takes a number, not None")
    check_epsilon(settings.epsilon, norm, math.prod(data.image_shape))
    classes = data.num_classes
    index = stratified(data.labels, classes, settings.examples, "examples", settings.seed)
    predictions = torch.full((1 + len(attacks), len(index)), PENDING)
    if before is not None:
        if not (
            isinstance(before, Tensor)
            and before.dtype == predictions.dtype
            and before.shape == predictions.shape
            and ((before >= PENDING) & (before < classes)).all()
        ):
            raise UsageError(
                f"the predictions before are not int64 of shape {tuple(predictions.shape)} in "
                f"{PENDING}..{classes - 1}",
                "needed: the predictions of an evaluation with the same settings",
            )
        predictions = before.to("cpu", copy=True)
    labels = data.labels.cpu()[index]
    fixed = settings.epsilon, settings.seed, settings.each, ("clean", *attacks)
    return Evaluation(data.classes, *fixed, index, labels, predictions, norm)


def run_attacks(
    model: nn.Module,
    data: ImageSet,
    evaluation: Evaluation,
    attacks: Sequence[Attack],
    batch_size: int,
    on_batch: OnBatch,
    on_images: OnImages,
) -> None:
    """Fill in the predictions that are pending, row by row, batch by batch."""
    memory_format = fastest_memory_format(model, pixels(data.rows(slice(2))))
    networks = surrogates(model, probe_images(data)) if attacks else []
    for row, attack in enumerate([None, *attacks]):
        pending = pending_images(evaluation, row)
        for start in range(0, len(pending), batch_size):
            chosen = pending[start : start + batch_size]
            index = evaluation.index[chosen]
            images = pixels(data.rows(index))
            batch = AttackBatch(
                x_nat=images.contiguous(memory_format=memory_format),
                labels=evaluation.labels[chosen].to(images.device),
                index=index,
                epsilon=evaluation.epsilon,
                seed=evaluation.seed,
                norm=evaluation.norm,
            )
            if attack is None:
                classes, images = predict(model, batch.x_nat, "of clean images"), batch.x_nat
            else:
                classes, images = predict_under_attack(model, networks, batch, attack)
            evaluation.predictions[row, chosen] = classes.cpu()
            on_images(evaluation, row, chosen, images)
            on_batch(progress(evaluation, row, attacks), evaluation)


def probe_images(data: ImageSet) -> Tensor:
    """Return images by which to judge a network, of all classes."""
    chosen = stratified(data.labels, data.num_classes, PROBED, "probe")
    return pixels(data.rows(chosen))


def pending_images(evaluation: Evaluation, row: int) -> Int[Tensor, " m"]:
    """Return the positions that a row has yet to evaluate; skipped images keep their prediction."""
    predictions = evaluation.predictions[row]
    if row:
        earlier = evaluation.predictions[row_before(evaluation, row)]
        skipped = earlier != evaluation.labels
        predictions[skipped] = earlier[skipped]
    return (predictions == PENDING).nonzero().squeeze(1)


def row_before(evaluation: Evaluation, row: int) -> int:
    """Return the row whose misclassified images the attack of a row skips.

    The parts of AutoAttack are one attack, also where each attack is run alone.
    """
    of_autoattack = all(name in AUTOATTACK_COSTS for name in evaluation.attacks[row - 1 : row + 1])
    return 0 if evaluation.each and not of_autoattack else row - 1


def progress(evaluation: Evaluation, row: int, attacks: Sequence[Attack]) -> AttackProgress:
    """Return the progress in a row, and the cost so far and in all if no more images break."""
    costs = [1 / 3] + [attack.cost * attack.restarts for attack in attacks]
    correct, pending = evaluation.correct, evaluation.predictions == PENDING
    spent, remaining = 0.0, 0.0
    attacked = [torch.ones(len(evaluation.labels), dtype=torch.bool)]
    for k, cost in enumerate(costs):
        if k:
            # Where an earlier row is pending, too, nothing is known to be broken.
            before = row_before(evaluation, k)
            attacked.append(attacked[before] & (correct[before] | pending[before]))
        spent += cost * int((attacked[k] & ~pending[k]).sum())
        remaining += cost * int((attacked[k] & pending[k]).sum())
    left = int(pending[row].sum())
    total = int(correct[row_before(evaluation, row)].sum()) if row else len(pending[row])
    return AttackProgress(evaluation.attacks[row], total - left, total, (spent, spent + remaining))
