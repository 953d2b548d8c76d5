"""The images of an evaluation: of a data set, or of a corruption."""

from typing import Any

from absld.config.datasets import CORRUPTED, FOR_EVALUATION, Columns
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.resolve import resolve
from absld.data.corrupted import list_corruptions, load_corrupted
from absld.data.dataset import ImageSet, InMemoryImages, describe_images
from absld.data.decoding import Form
from absld.data.placement import Placement
from absld.data.sources import load_split
from absld.engine.precision import resolve_device
from absld.errors import UsageError
from absld.evaluation.evaluate import Evaluation
from absld.progress import Observer


def load_images(config: EvaluationConfig, observer: Observer) -> ImageSet:
    """Load the images to evaluate on and describe them; in the size of the recipe if none was chosen."""
    placement = Placement(config.in_memory, resolve_device(config.device), observer)
    if config.dataset in CORRUPTED:
        return placement.place(load_corruption(config, observer))
    size = config.image_size or resolve({"dataset": config.dataset}).image_size
    form = Form(size, config.resize or "squash", config.channels or 3)
    data = load_split(
        str(config.dataset), config.data, form, config.split, placement, Columns.of(config)
    )
    for line in describe_images({config.split: data}):
        observer.note(line)
    return data


def load_corruption(config: EvaluationConfig, observer: Observer) -> InMemoryImages:
    """Load the images of the one corruption that is chosen, and describe them."""
    name = str(config.dataset)
    if config.split != "test":
        raise UsageError(f"{name} has test images only, no {config.split} images", FOR_EVALUATION)
    names = list_corruptions(name, config.data, config.corruption)
    if len(names) > 1:
        raise UsageError(
            f"one corruption at a time, not {len(names)}", f"--corruption {names[0]}, for example"
        )
    data = load_corrupted(name, config.data, names[0], config.severity)
    for line in describe_images({names[0]: data})[1:]:
        observer.note(line)
    return data


def describe_data(
    config: EvaluationConfig, evaluation: Evaluation, data: ImageSet
) -> dict[str, Any]:
    """Return data set, split, number of images, classes, and what reading the images changed."""
    severity = f"severity {config.severity}" if config.severity else ""
    return {
        "dataset": " ".join(filter(None, (config.dataset, config.corruption, severity))),
        "split": config.split,
        "images": len(evaluation.labels),
        "of": len(data),
        "classes": list(data.classes),
        "notes": list(data.notes),
    }
