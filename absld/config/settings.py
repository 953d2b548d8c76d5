"""Every setting, once: its default, its meaning and its source. Imports no torch.

`TrainConfig` is what training computes with; `Config` adds what a run from the command line
needs; `EvaluationConfig` is what an evaluation needs. Flags, recipe files, `absld recipe show` and
the records of runs are all made of the fields below. `RECIPES` holds what a data set changes,
`METHOD_RECIPES` what a method does.
"""

import math
import re
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from absld.config.parsing import SEE_HELP, did_you_mean, parse
from absld.config.recipes import METHOD_RECIPES, OWN, RELEASE
from absld.errors import UsageError

T = TypeVar("T")
Precision = Literal["fp32", "tf32", "bf16"]
Dataset = Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"]


def setting(
    default: T,
    group: str,
    meaning: str,
    source: str,
    *,
    low: float = 0.0,
    high: float = math.inf,
) -> T:
    """A field of a settings class; its metadata is what help and recipes show. A number is finite,
    and in [low, high]."""
    about = {"group": group, "meaning": meaning, "source": source, "range": (low, high)}
    value: T = field(default=default, metadata=about)
    return value


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fields made by `setting`. Raises UsageError for a value of another type, or out of range."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value = parse(f.name, getattr(self, f.name), type(self))
            low, high = f.metadata["range"]
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, (int, float)) and not (
                    low <= number <= high and number < math.inf  # NaN is in no range
                ):
                    allowed = f"in [{low:g}, {high:g}]" if high < math.inf else f"{low:g} or more"
                    raise UsageError(f"{f.name} must be {allowed}, not {number}", SEE_HELP)
            object.__setattr__(self, f.name, value)  # 1 where a float is meant is 1.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """What a training computes with. Defaults are CIFAR-10's."""

    method: str = setting(
        "absld",
        "Method",
        "how the student is trained: a name (`absld recipe show --help`) or package.module:Class",
        OWN,
    )
    fidelity: Literal["paper", "released"] = setting(
        "paper", "Method", "two soft labels, or the release's product of both temperatures", OWN
    )
    temperature_rate: float = setting(
        0.1,
        "Method",
        "how far the farthest class moves in an epoch; 0 is RSLAD",
        RELEASE,
        high=10.0,
    )
    temperature_lower: float = setting(
        0.5, "Method", "least class temperature", RELEASE, low=1e-3, high=1.0
    )
    temperature_upper: float = setting(
        5.0, "Method", "greatest class temperature", RELEASE, low=1.0, high=1e3
    )
    adv_weight: float = setting(5 / 6, "Method", "share of the adversarial KL", RELEASE, high=1.0)
    kl_scale: float = setting(
        1.0, "Method", "factor of the loss; 0.1 is the release's mean over classes", OWN
    )

    seed: int = setting(
        0, "Training", "of every random number but the split of the data", OWN, low=-math.inf
    )
    epochs: int = setting(300, "Training", "passes over the training images", RELEASE, low=1.0)
    batch_size: int = setting(
        128, "Training", "images a step; a short last batch drops", RELEASE, low=1.0
    )
    learning_rate: float = setting(0.1, "Training", "of SGD", RELEASE)
    momentum: float = setting(0.9, "Training", "of SGD", RELEASE, high=1.0)
    weight_decay: float = setting(2e-4, "Training", "of SGD", RELEASE)
    milestones: tuple[float, ...] = setting(
        (215 / 300, 260 / 300, 285 / 300),
        "Training",
        "parts of the run after which learning and temperature rate fall to a tenth",
        RELEASE,
        high=1.0,
    )
    max_steps: int | None = setting(
        None, "Training", "for a trial: at most so many steps an epoch", OWN, low=1.0
    )
    epsilon: float = setting(
        8 / 255, "Attack", "L-infinity budget, pixels in [0,1]", RELEASE, high=1.0
    )
    relative_step_size: float = setting(0.25, "Attack", "step size, in epsilons", RELEASE)
    attack_steps: int = setting(10, "Attack", "steps of the training attack", RELEASE, low=1.0)
    start: Literal["normal", "uniform"] = setting(
        "normal",
        "Attack",
        "noise on the image where the attack starts; uniform is in the ball",
        RELEASE,
    )
    start_noise: float = setting(0.001, "Attack", "deviation of the normal start", RELEASE)

    padding: int = setting(4, "Data", "zero pixels around an image before the crop", RELEASE)
    flip: float = setting(0.5, "Data", "probability of a mirror image", RELEASE, high=1.0)

    precision: Precision = setting(
        "tf32",
        "Speed",
        "arithmetic of the networks; tf32 applies to CUDA only; weights and losses stay fp32",
        OWN,
    )
    attack_precision: Precision | None = setting(
        None, "Speed", "of the student under the training attack; as --precision", OWN
    )
    teacher_precision: Precision | None = setting(
        None, "Speed", "of the teacher; as --precision", OWN
    )
    fold_batch_norm: bool = setting(
        False, "Speed", "attack a copy whose batch norm is in its convolutions", OWN
    )
    channels_last: bool = setting(
        False, "Speed", "the networks' memory format: the channels of a pixel together", OWN
    )
    compile: bool = setting(
        False, "Speed", "the student's forwards by torch.compile, which needs a C++ compiler", OWN
    )
    cuda_graph: bool = setting(
        False, "Speed", "the attack's steps as one CUDA graph, where the method allows it", OWN
    )
    sync_batch_norm: bool = setting(
        False, "Speed", "on several CUDA devices, batch statistics over all of them", OWN
    )
    check_every: int = setting(
        1, "Speed", "steps between looks for a NaN, for which an accelerator waits", OWN, low=1.0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in METHOD_RECIPES and not re.fullmatch(r"[\w.]+:\w+", self.method):
            known = ", ".join(METHOD_RECIPES)
            raise UsageError(
                f"method takes one of {known}, or package.module:Class, not {self.method!r}",
                did_you_mean(self.method, METHOD_RECIPES),
            )

    def milestone_epochs(self) -> list[int]:
        """The epochs after which the rates fall, at the nearest whole epoch. Source: D7."""
        return [round(part * self.epochs) for part in self.milestones]


@dataclass(frozen=True, kw_only=True)
class Config(TrainConfig):
    """A whole run: training, and where data, networks and results are."""

    dataset: Dataset = setting("digits", "Data", "what to train on; digits needs no download", OWN)
    data: str = setting("data", "Data", "where the images are, or are downloaded to", OWN)
    image_size: int = setting(
        32,
        "Data",
        "side of the images of folder and tiny-imagenet; others are resized",
        OWN,
        low=1.0,
    )
    select_on: Literal["validation", "test"] = setting(
        "validation", "Data", "images that choose the best epoch; test only for parity", OWN
    )
    student: str = setting(
        "resnet18", "Networks", "a name, a file, a run or package.module:factory", RELEASE
    )
    teacher: str = setting(
        "", "Networks", "a file, a run or package.module:factory; without one TRADES makes it", OWN
    )
    teacher_model: str = setting(
        "wrn-34-10", "Networks", "the teacher's network: a name or package.module:factory", RELEASE
    )
    teacher_epochs: int = setting(
        76, "Networks", "of a teacher that is made here", "TRADES", low=1.0
    )
    bank_gib: float = setting(
        2.0, "Networks", "GiB that a teacher's remembered logits may take; 0: none", OWN
    )
    allow_weak_teacher: bool = setting(
        False, "Networks", "go on with a teacher that is near chance", OWN
    )
    out: str = setting("runs", "Run", "folder of the runs and their teachers", OWN)
    device: str = setting("auto", "Run", "auto is cuda where there is one, else cpu", OWN)

    def training(self) -> TrainConfig:
        """The settings that the student's training computes with, alone."""
        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig)})

    def teacher_training(self) -> TrainConfig:
        """The settings of a teacher made for this run: TRADES, and nothing that is a method's or
        that a recipe of one may bring, so that runs of different methods share it."""
        brought = {name for recipe in METHOD_RECIPES.values() for name in recipe}
        of_the_method = {
            f.name: f.default
            for f in fields(TrainConfig)
            if group(f) == "Method" or f.name in brought
        }
        given: dict[str, Any] = of_the_method | {"method": "trades", "epochs": self.teacher_epochs}
        return replace(self.training(), **given)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """What to evaluate, on what images, by what attacks."""

    attacks: str = setting(
        "clean,fgsm,pgd20,cw30",
        "Attacks",
        "any of clean, fgsm, pgd20, pgd20-sat, cw30 (other numbers of steps, too), autoattack",
        OWN,
    )
    epsilon: float | None = setting(
        None, "Attacks", "L-infinity budget; the run's, or the data set's", RELEASE, high=1.0
    )
    restarts: int = setting(1, "Attacks", "tries of each PGD and CW", OWN, low=1.0)
    each: bool = setting(
        False, "Attacks", "a figure for each attack alone: broken images are attacked again", OWN
    )
    seed: int = setting(0, "Attacks", "of starts, subset and intervals", OWN, low=-math.inf)

    dataset: Dataset | None = setting(None, "Data", "the run's, where a run is evaluated", OWN)
    data: str = setting("", "Data", "where the images are; the run's, or ./data", OWN)
    image_size: int | None = setting(
        None, "Data", "side of the images; the run's, or the data set's", OWN, low=1.0
    )
    split: Literal["test", "validation", "train"] = setting("test", "Data", "which images", OWN)
    examples: int | None = setting(
        None, "Data", "so many images only, in proportion to the classes", OWN, low=1.0
    )

    model: str = setting(
        "", "Network", "of a file that does not tell: a name or package.module:factory", OWN
    )
    precision: Precision = setting("fp32", "Network", "of the network's arithmetic", OWN)

    checks: bool = setting(True, "Run", "look for what would make the figures worth less", OWN)
    batch_size: int = setting(
        250, "Run", "images at a time; an interruption loses those at hand", OWN, low=1.0
    )
    out: str = setting("", "Run", "folder of the results; RUN/evaluations, or evaluations", OWN)
    device: str = setting("auto", "Run", "auto is cuda where there is one, else cpu", OWN)


def group(setting_field: "Field[Any]") -> str:
    return str(setting_field.metadata["group"])
