"""Settings of an evaluation, of an export, which is an evaluation of a copy, and of a comparison.

Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal

from absld.config.datasets import (
    CHANNELS,
    CLASS_ORDER,
    IN_MEMORY,
    RESIZE,
    Channels,
    ClassOrder,
    EvaluatedData,
    InMemory,
    Resize,
)
from absld.config.fields import Settings, setting
from absld.config.recipes import RELEASE
from absld.config.settings import Precision
from absld.config.tracking import TrackingSettings
from absld.norms import Norm

ExportFormat = Literal["onnx", "torch-export", "safetensors"]
PAPER_ATTACKS = "clean,fgsm,pgd20,cw30,autoattack"  # arXiv 2312.05508


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(EvaluatedData, TrackingSettings):
    """Settings of an evaluation: images, attacks, checks and results."""

    attacks: str = setting(
        "clean,fgsm,pgd20,cw30",
        "Attacks",
        "any of clean, fgsm, pgd20, pgd20-sat, cw30 (or other numbers of steps), autoattack",
    )
    norm: Norm | None = setting(
        None, "Attacks", "norm of the perturbation [default: the run's, else linf]", RELEASE
    )
    epsilon: float | None = setting(
        None,
        "Attacks",
        "largest perturbation, in the norm; pixels are in [0,1] [default: the run's, else the data "
        "set's]",
        RELEASE,
        high=1.0,
    )
    restarts: int = setting(
        1,
        "Attacks",
        "run each PGD and CW attack N times; an image is robust only if correct after all of them",
        low=1.0,
    )
    each: bool = setting(
        False,
        "Attacks",
        "run every attack on all images that are correct when clean, and report each alone",
    )
    seed: int = setting(
        0, "Attacks", "random seed of attacks, subset and intervals", low=-math.inf, high=math.inf
    )

    data: str = setting("", "Data", "folder with the images [default: the run's, else ./data]")
    image_size: int | None = setting(
        None,
        "Data",
        "resize images to N x N pixels (folder, tiny-imagenet, hf: only) [default: the run's, else "
        "the data set's]",
        low=1.0,
    )
    resize: Resize | None = setting(None, "Data", f"{RESIZE} [default: the run's, else squash]")
    channels: Channels | None = setting(None, "Data", f"{CHANNELS} [default: the run's, else 3]")
    in_memory: InMemory = setting("auto", "Data", IN_MEMORY)
    class_order: ClassOrder = setting("by-name", "Data", CLASS_ORDER)
    split: Literal["test", "validation", "train"] = setting(
        "test", "Data", "split of the data set to evaluate on"
    )
    examples: int | None = setting(
        None, "Data", "evaluate on N images, stratified by class [default: all]", low=1.0
    )

    model: str = setting(
        "",
        "Network",
        "architecture, if it cannot be recognised from the file: a name, timm:NAME, "
        "torchvision:NAME or package.module:factory",
    )
    weights: str = setting(
        "",
        "Network",
        "key of the state dict in the file, if the file has several [default: the first known key]",
    )
    precision: Precision = setting(
        "fp32", "Network", "numeric precision of the network; tf32 has an effect only on CUDA"
    )

    checks: bool = setting(
        True, "Run", "run sanity checks for gradient masking and other evaluation failures"
    )
    batch_size: int = setting(
        250, "Run", "images per batch; an interruption loses the current batch", low=1.0
    )
    save_adversarial: bool = setting(
        False, "Run", "store the adversarial images of all images beside the results"
    )
    out: str = setting(
        "", "Run", "folder of the results [default: RUN/evaluations, else ./evaluations]"
    )
    device: str = setting("auto", "Run", "torch device; auto: cuda if there is one, else cpu")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(EvaluationConfig):
    """Settings of an export: the file, and the images on which it is compared with the original."""

    format: ExportFormat = setting(
        "onnx",
        "Run",
        "format of the file; onnx needs absld[onnx], and is compared where onnxruntime is installed",
    )
    examples: int | None = setting(
        None,
        "Data",
        "compare on N images, stratified by class [default: all clean ones, 1000 adversarial ones]",
        low=1.0,
    )
    out: str = setting(
        "", "Run", "file to write [default: in RUN/exports, else in ./exports, named by TARGET]"
    )


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Settings):
    """Settings of a comparison itself, which its trainings and evaluations do not have."""

    table: Literal["differences", "paper"] = setting(
        "differences",
        "Run",
        "differences: to the baseline, in the worst case over the attacks; paper: methods by family, "
        f"and each attack alone, by default {PAPER_ATTACKS}",
    )
    schedule: Literal["same", "own"] = setting(
        "same",
        "Run",
        "training schedule (epochs, learning rate, weight decay and the like) of the methods; same: "
        "one for all; own: that of each method's recipe",
    )
