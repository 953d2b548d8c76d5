"""Means by class over an epoch, gathered batch by batch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def class_sums(
    values: Float[Tensor, " n"], labels: Int[Tensor, " n"], num_classes: int
) -> tuple[Float[Tensor, " c"], Int[Tensor, " c"]]:
    """Per class: the sum of the values of its images, and the number of images. Both add up over
    batches, in any order."""
    member = labels.unsqueeze(1) == torch.arange(num_classes, device=labels.device)
    return torch.where(member, values.unsqueeze(1), 0).sum(0), member.sum(0)


class ClassMean:
    """The mean of each class over an epoch. sums (C,) in float; counts (C,): images."""

    def __init__(self, num_classes: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.sums = torch.zeros(num_classes, dtype=dtype)
        self.counts = torch.zeros(num_classes, dtype=torch.long)

    def add(self, sums: Float[Tensor, " c"], counts: Int[Tensor, " c"]) -> None:
        """Add a batch; the state follows it to its device."""
        self.sums = self.sums.to(sums.device) + sums.to(self.sums.dtype)
        self.counts = self.counts.to(counts.device) + counts

    def mean(self) -> Float[Tensor, " c"]:
        """The mean of each class; NaN for a class that was not seen."""
        mean = self.sums / self.counts
        # A NaN that was observed is no absence.
        return mean.masked_fill((self.counts > 0) & mean.isnan(), torch.inf)

    def reset(self) -> None:
        """Start the next epoch."""
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
