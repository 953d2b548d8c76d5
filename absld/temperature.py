"""Class temperatures: soft labels (D1), class risks (D5) and their update (D6).

The functions are pure; `ClassRisk` and `ClassTemperature` hold the state that a training loop
carries from batch to batch and from epoch to epoch.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.metrics import ClassMean, class_sums
from absld.shapes import check_shape

Fidelity = Literal["paper", "released"]
Move = Literal["absolute", "relative"]
NO_LABEL = torch.iinfo(torch.int64).min  # by default, torch leaves out images of label -100


def soften(
    teacher_logits: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    temperature: Float[Tensor, " c"],
) -> Float[Tensor, "n c"]:
    """Compute the softmax of each image's logits over the temperature of its true class.

    Returns new storage; the logits stay as they are. A label outside 0..C-1 is refused by gather
    (RuntimeError), where indexing would read -1 as the last class; ValueError for other shapes.
    Source: D1.
    """
    check_shape("teacher_logits", teacher_logits, "N", "C")
    check_shape("labels", labels, len(teacher_logits))
    check_shape("temperature", temperature, teacher_logits.shape[1])
    return F.softmax(teacher_logits / temperature.gather(0, labels).unsqueeze(1), dim=1)  # D1


def class_risk_sums(
    logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"], num_classes: int
) -> tuple[Float[Tensor, " c"], Int[Tensor, " c"]]:
    """Sum the hard-label cross-entropies of each class, in nats, and count its images.

    Both add up over batches, in any order. No gradient. Labels outside 0..C-1 are refused by
    cross-entropy (IndexError), other shapes by ValueError. Source: D5.
    """
    check_shape("logits", logits, "N", num_classes)
    check_shape("labels", labels, len(logits))
    risk = F.cross_entropy(logits.detach(), labels, reduction="none", ignore_index=NO_LABEL)
    return class_sums(risk, labels, num_classes)  # D5


def update_temperature(
    temperature: Float[Tensor, "*rows c"],
    class_risk: Float[Tensor, "*rows c"],
    *,
    rate: float,
    lower: float,
    upper: float,
    move: Move = "absolute",
) -> Float[Tensor, "*rows c"]:
    """Compute new temperatures from old ones and the mean risks of the classes.

    A class above the mean risk gets a lower temperature, so sharper labels; one below it a higher
    one. The farthest class moves by the full `rate` at any scale of the risks, the others in
    proportion; then all are clipped to [`lower`, `upper`]. A risk of NaN means an absent class: it
    stays and does not count in the mean. If a risk is infinite, or all are equal up to rounding,
    nothing moves. Each row is on its own. The result is a new tensor. Raises ValueError for other
    shapes, a negative rate, another move, and bounds that leave nothing. Source: D6.

    Args:
        move: "absolute" moves temperatures; "relative" their logarithms, so that halving and
            doubling are equally far (decided here).
    """
    check_shape("class_risk", class_risk, *temperature.shape)
    check_rate(rate)
    check_choice("move", move, Move)
    if not lower <= upper:
        raise ValueError(f"no temperature is in [{lower}, {upper}]")
    gap = (class_risk - class_risk.nanmean(-1, keepdim=True)).nan_to_num(0.0)
    largest = gap.abs().amax(-1, keepdim=True)
    step = rate * gap / largest
    moved = temperature - step if move == "absolute" else temperature * torch.exp(-step)
    moved = moved.clamp(lower, upper)  # D6
    # Equal risks give 0/0, every temperature NaN for ever, or, unequal by rounding, a full move.
    # The limit is infinite where a risk is.
    limit = gap.shape[-1] * torch.finfo(gap.dtype).eps * class_risk.abs().nan_to_num(0.0, torch.inf)
    return torch.where(largest > limit.amax(-1, keepdim=True), moved, temperature)


class ClassRisk(ClassMean):
    """The class risks of an epoch (D5), gathered batch by batch.

    Buffers: sums (C,) of cross-entropies in nats; counts (C,) of images. The mean is infinite
    where a NaN was observed, so that nothing moves (D6).
    """

    def observe(self, logits: Float[Tensor, "n c"], labels: Int[Tensor, " n"]) -> None:
        """Add a batch, and move to its device."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # an epoch's sum needs more than their 8 or 11 bits
        self.add(*class_risk_sums(logits, labels, len(self.sums)))


class EpochRisk(NamedTuple):
    """The class risks (C,) that moved the temperatures, in nats; NaN for an absent class."""

    adv: Tensor
    nat: Tensor


class ClassTemperature(nn.Module):
    """The temperatures of the classes, for any training loop.

    In a batch: `soft_labels`, then `observe`; at the end of an epoch: `step`. The temperatures are
    the buffers `adv` and `nat` (C,); with the risks gathered so far they are the state dict, which
    is enough to go on in the middle of an epoch. The state follows the tensors it is given to their
    device.

    Args:
        num_classes: C, 2 or more.
        rate: how far the farthest class moves in an epoch.
        lower: lower bound of the temperatures, above 0.
        upper: upper bound of the temperatures.
        start: where all temperatures start, within the bounds.
        move: see `update_temperature`.
        fidelity: "paper" reads D1 as published; "released" as the authors' script computes it: it
            divides one buffer in place by both temperatures, so both labels use their product.
        dtype: of temperatures and risks.

    Raises:
        ValueError: for values out of range.

    Source: D1, D5, D6; defaults of the authors' release.
    """

    adv: Tensor
    nat: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        rate: float = 0.1,
        lower: float = 0.5,
        upper: float = 5.0,
        start: float = 1.0,
        move: Move = "absolute",
        fidelity: Fidelity = "paper",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, not {num_classes}")
        if not (0 < lower <= start <= upper and start < math.inf):
            raise ValueError(f"temperatures start at {start:g}, which is not in [{lower}, {upper}]")
        check_rate(rate)
        check_choice("move", move, Move)
        check_choice("fidelity", fidelity, Fidelity)
        super().__init__()
        self.rate, self.lower, self.upper = rate, lower, upper
        self.move, self.fidelity = move, fidelity
        self.register_buffer("adv", torch.full((num_classes,), start, dtype=dtype))
        self.register_buffer("nat", torch.full((num_classes,), start, dtype=dtype))
        self.adv_risk = ClassRisk(num_classes, dtype=dtype)
        self.nat_risk = ClassRisk(num_classes, dtype=dtype)

    @property
    def num_classes(self) -> int:
        return len(self.adv)

    def start_at(self, temperature: float) -> float:
        """Set all temperatures to one value, clipped to the bounds, and return that."""
        start = min(max(temperature, self.lower), self.upper)
        self.adv, self.nat = torch.full_like(self.adv, start), torch.full_like(self.nat, start)
        return start

    def soft_labels(
        self, teacher_logits: Tensor, labels: Tensor
    ) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        """Compute soft labels for the adversarial and for the natural images.

        They are constants for autograd. Source: D1.

        Args:
            teacher_logits: (N,C) of the clean images.
            labels: (N,) int64 in 0..C-1.

        Raises:
            ValueError: for anything else.
        """
        check_batch(teacher_logits, labels, self.num_classes)
        self.to(labels.device)
        adv, nat = self.adv, self.nat
        if self.fidelity == "released":
            adv = nat = adv * nat
        logits = teacher_logits.detach()
        return soften(logits, labels, adv), soften(logits, labels, nat)

    def observe(self, adv_logits: Tensor, nat_logits: Tensor, labels: Tensor) -> None:
        """Add a batch of the student's training logits (N,C), labels (N,), to the class risks.

        Raises ValueError as `soft_labels` does. Source: D5.
        """
        check_batch(adv_logits, labels, self.num_classes)
        check_batch(nat_logits, labels, self.num_classes)
        self.adv_risk.observe(adv_logits, labels)
        self.nat_risk.observe(nat_logits, labels)

    def step(self, rate: float | None = None) -> EpochRisk:
        """End an epoch: move the temperatures by its class risks, which start anew.

        Source: D6.

        Args:
            rate: in place of the rate given at the start, for a schedule.

        Returns:
            The mean class risks `adv` and `nat` (C,), NaN for a class without images.

        Raises:
            ValueError: for a negative rate, NaN or infinity.
        """
        rate = self.rate if rate is None else rate
        risk = EpochRisk(self.adv_risk.mean(), self.nat_risk.mean())
        self.to(risk.adv.device)
        update = partial(
            update_temperature, rate=rate, lower=self.lower, upper=self.upper, move=self.move
        )
        self.adv, self.nat = update(self.adv, risk.adv), update(self.nat, risk.nat)
        self.adv_risk.reset()
        self.nat_risk.reset()
        return risk


def check_rate(rate: float) -> None:
    """Raise ValueError unless a temperature rate is 0 or more, and finite."""
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be 0 or more, not {rate}")


def check_choice(name: str, value: str, choices: Any) -> None:
    """Raise ValueError unless a value is one of a Literal's."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {get_args(choices)}, not {value!r}")


def check_batch(logits: Tensor, labels: Tensor, num_classes: int) -> None:
    """Raise ValueError unless logits are (N,C) and labels (N,) integers in 0..C-1."""
    check_shape("logits", logits, "N", num_classes)
    if labels.dtype != torch.long or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({len(logits)},), "
            f"not {labels.dtype} of shape {tuple(labels.shape)}"
        )
    # On an accelerator this would wait for the device; there, the kernels assert the range.
    if labels.device.type == "cpu" and len(labels):
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in 0..{num_classes - 1}, not {low}..{high}")
