"""Every setting of a training, once: its default, its meaning and its source. Imports no torch.

`TrainConfig` holds what training computes with; `Config` adds what a run from the command line
needs. Flags, recipe files, `absld recipe show` and the records of runs are all made from these
fields.
"""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from absld.config.datasets import (
    CHANNELS,
    CLASS_ORDER,
    IN_MEMORY,
    NAMES,
    RESIZE,
    Channels,
    ClassOrder,
    HubSettings,
    InMemory,
    Resize,
    check_dataset,
)
from absld.config.fields import Settings, check_start, group_of, setting
from absld.config.imports import names_code
from absld.config.parsing import did_you_mean
from absld.config.recipes import METHOD_RECIPES, NORM_RECIPES, RELEASE
from absld.config.tracking import TrackingSettings
from absld.errors import UsageError
from absld.norms import Norm

Precision = Literal["fp32", "tf32", "bf16"]
# Settings that count where they are not the default: what was trained without them is the same.
YOUNGER = (
    "resize", "channels",
    "temperature_start", "temperature_move", "weight_averaging", "averaging_start",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of one training. The defaults are CIFAR-10's in the L-infinity norm.

    Raises:
        UsageError: for a value of another type or out of range.
    """

    method: str = setting(
        "absld", "Method", f"one of {', '.join(METHOD_RECIPES)}, or package.module:Class"
    )
    fidelity: Literal["paper", "released"] = setting(
        "paper", "Method", "compute soft labels as in the paper, or as in the authors' release"
    )
    temperature_rate: float = setting(
        0.1,
        "Method",
        "largest change of a temperature in an epoch; 0: none, as RSLAD",
        RELEASE,
        high=10.0,
    )
    temperature_lower: float = setting(
        0.5, "Method", "lower bound of the class temperatures", RELEASE, low=1e-3, high=1e3
    )
    temperature_upper: float = setting(
        5.0, "Method", "upper bound of the class temperatures", RELEASE, low=1e-3, high=1e3
    )
    temperature_start: float | Literal["calibrated"] = setting(
        1.0,
        "Method",
        "class temperatures before the first epoch; calibrated: the teacher's temperature of least "
        "cross-entropy on the validation images",
        RELEASE,
        low=1e-3,
        high=1e3,
    )
    temperature_move: Literal["absolute", "relative"] = setting(
        "absolute",
        "Method",
        "what the temperature rate changes; absolute: temperatures, relative: their logarithms",
        RELEASE,
    )
    adv_weight: float = setting(
        5 / 6,
        "Method",
        "weight of the adversarial KL term; the clean one has 1 minus this",
        RELEASE,
        high=1.0,
    )
    kl_scale: float = setting(
        1.0,
        "Method",
        "factor of the KL loss; 0.1 reproduces the release, which also averages over ten classes",
    )

    seed: int = setting(
        0,
        "Training",
        "random seed (the data split does not depend on it)",
        low=-math.inf,
        high=math.inf,
    )
    epochs: int = setting(300, "Training", "passes over the training images", RELEASE, low=1.0)
    batch_size: int = setting(
        128, "Training", "images per step; a short last batch is dropped", RELEASE, low=1.0
    )
    learning_rate: float = setting(0.1, "Training", "initial learning rate of SGD", RELEASE)
    momentum: float = setting(0.9, "Training", "momentum of SGD", RELEASE, high=1.0)
    weight_decay: float = setting(2e-4, "Training", "weight decay of SGD", RELEASE)
    milestones: tuple[float, ...] = setting(
        (215 / 300, 260 / 300, 285 / 300),
        "Training",
        "fractions of the epochs after which learning rate and temperature rate are divided by 10",
        RELEASE,
        high=1.0,
    )
    max_steps: int | None = setting(
        None, "Training", "end each epoch after N steps, for a quick trial", low=1.0
    )
    weight_averaging: float = setting(
        0.0,
        "Weight averaging",
        "decay of the moving average of the student's weights, taken after each epoch; the averaged "
        "network is validated, saved and tested; 0: no averaging",
        high=0.9999,
    )
    averaging_start: float = setting(
        0.25,
        "Weight averaging",
        "fraction of the epochs from which on weights are averaged",
        "CFA",
        high=1.0,
    )
    norm: Norm = setting(
        "linf",
        "Attack",
        "norm of the perturbation; linf: largest change of a pixel, l2: Euclidean",
        RELEASE,
    )
    epsilon: float = setting(
        8 / 255,
        "Attack",
        "largest perturbation, in the norm; pixels are in [0,1]",
        RELEASE,
        high=1.0,
    )
    relative_step_size: float = setting(
        0.25, "Attack", "step size of the training attack, as a fraction of epsilon", RELEASE
    )
    attack_steps: int = setting(10, "Attack", "steps of the training attack", RELEASE, low=1.0)
    start: Literal["normal", "uniform"] = setting(
        "normal",
        "Attack",
        "initial noise of the training attack; uniform: within the epsilon ball",
        RELEASE,
    )
    start_noise: float = setting(
        0.001, "Attack", "standard deviation of the normal initial noise", RELEASE
    )

    padding: int = setting(
        4, "Augmentation", "zero padding before the random crop, in pixels", RELEASE
    )
    flip: float = setting(
        0.5, "Augmentation", "probability of a horizontal flip", RELEASE, high=1.0
    )

    engine: Literal["auto", "plain", "fast"] = setting(
        "auto",
        "Speed",
        "techniques that speed up a step; plain: none; auto: none on a CPU, on CUDA TF32 and CUDA "
        "graphs; fast: all that the device has, such as bf16",
    )
    precision: Precision | None = setting(
        None,
        "Speed",
        "numeric precision of the networks; losses use fp32 [default: fp32; auto on CUDA: tf32; "
        "fast: bf16]",
    )
    attack_precision: Precision | None = setting(
        None, "Speed", "precision of the training attack [default: as --precision]"
    )
    teacher_precision: Precision | None = setting(
        None, "Speed", "precision of the teacher [default: as --precision]"
    )
    fold_batch_norm: bool | None = setting(
        None,
        "Speed",
        "attack a copy of the student with batch norm folded into convolutions "
        "[default: only in fast]",
    )
    channels_last: bool | None = setting(
        None, "Speed", "use the channels-last memory format [default: auto on CUDA, and fast]"
    )
    compile: bool | None = setting(
        None,
        "Speed",
        "compile the student with torch.compile [default: only in fast on CPUs with a compiler]",
    )
    cuda_graph: bool | None = setting(
        None,
        "Speed",
        "run the teacher, and the training attack if the method allows it, as CUDA graphs "
        "[default: on CUDA, except plain]",
    )
    check_every: int | None = setting(
        None,
        "Speed",
        "check for NaN every N steps (each check synchronises the GPU) "
        "[default: 1; on CUDA, except plain: 50]",
        low=1.0,
    )
    sync_batch_norm: bool = setting(
        False, "Speed", "share batch statistics among several CUDA devices"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHOD_RECIPES and not names_code(self.method):
            known = ", ".join(METHOD_RECIPES)
            raise UsageError(
                f"method takes one of {known}, or package.module:Class, not {self.method!r}",
                did_you_mean(self.method, METHOD_RECIPES),
            )
        check_start(self.temperature_start, self.temperature_lower, self.temperature_upper)

    def milestone_epochs(self) -> list[int]:
        """Return the epochs after which the rates fall: the nearest whole ones. Source: D7."""
        return [round(part * self.epochs) for part in self.milestones]


def counting_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings by name; of the younger ones those that are not the default."""
    defaults = {f.name: f.default for f in fields(config) if f.name in YOUNGER}
    return {
        name: value
        for name, value in asdict(config).items()
        if not (name in defaults and value == defaults[name])
    }


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig, HubSettings, TrackingSettings):
    """Settings of a whole run: its training, data, networks and results."""

    dataset: str = setting("digits", "Data", f"data set: {NAMES}; digits needs no download")
    data: str = setting(
        "data", "Data", "folder with the images; missing data sets are downloaded to it"
    )
    image_size: int = setting(
        32,
        "Data",
        "resize images to N x N pixels (folder, tiny-imagenet, hf: only)",
        low=1.0,
    )
    resize: Resize = setting("squash", "Data", f"{RESIZE} (folder, tiny-imagenet, hf: only)")
    channels: Channels = setting(3, "Data", CHANNELS)
    in_memory: InMemory = setting("auto", "Data", IN_MEMORY)
    class_order: ClassOrder = setting("by-name", "Data", CLASS_ORDER)
    select_on: Literal["validation", "test"] = setting(
        "validation",
        "Data",
        "split that selects the best epoch; selecting on test makes results optimistic",
    )
    student: str = setting(
        "resnet18",
        "Networks",
        "student: an architecture name, timm:NAME, torchvision:NAME, a file, a run directory, "
        "hf:owner/name or "
        "package.module:factory",
        RELEASE,
    )
    student_weights: str = setting(
        "",
        "Networks",
        "key of the student's state dict in its file, if the file has several [default: the first "
        "known key]",
    )
    teacher: str = setting(
        "",
        "Networks",
        "teacher: a file, a run directory, hf:owner/name or package.module:factory; published:NAME "
        "says where to fetch that one [default: train one by TRADES]",
    )
    teacher_model: str = setting(
        "wrn-34-10",
        "Networks",
        "architecture of the teacher: an architecture name, timm:NAME, torchvision:NAME or "
        "package.module:factory",
        RELEASE,
    )
    teacher_weights: str = setting(
        "",
        "Networks",
        "key of the teacher's state dict in its file, if the file has several [default: the "
        "first known key]",
    )
    teacher_epochs: int = setting(
        76,
        "Networks",
        "epochs of a teacher or robust start that is trained here",
        "TRADES",
        low=1.0,
    )
    pretrained: bool = setting(
        False,
        "Networks",
        "download the pretrained weights of timm:NAME and torchvision:NAME, and train from them",
    )
    logit_cache_gib: float = setting(
        2.0, "Networks", "largest size of the teacher's logit cache, in GiB; 0: no cache"
    )
    allow_weak_teacher: bool = setting(
        False,
        "Networks",
        "accept a teacher or robust start near chance, or a teacher made for a different pixel scale",
    )
    out: str = setting("runs", "Run", "folder of the runs and their teachers")
    device: str = setting("auto", "Run", "torch device; auto: cuda if there is one, else cpu")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dataset(self.dataset)

    def training(self) -> TrainConfig:
        """Return the settings that the student's training computes with."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})

    def teacher_training(self) -> TrainConfig:
        """Return the settings of a teacher trained by TRADES for this run.

        Settings of the method, and all that any method's recipe may change, are the defaults, so
        that runs of different methods share a teacher.
        """
        in_recipes = {name for recipe in METHOD_RECIPES.values() for name in recipe}
        defaults: dict[str, Any] = {
            f.name: f.default
            for f in fields(TrainConfig)
            if group_of(f) == "Method" or f.name in in_recipes
        }
        defaults |= {k: value for k, (value, _) in NORM_RECIPES[self.norm].items() if k in defaults}
        changes = defaults | {"method": "trades", "epochs": self.teacher_epochs}
        return replace(self.training(), **changes)
