"""Examples of adversarial images for the page: each clean, its perturbation, and attacked."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from absld.data.dataset import pixels
from absld.errors import CheckpointError
from absld.evaluation.adversarial_images import NAME, check_origin, example_rows
from absld.report import summary
from absld.storage.opening import open_regular
from absld.storage.safetensors_files import opened_safetensors

REMOVE = "remove it: the report then has no images"
WIDEST = 96  # pixels of an image on the page; larger ones are reduced
COARSE = 48  # pixels up to which their edges are to be seen
GREY = 0.5  # no change

ImageTensor = Float[Tensor, "ch h w"]


class Example(NamedTuple):
    """An image, and the adversarial image of it that decided, in [0,1].

    attack: "clean" for an image that is misclassified without one.
    """

    name: str
    attack: str
    predicted: str
    number: int
    clean: ImageTensor
    adversarial: ImageTensor

    @property
    def verdict(self) -> str:
        """Words that follow the predicted class: by which attack."""
        if self.attack == "clean":
            return "without an attack"
        if self.name == self.predicted:
            return f"under every attack, here {self.attack}"
        return f"under {self.attack}"


class Section(NamedTuple):
    """Examples, each with the addresses of its three pictures: PNG files inside the page.

    factor: of the perturbations. coarse: whether images have few pixels.
    """

    examples: list[tuple[Example, list[str]]]
    factor: float
    size: str
    coarse: bool


def example_section(folder: Path, results: Mapping[str, Any]) -> Section | None:
    """Return the examples beside an evaluation's results, the worst class first; None without.

    Raises CheckpointError if their file is of another evaluation, or damaged.
    """
    path = folder / NAME
    examples = read_examples(path, results) if path.exists() else []
    if not examples:
        return None
    factor = amplification(max(largest_change(each) for each in examples))
    shown = []
    for each in examples:
        changed = GREY + factor * (each.adversarial - each.clean)
        pictures = [png(each.clean), png(changed, Image.Resampling.NEAREST), png(each.adversarial)]
        shown.append((each, pictures))
    _, height, width = examples[0].clean.shape
    return Section(shown, factor, f"{width} x {height}", max(height, width) <= COARSE)


# --- The file ---


def read_examples(path: Path, results: Mapping[str, Any]) -> list[Example]:
    """Read an example of each of the worst classes that have one."""
    names, worst_first = results["data"]["classes"], summary.worst_first(results)
    try:
        with open_regular(path) as file, opened_safetensors(file, path) as content:
            known = results["settings"] | results["network"] | results["data"]
            attacks = [attack["name"] for attack in results["attacks"]]
            check_origin(content.metadata() or {}, known, attacks)
            labels, attack, predictions, index = (
                content.get_tensor(name) for name in ("labels", "attack", "predictions", "index")
            )
            rows = example_rows(labels, attack, predictions, worst_first)[: summary.MANY]
            adversarial, clean = content.get_slice("images"), content.get_slice("clean")
            if adversarial.get_shape() != clean.get_shape():
                raise ValueError("its clean images have another shape than the others")
            return [
                Example(
                    names[labels[row]],
                    attacks[attack[row]],
                    names[predictions[row]],
                    int(index[row]),
                    as_image(clean[row]),
                    as_image(adversarial[row]),
                )
                for row in rows
            ]
    except CheckpointError as error:
        raise CheckpointError(str(error), REMOVE) from error
    except Exception as error:  # whatever the library raises for a damaged file
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}", REMOVE) from error


def as_image(tensor: Tensor) -> ImageTensor:
    """Return an image in [0,1], whatever its numbers. Raises ValueError if it is none."""
    if tensor.ndim != 3 or not tensor.numel():
        raise ValueError(f"an image has the shape {tuple(tensor.shape)}")
    return pixels(tensor).float().nan_to_num(0.0).clamp(0, 1)


# --- Pictures ---


def largest_change(example: Example) -> float:
    return (example.adversarial - example.clean).abs().max().item()


def amplification(largest: float) -> float:
    """Return a factor, of two digits, by which the largest change becomes black or white."""
    factor = GREY / max(largest, 0.01 * GREY)
    return max(1.0, float(f"{factor:.2g}"))


def png(image: ImageTensor, resample: int = Image.Resampling.BOX) -> str:
    """Return an image as the address of a PNG file, in grey or colour, reduced if it is large."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    levels = (255 * image.clamp(0, 1)).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(levels.squeeze(2).numpy())
    scale = WIDEST / max(picture.size)
    if scale < 1:
        size = [max(1, round(scale * side)) for side in picture.size]
        picture = picture.resize((size[0], size[1]), resample)
    file = io.BytesIO()
    picture.save(file, "png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
