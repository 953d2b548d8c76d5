"""Names of data sets; choices for their images; settings of those on the Hugging Face Hub and of
corrupted ones."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from absld.config.fields import Settings, setting
from absld.config.imports import HUB, split_hub_target
from absld.config.parsing import did_you_mean
from absld.config.recipes import RECIPES
from absld.errors import UsageError
from absld.text import clip

CORRUPTED = {"cifar10-c": "cifar10", "cifar100-c": "cifar100", "corrupted": "cifar10"}
NAMES = f"one of {', '.join(RECIPES)}, or hf:owner/name of the Hugging Face Hub"
FOR_EVALUATION = f"{', '.join(CORRUPTED)}: for `absld evaluate` only"

Resize = Literal["squash", "crop"]
Channels = Literal[1, 3]
InMemory = Literal["auto", "yes", "no"]
ClassOrder = Literal["by-name", "by-position"]
RESIZE = (
    "squash: resize images to squares whatever their aspect ratio; crop: resize the shorter side, "
    "and take the centre"
)
CHANNELS = "channels of an image; 1: grey, 3: RGB (grey images are repeated)"
IN_MEMORY = (
    "keep the images in memory, or decode them once into a memory-mapped file; auto: in memory "
    "if they take at most half of the available memory, and a quarter of a GPU's free memory"
)
CLASS_ORDER = (
    "by-name: refuse weights whose class names differ from the data's; by-position: take the "
    "classes in the order of the data, whatever their names"
)


class HubDataset(NamedTuple):
    """A data set on the hub: repository, and revision and subset, "" for the usual ones."""

    repository: str
    revision: str = ""
    subset: str = ""


def parse_hub_dataset(name: str) -> HubDataset:
    """Parse hf:owner/name[@revision][/subset]; a slash in a revision is %2F. Raises UsageError."""
    parts = split_hub_target(name)
    if not parts or not re.fullmatch(r"[\w.+-]*", parts[2], re.ASCII):
        raise UsageError(
            f"{clip(name, 200)!r} does not name a data set on the hub",
            "needed: hf:owner/name, hf:owner/name/subset or hf:owner/name@revision/subset",
        )
    return HubDataset(*parts)


def check_dataset(name: str, *, corrupted: bool = False) -> None:
    """Raise UsageError for a name that no data set has. corrupted: whether those are known, too."""
    if name.startswith(HUB):
        parse_hub_dataset(name)
    elif name in CORRUPTED and not corrupted:
        raise UsageError(f"{name} is for evaluation, not for training", FOR_EVALUATION)
    elif name not in {*RECIPES, *CORRUPTED}:
        raise UsageError(
            f"dataset takes {NAMES}, not {clip(name, 200)!r}",
            did_you_mean(name, [*RECIPES, *(CORRUPTED if corrupted else ())]),
        )


@dataclass(frozen=True, kw_only=True)
class HubSettings(Settings):
    """Columns of a data set on the hub; `dataset` is a field of the classes below."""

    image_column: str = setting(
        "", "Data", "column of the images, of hf: data sets [default: the only image column]"
    )
    label_column: str = setting(
        "",
        "Data",
        "column of the labels, of hf: data sets [default: the only column of class labels]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = getattr(self, "dataset", None)
        if (self.image_column or self.label_column) and not (name or HUB).startswith(HUB):
            raise UsageError(
                f"--image-column and --label-column are for data sets on the hub, not {name}",
                "--dataset hf:owner/name",
            )


class Columns(NamedTuple):
    """Columns of images and labels in a data set on the hub; "": the only ones of their kind."""

    image: str = ""
    label: str = ""

    @classmethod
    def of(cls, settings: HubSettings) -> "Columns":
        """Return the columns that are chosen."""
        return cls(settings.image_column, settings.label_column)


@dataclass(frozen=True, kw_only=True)
class EvaluatedData(HubSettings):
    """The data set of an evaluation, and the choice of corrupted images, on which nothing is trained."""

    dataset: str | None = setting(
        None, "Data", f"data set: {NAMES}; or {', '.join(CORRUPTED)} [default: the run's]"
    )
    corruption: str = setting(
        "",
        "Data",
        "corruptions to evaluate on, such as fog,snow (cifar10-c, cifar100-c and corrupted only) "
        "[default: all]",
    )
    severity: int | None = setting(
        None, "Data", "severity of the corruptions, 1 to 5 [default: all five]", low=1.0, high=5.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is not None:
            check_dataset(self.dataset, corrupted=True)
        if (self.corruption or self.severity) and self.dataset not in CORRUPTED:
            raise UsageError(
                "--corruption and --severity are for corrupted images",
                f"--dataset {' or '.join(CORRUPTED)}",
            )
