"""Methods beside each other: the same images, teachers and schedule, several seeds.

Runs that are there are used again and missing ones trained, so a comparison that was stopped
continues. The result is plain values (docs/comparing.md) and the files made of them.
"""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from absld.config.files import from_toml, of_run
from absld.config.recipes import METHOD_RECIPES
from absld.config.resolve import GROUPS, resolve
from absld.config.settings import Config, EvaluationConfig
from absld.data.dataset import Splits
from absld.data.sources import load_data
from absld.engine.precision import resolve_device
from absld.errors import AbsldError, CheckpointError, Interrupted, UsageError
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.evaluate import Differences, Evaluation, paired
from absld.evaluation.intervals import Interval, over_seeds
from absld.evaluation.results import to_json
from absld.evaluation.runner import Assessment, assess_network, completed, network_of
from absld.evaluation.runner import Observer as EvaluationObserver
from absld.metrics import METRICS, present, rho
from absld.report.comparison_plot import plot
from absld.report.comparison_tables import csv_text, latex, markdown
from absld.runs import training_run as job
from absld.storage.environment import environment
from absld.storage.files import key_of, write_text
from absld.storage.run_directory import RunDirectory

SCHEMA = "absld-comparison-1"
OF_A_METHOD = ("Method", "Attack", "Training")  # groups of settings
FIGURES = [f"{kind}_{name}" for kind in ("clean", "robust") for name in METRICS]


class Observer(job.Observer, EvaluationObserver, Protocol):
    """Hears what a comparison does, and what each of its runs does."""

    def run(self, label: str, seed: int, number: int, total: int) -> None:
        """A run of the comparison is taken up: trained where it is not, and evaluated."""

    def done(self, member: "Member", reused: bool) -> None:
        """A run is trained and evaluated; reused: its training was finished before."""


@dataclass(frozen=True, eq=False)
class Member:
    """A run of a comparison. seconds: of its training, without validation."""

    label: str
    run: Path
    config: Config
    assessment: Assessment
    seconds: float

    @property
    def seed(self) -> int:
        return self.config.seed

    def figures(self) -> dict[str, float]:
        """Each metric, clean and in the worst case, and the seconds."""
        evaluation = self.assessment.evaluation
        accuracies = (present(evaluation.clean), present(evaluation.robust))
        values = [metric(a).item() for a in accuracies for metric in METRICS.values()]
        return dict(zip(FIGURES, values, strict=True)) | {"seconds": self.seconds}


@dataclass(frozen=True)
class Comparison:
    """The result as plain values, and the folder of its files."""

    folder: Path
    document: dict[str, Any]


# --- Which runs ---


def configs_of(
    methods: Sequence[str], seeds: Sequence[int], given: Mapping[str, Any]
) -> tuple[list[Config], list[str]]:
    """The configurations of a comparison, all methods of the first seed first; and notes.

    methods: names, package.module:Class, or recipe files (.toml) that say what is different about a
    method. A recipe's schedule is left out: all methods train alike. given: settings of all runs.
    Raises UsageError.
    """
    recipes, found = [], []
    for name in methods:
        recipe: dict[str, Any] = {"method": name}
        if name.endswith(".toml"):
            recipe = from_toml(name)
            if other := [key for key in recipe if GROUPS[key] not in OF_A_METHOD]:
                raise UsageError(
                    f"{name} sets {', '.join(other)}, which is not a method's",
                    "give it as a flag, to all methods alike",
                )
            if schedule := [key for key in recipe if GROUPS[key] == "Training"]:
                found.append(f"{name}: {', '.join(schedule)} left out, all methods train alike")
            recipe = {key: value for key, value in recipe.items() if key not in schedule}
        recipes.append(recipe)
    configs = [
        resolve({**given, **recipe, "seed": seed}, schedule_of_method=False)
        for seed in seeds
        for recipe in recipes
    ]
    return configs, found


def labels_of(configs: Sequence[Config]) -> list[str]:
    """A name for each configuration, the same for those that differ by their seed alone: the
    method, and what is different from the first configuration with that method."""
    first: dict[str, dict[str, Any]] = {}
    labels = []
    for config in configs:
        own = job.settings(config) | {"seed": None}
        standard = first.setdefault(config.method, own)
        other = [f"{name}={own[name]}" for name in own if own[name] != standard[name]]
        labels.append(" ".join([config.method, *other]))
    return labels


def check_members(labels: Sequence[str], configs: Sequence[Config], baseline: str) -> str:
    """The baseline, the first label where it is empty. Raises UsageError if there is no such
    label, nothing to compare, or one thing twice."""
    there = list(dict.fromkeys(labels))
    if len(there) < 2:
        raise UsageError("one method is no comparison", f"there are: {', '.join(METHOD_RECIPES)}")
    if baseline and baseline not in there:
        raise UsageError(
            f"there is no {baseline!r} to compare with", f"there are: {', '.join(there)}"
        )
    seen = set()
    for label, config in zip(labels, configs, strict=True):
        if (label, config.seed) in seen:
            raise UsageError(f"{label}, seed {config.seed}, is there twice", "give it once")
        seen.add((label, config.seed))
    return baseline or there[0]


def compare_methods(
    methods: Sequence[str],
    seeds: Sequence[int],
    given: Mapping[str, Any],
    evaluation: EvaluationConfig,
    baseline: str,
    observer: Observer,
) -> Comparison:
    """Train what is not trained, evaluate all, and compare with `baseline` (the first method where
    it is empty). methods, seeds, given: see `configs_of`. Raises AbsldError."""
    configs, found = configs_of(methods, seeds, given)
    labels = labels_of(configs)
    baseline = check_members(labels, configs, baseline)
    splits = load_data(configs[0].dataset, configs[0].data, configs[0].image_size)
    parse_attacks(evaluation.attacks, splits.test.num_classes, 1)  # before hours of training
    members = []
    for number, (label, config) in enumerate(zip(labels, configs, strict=True), 1):
        observer.run(label, config.seed, number, len(configs))
        run = job.plan(config, splits).run
        reused = run.exists() and run.status() == "finished"
        if not reused:
            try:
                job.train(config, observer, resume=run.exists(), splits=splits)
            except Interrupted as stopped:
                stopped.way_out = "the same command goes on from here"
                raise
            except AbsldError as error:
                cause = f"{label}, seed {config.seed}: {error}"
                raise type(error)(cause, error.way_out) from error
        members.append(member_of(label, run.path, config, evaluation, splits, observer))
        observer.done(members[-1], reused)
    return compared(members, evaluation, baseline, Path(configs[0].out), found)


def compare_runs(
    paths: Sequence[str], evaluation: EvaluationConfig, baseline: str, out: str, observer: Observer
) -> Comparison:
    """Compare runs that are there, of any methods and seeds. Raises AbsldError."""
    configs = []
    for path in paths:
        run = RunDirectory(path)
        if not (run.path / "config.toml").exists() or run.status() != "finished":
            raise CheckpointError(f"{path}: no finished run", "`absld train --resume` ends a run")
        configs.append(of_run(run.path / "config.toml"))
    labels = labels_of(configs)
    baseline = check_members(labels, configs, baseline)
    sources = {(c.dataset, c.data, c.image_size) for c in configs}
    if len({dataset for dataset, _, _ in sources}) > 1:
        raise UsageError(
            f"these runs are of {' and '.join(sorted({s[0] for s in sources}))}",
            "needed: runs on the same images",
        )
    read = {source: load_data(*source) for source in sources}
    members = []
    for number, (label, path, config) in enumerate(zip(labels, paths, configs, strict=True), 1):
        observer.run(label, config.seed, number, len(paths))
        splits = read[config.dataset, config.data, config.image_size]
        members.append(member_of(label, Path(path), config, evaluation, splits, observer))
        observer.done(members[-1], True)
    return compared(members, evaluation, baseline, Path(out or Path(paths[0]).parent))


def member_of(
    label: str,
    path: Path,
    config: Config,
    evaluation: EvaluationConfig,
    splits: Splits,
    observer: Observer,
) -> Member:
    """A finished run, evaluated."""
    own = completed(evaluation, str(path))
    data = getattr(splits, evaluation.split)
    network = network_of(str(path), own, data)
    assessment = assess_network(str(path), network, data, own, observer)
    seconds = sum(record.get("seconds", 0.0) for record in RunDirectory(path).records())
    return Member(label, path, config, assessment, float(seconds))


# --- What they say ---


def compared(
    members: Sequence[Member],
    evaluation: EvaluationConfig,
    baseline: str,
    out: Path,
    found: Sequence[str] = (),
) -> Comparison:
    """The document and the files of a comparison."""
    check_alike(members)
    groups: dict[str, dict[int, Member]] = {}
    for member in members:
        groups.setdefault(member.label, {})[member.seed] = member
    first = members[0].assessment.document
    document = {
        "schema": SCHEMA,
        "environment": environment(resolve_device(evaluation.device)),
        "data": first["data"],
        "settings": first["settings"],
        "baseline": baseline,
        "notes": [*found, *notes(groups)],
        "methods": [
            method_document(label, list(of_label.values()), pairs_of(of_label, groups[baseline]))
            for label, of_label in groups.items()
        ],
    }
    made_of = {str(member.run.name): member.assessment.path.parent.name for member in members}
    folder = out / f"comparison-{key_of(made_of | {'baseline': baseline})}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": to_json(document),
        "table.md": markdown(document),
        "table.tex": latex(document),
        "table.csv": csv_text(document),
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    if importlib.util.find_spec("matplotlib"):
        plot(document, folder / "average-worst.png")
    return Comparison(folder, document)


def check_alike(members: Sequence[Member]) -> None:
    """Raise UsageError unless all were attacked alike on the same images."""
    first = members[0].assessment.document
    for member in members[1:]:
        other = member.assessment.document
        for part in ("settings", "data"):
            if other[part] != first[part]:
                name = next(n for n in first[part] if other[part].get(n) != first[part][n])
                raise UsageError(
                    f"{member.run} and {members[0].run} were not evaluated alike: {name} is "
                    f"{other[part].get(name)} and {first[part][name]}",
                    "needed: runs on the same images with the same budget",
                )


Pairs = list[tuple[Member, Member]]


def pairs_of(ours: Mapping[int, Member], base: Mapping[int, Member]) -> Pairs:
    """The runs of two methods, seed by seed; none with itself."""
    return [(ours[s], base[s]) for s in ours if s in base and ours[s] is not base[s]]


def method_document(label: str, members: Sequence[Member], pairs: Pairs) -> dict[str, Any]:
    """Of each figure the values, mean and standard deviation over the seeds, and the differences
    to the baseline."""
    rows = [member.figures() for member in members]
    return {
        "name": label,
        "method": members[0].config.method,
        "seeds": [member.seed for member in members],
        "runs": [str(member.run) for member in members],
        "warnings": sorted({w for member in members for w in member.assessment.warnings}),
        "figures": {name: spread([row[name] for row in rows]) for name in rows[0]},
        "differences": differences(pairs) if pairs else None,
    }


def spread(values: list[float]) -> dict[str, Any]:
    """Values with their mean and, for two or more, their standard deviation (of a sample)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {
        "mean": finite(tensor.mean().item()),
        "std": finite(tensor.std().item()) if len(values) > 1 else None,
        "values": [finite(value) for value in values],
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def differences(pairs: Pairs) -> dict[str, Any]:
    """Each metric minus the baseline's, and rho: the mean over the seeds that both have, with an
    interval for other seeds, and one for other images."""
    mine, theirs = zip(*pairs, strict=True)
    over_images = intervals(
        [m.assessment.evaluation for m in mine], [m.assessment.evaluation for m in theirs]
    )
    result = {}
    by_seed = [differences_of(one, other) for one, other in pairs]
    for name, images in over_images.items():
        values = [each[name] for each in by_seed]
        seeds = over_seeds(torch.tensor(values, dtype=torch.float64))
        result[name] = {
            **spread(values),
            "over_seeds": [finite(seeds.low), finite(seeds.high)],
            "over_images": [finite(images.low), finite(images.high)],
        }
    return result


def intervals(ours: list[Evaluation], theirs: list[Evaluation]) -> dict[str, Interval]:
    """Differences with bootstrap intervals over the images, by the names of the figures."""
    found: Differences = paired(ours, theirs)
    named = {f"clean_{name}": each for name, each in found.clean.items()}
    named |= {f"robust_{name}": each for name, each in found.robust.items()}
    return named | {"rho": found.rho}


def differences_of(ours: Member, theirs: Member) -> dict[str, float]:
    """The differences of two runs, and rho of their robust accuracies."""
    mine, other = ours.figures(), theirs.figures()
    robust = [present(member.assessment.evaluation.robust) for member in (ours, theirs)]
    return {name: mine[name] - other[name] for name in FIGURES} | {"rho": rho(*robust).item()}


def notes(groups: Mapping[str, Mapping[int, Member]]) -> list[str]:
    """What is not the same for all methods and is not their own: schedules, images, teachers."""
    found = []
    # A method may have its own attack; how long it trains, on what, is to be the same.
    alike = [f.name for f in fields(Config) if GROUPS[f.name] in ("Training", "Data", "Networks")]
    for name in alike:
        if name in ("seed", "data", "allow_weak_teacher", "bank_gib"):
            continue
        values = {
            label: repr(getattr(next(iter(of_label.values())).config, name))
            for label, of_label in groups.items()
        }
        if len(set(values.values())) > 1:
            each = ", ".join(f"{value} of {label}" for label, value in values.items())
            found.append(f"{name} is not the same: {each}")
    for label, of_label in groups.items():
        if any(member.config.select_on == "test" for member in of_label.values()):
            found.append(f"{label}: {job.SELECTED_ON_TEST}")
    for seed in sorted({seed for of_label in groups.values() for seed in of_label}):
        of_seed = [of_label[seed] for of_label in groups.values() if seed in of_label]
        if len({sha for member in of_seed if (sha := teacher_of(member))}) > 1:
            found.append(f"seed {seed}: the teachers are not the same")
    seeds = {label: sorted(of_label) for label, of_label in groups.items()}
    if len({tuple(each) for each in seeds.values()}) > 1:
        found.append(f"the seeds are not the same: {seeds}; differences are over common ones")
    return found


def teacher_of(member: Member) -> str | None:
    """The digest of the teacher of a run; None for a method without."""
    sha: str | None = job.sessions(member.run)[-1].get("teacher_sha256")
    return sha
