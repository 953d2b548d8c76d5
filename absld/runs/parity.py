"""Parity of an exported network with the original: predictions, class by class, and logits."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from absld.data.dataset import ImageSet, pixels
from absld.errors import AbsldError, CheckpointError, NonFiniteError
from absld.evaluation.surrogates import Images
from absld.runs.export_formats import Forward, in_short

# Of the largest logit: float32 in another order of sums. Source: decided here.
RELATIVE_TOLERANCE = 1e-4
NOT_WRITTEN = "no network was written; another --format may hold this network"


class LabelledImages(NamedTuple):
    """Images, each time in batches on the CPU, and their labels."""

    batches: Callable[[], Iterable[Images]]
    labels: Int[Tensor, " n"]


def clean_images(data: ImageSet, index: Int[Tensor, " n"], batch_size: int) -> LabelledImages:
    """Return the images of these numbers, as pixels in [0,1]."""

    def batches() -> Iterator[Images]:
        return (pixels(data.rows(chosen)) for chosen in torch.split(index, batch_size))

    return LabelledImages(batches, data.labels[index])


def given_images(images: Images, labels: Int[Tensor, " n"], batch_size: int) -> LabelledImages:
    """Return these images."""
    return LabelledImages(partial(torch.split, images, batch_size), labels)


def first_alone(batches: Iterable[Images]) -> Iterator[Images]:
    """Return the same images, the first one in a batch of its own: any size is promised."""
    batches = iter(batches)
    first = next(batches)
    yield first[:1]
    if len(first) > 1:
        yield first[1:]
    yield from batches


def compute_logits(forward: Forward, batches: Iterable[Images], name: str) -> Float[Tensor, "n c"]:
    """Compute the logits of all images, on the CPU. Raises NonFiniteError, which names the network."""
    with torch.no_grad():
        logits = torch.cat([forward(batch).float().cpu() for batch in batches])
    if not logits.isfinite().all():
        raise NonFiniteError(
            f"{name} gives NaN or infinity", "needed: a network with finite logits"
        )
    return logits


def network_logits(model: nn.Module, batches: Iterable[Images]) -> Float[Tensor, "n c"]:
    """Compute the logits of the original, on its device. Raises NonFiniteError."""
    device = device_of(model)
    return compute_logits(lambda x: model(x.to(device)), batches, "the network")


def compare_logits(
    ours: Float[Tensor, "n c"],
    theirs: Float[Tensor, "n c"],
    labels: Int[Tensor, " n"],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compare the logits of the original with those of its export, in plain values.

    An image whose prediction differs is a tie if its logits agree within the tolerance: the two
    classes are then nearly equal.
    """
    tolerance = RELATIVE_TOLERANCE * ours.abs().max().item()
    apart = (ours - theirs).abs().amax(1)
    equal, close = ours.argmax(1) == theirs.argmax(1), apart <= tolerance
    images = labels.bincount(minlength=len(classes)).tolist()
    counts = labels[equal].bincount(minlength=len(classes)).tolist()
    return {
        "images": len(labels),
        "equal": int(equal.sum()),
        "ties": int((~equal & close).sum()),
        "different": int((~equal & ~close).sum()),
        "largest_difference": apart.max().item(),
        "tolerance": tolerance,
        "classes": [
            {"class": name, "images": n, "equal": k}
            for name, n, k in zip(classes, images, counts, strict=True)
        ],
    }


def compare_networks(
    ours: nn.Module,
    theirs: Forward,
    images: Mapping[str, LabelledImages],
    classes: Sequence[str],
) -> dict[str, dict[str, Any]]:
    """Compare a network with its export, by kind of image."""
    results = {}
    for kind, (batches, labels) in images.items():
        expected = network_logits(ours, batches())
        found = compute_logits(theirs, first_alone(batches()), "the export")
        results[kind] = compare_logits(expected, found, labels, classes)
    return results


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's weights; the CPU if it has none."""
    return next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))


@contextlib.contextmanager
def blame_export(name: str) -> Iterator[None]:
    """Turn exceptions of reading and evaluating an export into CheckpointError."""
    try:
        yield
    except (AbsldError, OSError):
        raise
    except Exception as error:  # of a runtime, about operators or shapes
        raise CheckpointError(
            f"{name}: its export cannot be evaluated: {in_short(error)}", NOT_WRITTEN
        ) from error


def judge(parity: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """Return the verdict: "same", or "same predictions" if logits differ more than by rounding.

    parity: results of `compare_logits`, by kind of image. Raises CheckpointError if predictions
    differ that are no ties.
    """
    if any(part["different"] for part in parity.values()):
        counts = " and ".join(
            f"{part['different']} of {part['images']} {kind}" for kind, part in parity.items()
        )
        apart = max(part["largest_difference"] for part in parity.values())
        raise CheckpointError(
            f"{name}: it predicts a different class than the original for {counts} images; logits "
            f"differ by up to {apart:.3g}",
            NOT_WRITTEN,
        )
    within = all(part["largest_difference"] <= part["tolerance"] for part in parity.values())
    return "same" if within else "same predictions"
