"""Sanity checks for gradient masking and other evaluation failures.

Each check compares numbers on a sample of the evaluated images and passes or warns. Limits leave
room for chance on the sample; they are stated with the numbers. The ideas: Athalye et al. 2018
(arXiv 1802.00420), Carlini et al. 2019 (arXiv 1902.06705). The limits: decided here.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.dataset import ImageSet, pixels, stratified
from absld.evaluation.attacks import GradientAttack, SquareSearch, parse_attack
from absld.evaluation.evaluate import Evaluation, evaluate
from absld.evaluation.input_scale import HINT, SAMPLE, examine_scale
from absld.evaluation.surrogates import clamps_input, differentiable, output_bounds
from absld.norms import Norm, largest_epsilon
from absld.progress import Check

NOISE = GradientAttack(
    "noise", "cross-entropy", steps=0, step_size=0.0, uniform_start=True, restarts=10
)
FGSM = parse_attack("fgsm")
# In the L2 norm, 20 short steps would leave too much of a random start, which lies on the sphere.
PGD = {"linf": parse_attack("pgd20"), "l2": parse_attack("pgd20-sat")}
LONGER = parse_attack("pgd50", restarts=2)
SEARCH = SquareSearch("square search", queries=300)
BUDGETS = (0.5, 1.0, 2.0)  # in multiples of epsilon
# Approximate forward-backward passes for an image of the sample: PGD at five budgets, the noise, and
# the longer attack and the search on the robust half.
COST = 5 * 20 + 10 / 3 + 0.5 * (2 * 50 + SEARCH.queries / 3)


def run_checks(
    model: nn.Module, data: ImageSet, evaluation: Evaluation, *, examples: int = SAMPLE
) -> Iterator[Check]:
    """Run the checks of an evaluation of `model` on `data`.

    examples: size of the sample of the evaluated images, stratified by class.
    """
    chosen = stratified(evaluation.labels, data.num_classes, examples, "checks", evaluation.seed)
    sample = data.subset(evaluation.index[chosen])
    with frozen_eval(model), torch.no_grad():
        yield from check_outputs(model, sample)
        yield check_input_scale(model, sample)
        yield check_gradients(model, sample)
        robust = evaluation.robust[chosen].nonzero().squeeze(1)
        yield from check_attacks(model, sample, robust, evaluation.epsilon, evaluation.norm)
        yield check_margin_attack(evaluation)


def check_outputs(model: nn.Module, sample: ImageSet) -> Iterator[Check]:
    """Check that outputs are logits, are repeatable, and do not depend on the batch."""
    x = pixels(sample.rows(slice(None)))
    buffers = [buffer.clone() for buffer in model.buffers()]
    logits = model(x)
    bounds = output_bounds(model, x)
    yield Check(
        "the outputs are logits",
        bounds is None,
        f"{logits.min():.3g} to {logits.max():.3g}"
        + (
            ", bounded by {:.3g} and {:.3g}: this hides gradients".format(*bounds) if bounds else ""
        ),
    )
    repeats = [model(x) for _ in range(3)]
    apart = max((logits - repeat).abs().max().item() for repeat in repeats)
    changed = max(int((logits.argmax(1) != repeat.argmax(1)).sum()) for repeat in repeats)
    scale = (logits.amax(1) - logits.amin(1)).max().item()  # an offset of all logits is irrelevant
    pairs = zip(buffers, model.buffers(), strict=True)
    rewritten = int(sum(a.shape != b.shape or (a != b).any() for a, b in pairs))
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


def check_input_scale(model: nn.Module, sample: ImageSet) -> Check:
    """Check that the network takes pixels in [0,1], not on another scale."""
    scale = examine_scale(model, sample)
    numbers = scale.reason if scale.fits else f"{scale.reason}: {HINT}"
    return Check("it takes pixels in [0,1]", scale.fits, numbers)


def check_gradients(model: nn.Module, sample: ImageSet) -> Check:
    """Check that the input gradient of every image is finite and not zero, nor blocked by a clamp."""
    x = pixels(sample.rows(slice(None))).clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(differentiable(model)(x), sample.labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x)
    largest = gradient.flatten(1).abs().amax(1)
    useless = int((largest == 0).sum() + (~largest.isfinite()).sum())
    clamped = clamps_input(model, x.detach())
    return Check(
        "no input gradient is zero",
        useless == 0 and not clamped,
        f"{useless} of {len(sample)} images; median of the largest entry {largest.median():.3g}"
        + ("; it vanishes at pixels of 0 or 1: the network clamps its input" if clamped else ""),
    )


def check_attacks(
    model: nn.Module,
    sample: ImageSet,
    robust: Int[Tensor, " w"],
    epsilon: float,
    norm: Norm = "linf",
) -> Iterator[Check]:
    """Check that stronger attacks and larger budgets break more.

    robust: positions in the sample of the images that are robust to the attacks of the evaluation.
    """

    def run(data: ImageSet, budget: float, *attacks: GradientAttack | SquareSearch) -> Evaluation:
        return evaluate(model, data, epsilon=budget, norm=norm, attacks=attacks, each=True)

    n, climb = len(sample), PGD[norm]
    unmoved = run(sample, 0.0, climb)
    changed = int((unmoved.predictions[0] != unmoved.predictions[1]).sum())
    yield Check("epsilon 0 changes nothing", changed == 0, f"{changed} of {n} classes changed")

    clean, noise, fgsm, pgd = run(sample, epsilon, NOISE, FGSM, climb).correct.sum(1).tolist()
    yield Check(
        "PGD is no weaker than FGSM and noise",
        pgd <= min(fgsm, noise) + allowed_changes(n, 0.01),
        f"of {n} images, {clean} are correct when clean, {noise} under noise, {fgsm} under fgsm, "
        f"{pgd} under {climb.name}",
    )

    left = sample.subset(robust) if len(robust) else None
    of_robust = f"of the {len(robust)} images that are robust to all attacks"
    longer = count_broken(run(left, epsilon, LONGER)) if left else 0
    yield Check(
        "more steps and restarts change little",
        longer <= allowed_changes(n, 0.03),
        f"{LONGER.name} with {LONGER.restarts} restarts breaks {longer} {of_robust}",
    )
    searched = count_broken(run(left, epsilon, SEARCH)) if left else 0
    yield Check(
        "a search without gradients finds nothing more",
        searched <= allowed_changes(n, 0.03),
        f"{SEARCH.queries} queries break {searched} {of_robust}",
    )

    # In the ball of the largest budget, the whole range of pixels, any classifier can be broken.
    largest = largest_epsilon(norm, math.prod(sample.image_shape))
    budgets = [*(min(epsilon * factor, largest) for factor in BUDGETS), largest]
    curve = [int(run(sample, budget, climb).correct[-1].sum()) for budget in budgets]
    rise = max((b - a for a, b in zip([clean, *curve], curve, strict=False)), default=0)
    yield Check(
        "accuracy falls with epsilon, to about zero",
        rise <= allowed_changes(n, 0.01) and curve[-1] <= allowed_changes(n, 0.05),
        f"of {n} images correct: {clean} clean, "
        + ", ".join(f"{k} at {budget:.3g}" for budget, k in zip(budgets, curve, strict=True)),
    )


def allowed_changes(images: int, share: float) -> int:
    """Return how many images may differ without a warning: a share, at least two of 40."""
    return max(min(2, images // 20), round(share * images))


def count_broken(evaluation: Evaluation) -> int:
    """Count the images that the last attack broke."""
    return int((evaluation.correct[0] & ~evaluation.correct[-1]).sum())


def check_margin_attack(evaluation: Evaluation) -> Check:
    """Check that the margin was attacked: its gradient remains where the cross-entropy's vanishes."""
    names = [name for name in evaluation.attacks if name.startswith(("cw", "apgd-t"))]
    return Check(
        "a margin attack is among the attacks",
        bool(names),
        ", ".join(names) or "add cw30 or autoattack to the attacks",
    )
