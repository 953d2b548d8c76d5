"""The results of a comparison: figures of every run, differences with intervals, files."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from absld.config.evaluation_settings import EvaluationConfig
from absld.config.resolve import SETTING_GROUPS
from absld.config.settings import Config
from absld.engine.precision import resolve_device
from absld.errors import UsageError
from absld.evaluation.attacks import AUTOATTACK_COSTS
from absld.evaluation.differences import paired_differences
from absld.evaluation.evaluate import Evaluation
from absld.evaluation.intervals import Interval, over_seeds
from absld.evaluation.results import to_json
from absld.evaluation.runner import EvaluationRun
from absld.methods import family_of
from absld.metrics import METRICS, present, rho
from absld.report import paper_table
from absld.report.comparison_plot import plot, plot_classes
from absld.report.comparison_tables import csv_text, latex, markdown
from absld.runs.planning import SELECTED_ON_TEST
from absld.storage.environment import environment, read_sessions
from absld.storage.files import key_of, write_text
from absld.storage.opening import make_folder
from absld.storage.run_directory import RunDirectory

SCHEMA = "absld-comparison-1"
FIGURES = [f"{kind}_{name}" for kind in ("clean", "robust") for name in METRICS]


@dataclass(frozen=True, eq=False)
class Member:
    """A run of a comparison. seconds: of its training, without validation."""

    label: str
    run: Path
    config: Config
    evaluation_run: EvaluationRun
    seconds: float

    @property
    def seed(self) -> int:
        return self.config.seed

    def figures(self) -> dict[str, float]:
        """Return each metric, clean and robust, and the seconds."""
        evaluation = self.evaluation_run.evaluation
        accuracies = (present(evaluation.clean_accuracy), present(evaluation.robust_accuracy))
        values = [metric(a).item() for a in accuracies for metric in METRICS.values()]
        return dict(zip(FIGURES, values, strict=True)) | {"seconds": self.seconds}


@dataclass(frozen=True)
class Comparison:
    """The results as plain values, and the folder of their files."""

    folder: Path
    results: dict[str, Any]


def summarise(
    members: Sequence[Member],
    evaluation: EvaluationConfig,
    baseline: str,
    out: Path,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compute the results of a comparison, and write its files."""
    results = compare_members(members, evaluation, baseline, notes)
    texts = {
        "comparison.json": to_json(results),
        "table.md": markdown(results),
        "table.tex": latex(results),
        "table.csv": csv_text(results),
    }
    if results["settings"]["each"]:
        texts["table-paper.md"] = paper_table.markdown(results)
        texts["table-paper.tex"] = paper_table.latex(results)
    folder = write_files("comparison", members, results, out, texts)
    plot(results, folder / "average-worst.png")
    plot_classes(results, folder / "classes.png")
    return Comparison(folder, results)


def compare_members(
    members: Sequence[Member],
    evaluation: EvaluationConfig,
    baseline: str,
    notes: Sequence[str],
    swept: Collection[str] = (),
) -> dict[str, Any]:
    """Compute the results of a comparison; no note is made of settings that are `swept`.

    Raises UsageError if runs were not evaluated alike.
    """
    check_same_evaluation(members)
    groups: dict[str, dict[int, Member]] = {}
    for member in members:
        groups.setdefault(member.label, {})[member.seed] = member
    first = members[0].evaluation_run.results
    return {
        "schema": SCHEMA,
        "environment": environment(resolve_device(evaluation.device)),
        "data": first["data"],
        "settings": first["settings"],
        "baseline": baseline,
        "notes": [*notes, *network_notes(members), *inequalities(groups, swept)],
        "methods": [
            method_results(label, list(of_label.values()), pair_by_seed(of_label, groups[baseline]))
            for label, of_label in groups.items()
        ],
    }


def write_files(
    kind: str,
    members: Sequence[Member],
    results: Mapping[str, Any],
    out: Path,
    texts: Mapping[str, str],
) -> Path:
    """Write texts by their names into a folder, which is named by the runs, and return it."""
    identity = {str(member.run.name): member.evaluation_run.path.parent.name for member in members}
    folder = out / f"{kind}-{key_of(identity | {'baseline': results['baseline']})}"
    make_folder(folder, out)
    for name, text in texts.items():
        write_text(folder / name, text)
    return folder


def check_same_evaluation(members: Sequence[Member]) -> None:
    """Raise UsageError unless all runs had the same attacks on the same images."""
    first = members[0].evaluation_run.results
    for member in members[1:]:
        other = member.evaluation_run.results
        for part in ("settings", "data"):
            if other[part] != first[part]:
                name = next(n for n in first[part] if other[part].get(n) != first[part][n])
                raise UsageError(
                    f"{member.run} and {members[0].run} were not evaluated alike: {name} is "
                    f"{other[part].get(name)} and {first[part][name]}",
                    "needed: runs on the same images with the same budget",
                )


Pairs = list[tuple[Member, Member]]


def pair_by_seed(ours: Mapping[int, Member], base: Mapping[int, Member]) -> Pairs:
    """Pair the runs of two methods seed by seed, none with itself."""
    return [(ours[s], base[s]) for s in ours if s in base and ours[s] is not base[s]]


def method_results(label: str, members: Sequence[Member], pairs: Pairs) -> dict[str, Any]:
    """Summarise a method: each figure over the seeds, and its differences to the baseline."""
    rows = [member.figures() for member in members]
    return {
        "name": label,
        "method": members[0].config.method,
        "family": family_of(members[0].config.method),
        "seeds": [member.seed for member in members],
        "runs": [str(member.run) for member in members],
        "warnings": sorted({w for member in members for w in member.evaluation_run.warnings}),
        "figures": {name: summary([row[name] for row in rows]) for name in rows[0]},
        "attacks": attack_results([member.evaluation_run.evaluation for member in members]),
        "differences": differences(pairs) if pairs else None,
        "classes": class_results(members),
        "temperatures": temperatures(members),
    }


def attack_results(evaluations: Sequence[Evaluation]) -> dict[str, Any] | None:
    """Return each metric under each attack alone, clean first; None if they were not run alone.

    NSD has no value where a network is always wrong.
    """
    if not all(evaluation.each for evaluation in evaluations):
        return None
    accuracies = [accuracy_by_attack(evaluation) for evaluation in evaluations]
    return {
        attack: {
            name: summary(
                [
                    metric(a).item() if name != "normalized_std" or a.any() else math.nan
                    for a in (of_seed[attack] for of_seed in accuracies)
                ]
            )
            for name, metric in METRICS.items()
        }
        for attack in accuracies[0]
    }


def accuracy_by_attack(evaluation: Evaluation) -> dict[str, Tensor]:
    """Compute the class accuracies under each attack alone; the parts of AutoAttack are one."""
    correct: dict[str, Tensor] = {}
    for name, of_row in zip(evaluation.attacks, evaluation.correct, strict=True):
        attack = "autoattack" if name in AUTOATTACK_COSTS else name
        correct[attack] = correct.get(attack, of_row) & of_row
    return {name: present(evaluation.class_accuracy(each)) for name, each in correct.items()}


def class_results(members: Sequence[Member]) -> list[dict[str, Any]]:
    """Return the robust accuracy of each class, in the mean over the seeds.

    The interval is over seeds by Student's t, or, of a single seed, over images by Wilson.
    """
    evaluations = [member.evaluation_run.evaluation for member in members]
    if len(evaluations) == 1:
        shares = evaluations[0].class_intervals(evaluations[0].robust)
    else:
        accuracies = torch.stack([each.robust_accuracy for each in evaluations])
        shares = [over_seeds(of_class) for of_class in accuracies.T]
    names = evaluations[0].classes
    return [
        {"class": name} | {key: finite(value) for key, value in share._asdict().items()}
        for name, share in zip(names, shares, strict=True)
    ]


def temperatures(members: Sequence[Member]) -> dict[str, Any] | None:
    """Return the temperatures of each class in the selected epoch, in the mean over the seeds.

    None for a method without, or whose temperatures stay 1.
    """
    kinds = {"adv": "temperature_adv", "nat": "temperature_nat"}
    count = len(members[0].evaluation_run.evaluation.classes)
    selected = []
    for member in members:
        best = [record for record in RunDirectory(member.run).records() if record.get("is_best")]
        selected.append({kind: (best or [{}])[-1].get(key) or [] for kind, key in kinds.items()})
    values = [value for each in selected for of_kind in each.values() for value in of_kind]
    if len(values) != 2 * count * len(members) or None in values or set(values) == {1}:
        return None
    config = members[0].config
    return {
        **{
            kind: torch.tensor([each[kind] for each in selected]).mean(0).tolist() for kind in kinds
        },
        "lower": config.temperature_lower,
        "upper": config.temperature_upper,
    }


def summary(values: list[float]) -> dict[str, Any]:
    """Return values with their mean and, of two or more, their sample standard deviation."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return {
        "mean": finite(tensor.mean().item()),
        "std": finite(tensor.std().item()) if len(values) > 1 else None,
        "values": [finite(value) for value in values],
    }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def differences(pairs: Pairs) -> dict[str, Any]:
    """Compute each metric minus the baseline's, and rho, averaged over the common seeds.

    With one interval for other seeds, and one for other images.
    """
    ours, base = zip(*pairs, strict=True)
    over_images = intervals(
        [member.evaluation_run.evaluation for member in ours],
        [member.evaluation_run.evaluation for member in base],
    )
    result = {}
    by_seed = [run_difference(run, baseline) for run, baseline in pairs]
    for name, images in over_images.items():
        values = [difference[name] for difference in by_seed]
        seeds = over_seeds(torch.tensor(values, dtype=torch.float64))
        result[name] = {
            **summary(values),
            "over_seeds": [finite(seeds.low), finite(seeds.high)],
            "over_images": [finite(images.low), finite(images.high)],
        }
    return result


def intervals(ours: list[Evaluation], theirs: list[Evaluation]) -> dict[str, Interval]:
    """Compute differences with bootstrap intervals over the images, by the names of the figures."""
    pair = paired_differences(ours, theirs)
    clean = {f"clean_{name}": interval for name, interval in pair.clean.items()}
    robust = {f"robust_{name}": interval for name, interval in pair.robust.items()}
    return {**clean, **robust, "rho": pair.rho}


def run_difference(run: Member, baseline: Member) -> dict[str, float]:
    """Compute the differences of two runs, and rho of their robust accuracies."""
    ours, base = run.figures(), baseline.figures()
    robust = [
        present(member.evaluation_run.evaluation.robust_accuracy) for member in (run, baseline)
    ]
    return {name: ours[name] - base[name] for name in FIGURES} | {"rho": rho(*robust).item()}


def network_notes(members: Sequence[Member]) -> list[str]:
    """Return the notes on loading the networks, such as on classes that are read by position."""
    return [note for each in members for note in each.evaluation_run.results["network"]["notes"]]


def inequalities(groups: Mapping[str, Mapping[int, Member]], swept: Collection[str]) -> list[str]:
    """List what differs between the methods beside the methods: schedules, images, teachers."""
    notes = []
    # A method may have its own attack; how long it trains, on what, is to be the same.
    common = ("Training", "Data", "Augmentation", "Networks")
    alike = [f.name for f in fields(Config) if SETTING_GROUPS[f.name] in common]
    for name in alike:
        if name in ("seed", "data", "allow_weak_teacher", "logit_cache_gib", *swept):
            continue
        labels_of: dict[str, list[str]] = {}
        for label, of_label in groups.items():
            value = getattr(next(iter(of_label.values())).config, name)
            labels_of.setdefault(repr(value), []).append(label)
        if len(labels_of) > 1:
            notes.append(f"{name} is not the same: {list_values(labels_of)}")
    for label, of_label in groups.items():
        if any(member.config.select_on == "test" for member in of_label.values()):
            notes.append(f"{label}: {SELECTED_ON_TEST}")
    for seed in sorted({seed for of_label in groups.values() for seed in of_label}):
        of_seed = [of_label[seed] for of_label in groups.values() if seed in of_label]
        if len({sha for member in of_seed if (sha := teacher_digest(member))}) > 1:
            notes.append(f"seed {seed}: the teachers are not the same")
    seeds = {label: sorted(of_label) for label, of_label in groups.items()}
    if len({tuple(each) for each in seeds.values()}) > 1:
        notes.append(f"the seeds are not the same: {seeds}; differences are over common ones")
    return notes


def list_values(labels_of: Mapping[str, Sequence[str]]) -> str:
    """List values with those that have them, the most common one last."""
    *few, (value, most) = sorted(labels_of.items(), key=lambda item: len(item[1]))
    listed = [f"{own} of {', '.join(labels)}" for own, labels in few]
    return "; ".join([*listed, f"{value} of {', '.join(most) if len(most) < 3 else 'the others'}"])


def teacher_digest(member: Member) -> str | None:
    """Return the digest of the teacher of a run; None for a method without."""
    sha: str | None = read_sessions(member.run)[-1].get("teacher_sha256")
    return sha
