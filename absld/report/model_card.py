"""The model card of a network: Markdown with its evaluation, and metadata of a hub."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from absld.config.evaluation_settings import EvaluationConfig
from absld.data.sources import is_resized
from absld.evaluation.attacks import AUTOATTACK_COSTS
from absld.evaluation.results import warnings
from absld.report import summary
from absld.report.comparison_tables import in_markdown
from absld.text import printable

ABSLD = "ABSLD ([arXiv 2312.05508](https://arxiv.org/abs/2312.05508))"
RSLAD = "RSLAD ([arXiv 2108.07969](https://arxiv.org/abs/2108.07969))"
SOURCES = {
    "absld": ABSLD,
    "absld-weights": f"{ABSLD} with weights of the classes",
    "absld-margins": f"{ABSLD} with margins of the classes",
    "rslad": RSLAD,
    "fair-rslad": f"{RSLAD} with the class weights of Fair-ARD (Yue et al., NeurIPS 2023)",
    "ard": "ARD ([arXiv 1905.09747](https://arxiv.org/abs/1905.09747))",
    "iad": "IAD ([arXiv 2106.04928](https://arxiv.org/abs/2106.04928))",
    "adaad": "AdaAD (Huang et al., CVPR 2023)",
    "trades": "TRADES ([arXiv 1901.08573](https://arxiv.org/abs/1901.08573))",
    "sat": "PGD adversarial training ([arXiv 1706.06083](https://arxiv.org/abs/1706.06083))",
    "mart": "MART (Wang et al., ICLR 2020)",
    "bat": "BAT ([arXiv 2209.07534](https://arxiv.org/abs/2209.07534))",
    "frl": "FRL ([arXiv 2010.06121](https://arxiv.org/abs/2010.06121))",
    "wat": "WAT ([arXiv 2302.04025](https://arxiv.org/abs/2302.04025))",
    "cfa": "CFA ([arXiv 2303.14460](https://arxiv.org/abs/2303.14460))",
    "dafa": "DAFA ([arXiv 2401.12532](https://arxiv.org/abs/2401.12532))",
}
DATASETS = {  # with their names on the hub
    "digits": ("the digits of scikit-learn", None),
    "cifar10": ("CIFAR-10", "uoft-cs/cifar10"),
    "cifar100": ("CIFAR-100", "uoft-cs/cifar100"),
    "svhn": ("SVHN", "ufldl-stanford/svhn"),
    "tiny-imagenet": ("Tiny ImageNet", "zh-plus/tiny-imagenet"),
    "folder": ("a folder of images", None),
}
# Beyond what acts in all of Markdown: in a table, in extensions of it, and plain links.
ACTS = re.compile(r"[|_~$&@]|:(?=//)|(?<=www)\.")


class Subject(NamedTuple):
    """A network to publish, and its training.

    repository: owner/name. config: as config.json has it. recipe: settings of its training, and
    teacher: its name, with teacher_sha256; empty if there was none. by_name: whether its
    architecture is loaded by its name.
    """

    repository: str
    config: Mapping[str, Any]
    recipe: Mapping[str, Any]
    teacher: str
    teacher_sha256: str
    by_name: bool


def render_card(subject: Subject, results: Mapping[str, Any]) -> str:
    """Return the body of a card, without its metadata. Texts from outside are shown, and no more.

    results: those of an evaluation, with the repository as the target.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("absld.report"),
        finalize=lambda value: escape(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("model_card.md.j2").render(
        subject=subject,
        results=results,
        failed=warnings(results),
        summary=summary,
        setting_text=setting_text,
        dataset=dataset_names(str(subject.recipe["dataset"]))[0],
        method=method_source(str(subject.recipe["method"])),
        classes=summary.worst_first(results)[: summary.MANY],
        repository=Markup(subject.repository),
        command=Markup(printable(str(results["environment"]["command"]))),
    )


def escape(text: str) -> str:
    """Return a text that a hub's Markdown shows as it is, in a table too."""
    return ACTS.sub(r"\\\g<0>", in_markdown(text))


def method_source(method: str) -> Markup:
    """Return a method of the package with its paper, or the name of another one, in Markdown."""
    return Markup(SOURCES.get(method) or escape(method))


def dataset_names(dataset: str) -> tuple[str, str | None]:
    """Return the name of a data set for people, and the one on the hub if it has one."""
    return DATASETS.get(dataset, (dataset, None))


def setting_text(value: object) -> str:
    """Return the value of a setting as a person writes it."""
    if isinstance(value, tuple):
        return ", ".join(map(setting_text, value))
    return f"{value:.4g}" if isinstance(value, float) else summary.setting_text(value)


def evaluation_command(subject: Subject, results: Mapping[str, Any]) -> str:
    """Return the command that repeats an evaluation, on one line of plain text."""
    data, settings = results["data"], results["settings"]
    attacks = ["autoattack" if name in AUTOATTACK_COSTS else name for name in settings["attacks"]]
    epsilon, levels = settings["epsilon"], round(255 * settings["epsilon"])
    flags = {"dataset": data["dataset"], "split": data["split"], **settings}
    flags["attacks"] = ",".join(dict.fromkeys(["clean", *attacks]))
    flags["epsilon"] = f"{levels}/255" if levels / 255 == epsilon else repr(epsilon)
    channels, size, _ = subject.config["image_shape"]
    if channels != 3:
        flags["channels"] = channels
    if is_resized(data["dataset"]):
        flags["image_size"] = size
        resize = subject.recipe.get("resize", "squash")
        if data["dataset"] == subject.recipe["dataset"] and resize != "squash":
            flags["resize"] = resize
    if data["dataset"] == "folder":
        flags["data"] = "DIR"
    if not subject.by_name:
        flags["model"] = subject.config["architecture"]
    parts = ["absld", "evaluate", f"hf:{subject.repository}"]
    for f in fields(EvaluationConfig):
        if flags.get(f.name, f.default) != f.default:
            flag = f"--{f.name.replace('_', '-')}"
            parts += [flag] if flags[f.name] is True else [flag, str(flags[f.name])]
    return printable(shlex.join(parts))


def metadata(
    subject: Subject, results: Mapping[str, Any], license_id: str | None
) -> dict[str, Any]:
    """Return what the YAML of a card holds, but for its figures."""
    _, dataset = dataset_names(results["data"]["dataset"])
    tags = ["adversarial-robustness", "class-wise-robustness"]
    tags += ["knowledge-distillation"] if subject.teacher else []
    return {
        "license": license_id,
        "library_name": "absld",
        "pipeline_tag": "image-classification",
        "tags": [*tags, "model_hub_mixin", "pytorch_model_hub_mixin"],
        "datasets": [dataset] if dataset else None,
        "metrics": ["accuracy"],
    }


def figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a card's metadata by their names; those that are missing are left out."""
    clean, robust = results["attacks"][0]["metrics"], results["robust"]["metrics"]
    budget = summary.facts(results)["Budget"]
    found = {
        "clean accuracy": clean["average"]["value"],
        "clean accuracy, worst class": clean["worst"]["value"],
        f"robust accuracy, {budget}": robust["average"]["value"],
        f"robust accuracy, worst class, {budget}": robust["worst"]["value"],
    }
    return {name: value for name, value in found.items() if value is not None}
