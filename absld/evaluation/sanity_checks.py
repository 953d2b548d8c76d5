"""Can a figure of robustness be trusted? Checks that an attack has not failed for reasons other
than robustness.

Each check compares numbers on a sample of the evaluated images and passes or warns. Limits leave
room for chance on the sample; they are stated with the numbers. The ideas: Athalye et al. 2018,
Carlini et al. 2019 (arXiv 1902.06705). Source: decided here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.dataset import ImageSet, pixels, stratified
from absld.evaluation.attacks import (
    SignedGradient,
    SquareSearch,
    differentiable,
    parse_attack,
)
from absld.evaluation.evaluate import Evaluation, evaluate

SAMPLE = 100
NOISE = SignedGradient(
    "noise", "cross-entropy", steps=0, step_size=0.0, uniform_start=True, restarts=10
)
FGSM, PGD = parse_attack("fgsm"), parse_attack("pgd20")
LONGER = parse_attack("pgd50", restarts=2)
SEARCH = SquareSearch("square search", queries=300)
BUDGETS = (0.5, 1.0, 2.0)  # in epsilons
HUGE = 1.0  # the whole box: any classifier can be made to say anything


@dataclass(frozen=True)
class Check:
    """What was asked, whether it is as it should be, and the numbers in words."""

    name: str
    passed: bool
    numbers: str


def checks(
    model: nn.Module, data: ImageSet, evaluation: Evaluation, *, examples: int = SAMPLE
) -> Iterator[Check]:
    """Look for what makes an evaluation of `model` on `data` worth less than it seems.

    examples: the size of the sample, in proportion to the classes.
    """
    chosen = stratified(evaluation.labels, data.num_classes, examples, "checks", evaluation.seed)
    sample = data.subset(evaluation.index[chosen])
    with frozen_eval(model), torch.no_grad():
        yield from outputs(model, sample)
        yield input_scale(model, sample)
        yield gradients(model, sample)
        withstood = evaluation.withstood[chosen].nonzero().squeeze(1)
        yield from attacks(model, sample, withstood, evaluation.epsilon)
        yield margin_attack(evaluation)


def outputs(model: nn.Module, sample: ImageSet) -> Iterator[Check]:
    """Are they logits, the same every time, and in any company?"""
    x = pixels(sample.images)
    buffers = [buffer.clone() for buffer in model.buffers()]
    logits = model(x)
    probabilities = bool(
        logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 1e-4 and logits.max() <= 1 + 1e-4
    )
    yield Check(
        "the outputs are logits",
        not probabilities,
        f"{logits.min():.3g} to {logits.max():.3g}"
        + (", each image's add up to 1: probabilities hide gradients" if probabilities else ""),
    )
    again = [model(x) for _ in range(3)]
    apart = max((logits - other).abs().max().item() for other in again)
    changed = max(int((logits.argmax(1) != other.argmax(1)).sum()) for other in again)
    scale = (logits.amax(1) - logits.amin(1)).max().item()  # what is added to all says nothing
    rewritten = sum(not torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True))
    yield Check(
        "repeated forwards agree",
        changed == 0 and apart <= 1e-4 * scale and not rewritten,
        f"largest difference {apart:.3g}, of logits {scale:.3g} apart; {changed} classes and "
        f"{rewritten} buffers changed",
    )
    apart = (logits[::2] - model(x[::2])).abs().max().item()
    yield Check(
        "an image's output is its own",
        apart <= 1e-2 * scale,  # room for the rounding of bfloat16
        f"without every other image, outputs differ by {apart:.3g}",
    )


def input_scale(model: nn.Module, sample: ImageSet) -> Check:
    """Does the network take pixels in [0,1], or was it trained on others?"""
    x = pixels(sample.images)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    scales = {
        "in [0,1]": x,
        "normalised by mean and deviation": (x - mean) / std.clamp_min(1e-6),
        "in [-1,1]": 2 * x - 1,
        "in [0,255]": 255 * x,
    }
    accuracy = {
        name: (model(images).argmax(1) == sample.labels).float().mean().item()
        for name, images in scales.items()
    }
    best = max(accuracy, key=lambda name: accuracy[name])
    # The deviation of a difference of two shares of the sample is at most 0.7 / sqrt(n).
    room = 2 * 0.7 / len(sample) ** 0.5
    own, chance = accuracy["in [0,1]"], 1 / sample.num_classes
    passed = accuracy[best] - own <= room and own * len(sample) > chance * len(sample) + 0.5
    return Check(
        "it takes pixels in [0,1]",
        passed,
        f"clean accuracy {own:.1%}; best on pixels {best}, {accuracy[best]:.1%}"
        + ("" if passed else ": put the normalisation inside the network"),
    )


def gradients(model: nn.Module, sample: ImageSet) -> Check:
    """Does every image have a gradient to follow?"""
    x = pixels(sample.images).clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(differentiable(model)(x), sample.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    largest = gradient.flatten(1).abs().amax(1)
    zero = int((largest == 0).sum() + (~largest.isfinite()).sum())
    return Check(
        "no input gradient is zero",
        zero == 0,
        f"{zero} of {len(sample)} images; median of the largest entry {largest.median():.3g}",
    )


def attacks(
    model: nn.Module, sample: ImageSet, withstood: Int[Tensor, " w"], epsilon: float
) -> Iterator[Check]:
    """Do attacks relate to each other as they must? withstood: the images of the sample that
    withstood the evaluation."""

    def run(data: ImageSet, budget: float, *tried: SignedGradient | SquareSearch) -> Evaluation:
        return evaluate(model, data, epsilon=budget, attacks=tried, each=True)

    n = len(sample)
    still = run(sample, 0.0, PGD)
    moved = int((still.predictions[0] != still.predictions[1]).sum())
    yield Check("epsilon 0 changes nothing", moved == 0, f"{moved} of {n} classes changed")

    found = run(sample, epsilon, NOISE, FGSM, PGD)
    clean, noise, fgsm, pgd = found.right.sum(1).tolist()
    yield Check(
        "PGD is no weaker than FGSM and noise",
        pgd <= min(fgsm, noise) + allowed(n, 0.01),
        f"of {n} images, {clean} are right when clean, {noise} under noise, {fgsm} under fgsm, "
        f"{pgd} under pgd20",
    )

    left = sample.subset(withstood) if len(withstood) else None
    longer = broken(run(left, epsilon, LONGER)) if left else 0
    of_these = f"of the {len(withstood)} images that withstood all attacks"
    yield Check(
        "more steps and restarts change little",
        longer <= allowed(n, 0.03),
        f"{LONGER.name} with {LONGER.restarts} restarts breaks {longer} {of_these}",
    )
    searched = broken(run(left, epsilon, SEARCH)) if left else 0
    yield Check(
        "a search without gradients finds nothing more",
        searched <= allowed(n, 0.03),
        f"{SEARCH.queries} queries break {searched} {of_these}",
    )

    sizes = [epsilon * share for share in BUDGETS]
    curve = [int(run(sample, size, PGD).right[-1].sum()) for size in [*sizes, HUGE]]
    rises = max((b - a for a, b in zip([clean, *curve], curve, strict=False)), default=0)
    yield Check(
        "accuracy falls with epsilon, to about zero",
        rises <= allowed(n, 0.01) and curve[-1] <= allowed(n, 0.05),
        f"of {n} images right: {clean} clean, "
        + ", ".join(f"{k} at {size:.3g}" for size, k in zip([*sizes, HUGE], curve, strict=True)),
    )


def allowed(images: int, share: float) -> int:
    """So many images of a sample may differ without a warning: a share, and at least two; fewer
    where the sample is small."""
    return max(min(2, images // 20), round(share * images))


def broken(evaluation: Evaluation) -> int:
    """Images that the last attack broke."""
    return int((evaluation.right[0] & ~evaluation.right[-1]).sum())


def margin_attack(evaluation: Evaluation) -> Check:
    """Was the margin attacked? The gradient of the cross-entropy vanishes where that does not."""
    names = [name for name in evaluation.attacks if name.startswith(("cw", "apgd-t"))]
    return Check(
        "a margin attack is among the attacks",
        bool(names),
        ", ".join(names) or "add cw30 or autoattack to the attacks",
    )
