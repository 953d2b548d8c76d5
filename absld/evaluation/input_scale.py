"""The scale of pixels that a network takes, which no file states: it is tried on images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from absld.attack import frozen_eval
from absld.data.dataset import ImageSet, pixels, stratified
from absld.errors import CheckpointError
from absld.evaluation.surrogates import outputs_outside

SAMPLE = 100  # images
HINT = "put the normalisation inside the network"


def standardise(x: Tensor) -> Tensor:
    """Normalise pixels (N,C,H,W) by mean and standard deviation of each channel."""
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return (x - mean) / std.clamp_min(1e-6)


OWN = "in [0,1]"
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    OWN: lambda x: x,
    "in [-1,1]": lambda x: 2 * x - 1,
    "in [0,255]": lambda x: 255 * x,
    "normalised by mean and deviation": standardise,
}


@dataclass(frozen=True)
class InputScale:
    """Clean accuracies of a network on `images` images of `classes` classes, by scale of pixels."""

    accuracy: Mapping[str, float]
    images: int
    classes: int

    @property
    def other(self) -> str:
        """The scale on which the network is clearly better than in [0,1]; "" if there is none."""
        best = max(self.accuracy, key=lambda name: self.accuracy[name])
        # Two standard deviations; that of a difference of two shares is at most 0.7 / sqrt(n).
        clearly = self.accuracy[best] - self.accuracy[OWN] > 2 * 0.7 / self.images**0.5
        return best if clearly else ""

    @property
    def fits(self) -> bool:
        """Whether the network takes pixels in [0,1], and has learned something."""
        learned = self.accuracy[OWN] * self.images > self.images / self.classes + 0.5
        return learned and not self.other

    @property
    def reason(self) -> str:
        """The scale that fits, with the accuracy on each."""
        first = self.other or OWN
        others = ", ".join(f"{self.accuracy[name]:.1%} {name}" for name in SCALES if name != first)
        found = "takes" if self.fits else "made for" if self.other else "not shown to take"
        return (
            f"{found} pixels {first}: clean accuracy {self.accuracy[first]:.1%}, against {others}"
        )


def examine_scale(model: nn.Module, data: ImageSet) -> InputScale:
    """Compute the clean accuracy on pixels of each scale; 0 on one that the network refuses.

    SAMPLE images are tried, stratified by class; all of fewer.
    """
    sample = data.subset(stratified(data.labels, data.num_classes, SAMPLE, "checks", 0))
    x = pixels(sample.rows(slice(None)))

    def accuracy(logits: Tensor | None) -> float:
        if logits is None:
            return 0.0
        share: float = (logits.argmax(1) == sample.labels).float().mean().item()
        return share

    with frozen_eval(model), torch.no_grad():
        outputs = {OWN: model(x)}  # an error here is the network's fault
        others = {name: scale for name, scale in SCALES.items() if name != OWN}
        outputs |= {name: outputs_outside(model, scale(x)) for name, scale in others.items()}
    accuracies = {name: accuracy(logits) for name, logits in outputs.items()}
    return InputScale(accuracies, len(sample), data.num_classes)


def check_teacher_scale(
    teacher: nn.Module, validation: ImageSet, name: str, allow_weak: bool
) -> str:
    """Return which scale of pixels a teacher takes, in words.

    Raises CheckpointError if it is not [0,1], unless `allow_weak`.
    """
    scale = examine_scale(teacher, validation)
    if scale.other and not allow_weak:
        raise CheckpointError(
            f"{name}: {scale.reason}",
            f"needed: a package.module:factory; {HINT}, or --allow-weak-teacher",
        )
    return scale.reason
