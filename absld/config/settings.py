"""Every setting, once: its default, its meaning and its source. Imports no torch.

`TrainConfig` is what training computes with; `Config` adds what a run from the command line
needs; `EvaluationConfig` is what an evaluation needs. Flags, recipe files, `absld recipe show` and
the records of runs are all made of the fields below. `RECIPES` holds what a data set changes,
`METHOD_RECIPES` what a method does.
"""

import difflib
import hashlib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from absld.errors import CheckpointError, UsageError

T = TypeVar("T")
Precision = Literal["fp32", "tf32", "bf16"]
Dataset = Literal["digits", "cifar10", "cifar100", "svhn", "tiny-imagenet", "folder"]

RELEASE = "the authors' release"
OWN = "decided here"
SEE_HELP = "--help, or `absld recipe show digits`, lists every setting"


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


DIGITS_SOURCE = "decided here, for digits"
RECIPES: dict[str, dict[str, tuple[Any, str]]] = {
    "digits": {
        "dataset": ("digits", DIGITS_SOURCE),
        "student": ("convnet", DIGITS_SOURCE),
        "teacher_model": ("convnet", DIGITS_SOURCE),
        "epochs": (40, DIGITS_SOURCE),
        "teacher_epochs": (30, DIGITS_SOURCE),
        "epsilon": (0.1, DIGITS_SOURCE),
        "padding": (1, DIGITS_SOURCE),
        "flip": (0.0, DIGITS_SOURCE),
    },
    "cifar10": {"dataset": ("cifar10", "the paper")},
    "cifar100": {"dataset": ("cifar100", "the paper")},
    "svhn": {"dataset": ("svhn", OWN), "flip": (0.0, "decided here: a mirrored digit is none")},
    "tiny-imagenet": {"dataset": ("tiny-imagenet", OWN), "image_size": (64, "its images")},
    "folder": {"dataset": ("folder", OWN)},
}
HALF_AND_THREE_QUARTERS = (100 / 200, 150 / 200)
METHOD_RECIPES: dict[str, dict[str, tuple[Any, str]]] = {
    "absld": {},  # the defaults
    "absld-weights": {},
    "absld-margins": {},
    "rslad": {},
    "fair-rslad": {},
    "ard": {
        "start": ("uniform", "ARD"),
        "adv_weight": (1.0, "ARD"),
        "epochs": (200, "ARD"),
        "milestones": (HALF_AND_THREE_QUARTERS, "ARD"),
    },
    "adaad": {
        "adv_weight": (1.0, "AdaAD"),
        "epochs": (200, "AdaAD"),
        "milestones": (HALF_AND_THREE_QUARTERS, "AdaAD"),
        "weight_decay": (5e-4, "AdaAD"),
    },
    "trades": {
        "relative_step_size": (0.007 / 0.031, "TRADES"),
        "epochs": (76, "TRADES"),
        "milestones": ((75 / 76,), "TRADES"),
    },
    "sat": {"start": ("uniform", "PGD adversarial training")},
}


def group(setting_field: "Field[Any]") -> str:
    return str(setting_field.metadata["group"])


GROUPS = {f.name: group(f) for f in fields(Config)}


def resolve(given: Mapping[str, Any], *, schedule_of_method: bool = True) -> Config:
    """A whole configuration from the settings given: defaults, then the method's recipe, then the
    data set's, then `given`. Without its schedule, a method's recipe says how it computes, and
    not how long: so methods are compared.

    Raises UsageError for an unknown name or a value of the wrong type."""
    given = {name: parse(name, value) for name, value in given.items()}
    brought = {
        name: value
        for name, (value, _) in METHOD_RECIPES.get(given.get("method", "absld"), {}).items()
        if schedule_of_method or GROUPS[name] != "Training"
    }
    of_dataset = {n: value for n, (value, _) in RECIPES[given.get("dataset", "digits")].items()}
    return Config(**brought | of_dataset | given)


def source(config: Config, name: str) -> str:
    """Where the value of a setting comes from."""
    recipe = RECIPES[config.dataset]
    if name in recipe and recipe[name][0] == getattr(config, name):
        return recipe[name][1]
    if is_of_method(config, name):
        return METHOD_RECIPES[config.method][name][1]
    standard = next(f for f in fields(Config) if f.name == name)
    is_default = standard.default == getattr(config, name)
    return str(standard.metadata["source"]) if is_default else "given"


def is_of_method(config: Config, name: str) -> bool:
    """Is the value of a setting that of the method's recipe?"""
    recipe = METHOD_RECIPES.get(config.method, {})
    return (
        name in recipe
        and name not in RECIPES[config.dataset]
        and recipe[name][0] == getattr(config, name)
    )


SEAL = "# SHA-256 of the lines above, which a run is read with: "


def to_toml(config: Config) -> str:
    """The settings as a recipe file, which `--recipe` reads back, sealed."""
    values = {f.name: getattr(config, f.name) for f in fields(Config)}
    lines = (f"{name} = {toml(value)}" for name, value in values.items() if value is not None)
    text = "\n".join(lines) + "\n"
    return f"{text}{SEAL}{sha256(text.encode())}\n"


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def of_run(path: Path) -> Config:
    """The settings of a run, from its config.toml. Raises CheckpointError if they have changed
    since the run wrote them, UsageError if they are no settings."""
    values = from_toml(str(path))
    text, seal, sealed = path.read_bytes().partition(SEAL.encode())
    if seal and sealed.strip() != sha256(text).encode():
        raise CheckpointError(
            f"{path}: has changed since the run wrote it",
            "copy it again; to train with other settings give it as --recipe",
        )
    return resolve(values)


def toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        # A JSON string is a TOML string, but for one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower()  # True is true


def from_toml(path: str) -> dict[str, Any]:
    """The settings in a recipe file of lines `name = value`. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", "needed: lines of name = value") from error
    return {name: parse(name, value) for name, value in values.items()}


def parse(name: str, value: Any, of: type[Settings] = Config) -> Any:
    """The value of a setting from a flag or a recipe file, both of which may write 8/255.

    Raises UsageError with the nearest known name, or with what the setting takes.
    """
    types_of = get_type_hints(of)
    if name not in types_of:
        raise UsageError(f"there is no setting {name!r}", did_you_mean(name, types_of))
    kind = types_of[name]
    try:
        return convert(kind, value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        raise UsageError(
            f"{name} takes {described(kind)}, not {value!r}",
            did_you_mean(str(value), get_args(bare(kind)) if is_choice(kind) else ()),
        ) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else SEE_HELP


def bare(kind: Any) -> Any:
    """A type without its `| None`."""
    return get_args(kind)[0] if get_origin(kind) in (types.UnionType, Union) else kind


def is_choice(kind: Any) -> bool:
    """Does a setting of this type take one of a few words?"""
    return get_origin(bare(kind)) is Literal


def convert(kind: Any, value: Any) -> Any:
    """`value` as a `kind`, or ValueError."""
    if bare(kind) is not kind:
        return None if value is None else convert(bare(kind), value)
    if is_choice(kind):
        if value not in get_args(kind):
            raise ValueError(value)
        return value
    if get_origin(kind) is tuple:
        parts = [part for part in value.split(",") if part] if isinstance(value, str) else value
        return tuple(convert(float, part) for part in parts)
    if kind is float and isinstance(value, str):
        return float(Fraction(value)) if "/" in value else float(value)
    if kind is int and isinstance(value, str):
        return int(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(value)
    return value


def described(kind: Any) -> str:
    """What a setting takes, in words."""
    kind = bare(kind)
    if is_choice(kind):
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "numbers"
    return {float: "a number", int: "a whole number", bool: "true or false"}.get(kind, "a text")
