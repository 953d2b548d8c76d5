"""Comparisons of methods: the same images, teachers and schedule, several seeds.

Finished runs are used again and missing ones trained, so the same command resumes an interrupted
comparison. The results are plain values (docs/comparing.md) and the files made of them.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from absld.config.datasets import Columns
from absld.config.evaluation_settings import EvaluationConfig
from absld.config.files import read_recipe, read_run_config
from absld.config.imports import names_code
from absld.config.launcher_settings import LauncherSettings
from absld.config.recipes import METHOD_RECIPES
from absld.config.resolve import SETTING_GROUPS, resolve
from absld.config.settings import YOUNGER, Config
from absld.data.dataset import ImageSet
from absld.data.decoding import Form
from absld.data.hub_datasets import refuse_unfetched
from absld.data.placement import Placement
from absld.data.sources import load_split
from absld.engine.precision import resolve_device
from absld.errors import AbsldError, BusyError, CheckpointError, Interrupted, UsageError
from absld.evaluation.attacks import parse_attacks
from absld.evaluation.runner import run_network_evaluation
from absld.evaluation.targets import complete_config, load_target
from absld.methods.registry import fine_tunes
from absld.progress import SILENT, Observer
from absld.report.summary import budget
from absld.runs import planning, training_run
from absld.runs.comparison_results import Comparison, Member, summarise
from absld.runs.estimate import is_worthwhile, jobs_at_a_time, trainings_left
from absld.runs.forecast import forecast
from absld.runs.launching import evaluation_of, launch, plan_jobs, without_device
from absld.runs.run_record import deciding_settings
from absld.storage.run_directory import RunDirectory

HERE = LauncherSettings()
WAIT = 1.0  # seconds before an evaluation at which another process is at work is tried again
# Groups of settings that a recipe may have.
METHOD_GROUPS = ("Method", "Attack", "Training", "Weight averaging")


def build_configs(
    methods: Sequence[str],
    seeds: Sequence[int],
    common_settings: Mapping[str, Any],
    schedule: str = "same",
) -> tuple[list[str], list[Config], list[str]]:
    """Build label and configuration of each run, all methods of the first seed first; and notes.

    methods: names, package.module:Class, or recipe files (.toml) that say what is different about a
    method. common_settings: settings of all runs.
    schedule: "own" is that of each method's recipe; else it is left out, and all methods train
    alike, but for those that fine-tune.
    Raises UsageError.
    """
    labels = label_methods(methods)
    read = [read_method(name, common_settings, schedule) for name in methods]
    configs = [
        resolve({**common_settings, **recipe, "seed": seed}, schedule_of_method=own_schedule)
        for seed in seeds
        for recipe, own_schedule, _ in read
    ]
    notes = [
        f"{label}: {'; '.join(remarks)}"
        for label, (_, _, remarks) in zip(labels, read, strict=True)
        if remarks
    ]
    return [label for _ in seeds for label in labels], configs, notes


def read_method(
    name: str, common_settings: Mapping[str, Any], schedule: str
) -> tuple[dict[str, Any], bool, list[str]]:
    """Return what is different about a method, whether it keeps its schedule, and remarks."""
    recipe, remarks = {"method": name}, []
    if is_recipe(name):
        recipe = {"method": "absld"} | read_recipe(name, common_settings)
        if other := [key for key in recipe if SETTING_GROUPS[key] not in METHOD_GROUPS]:
            raise UsageError(
                f"{name} sets {', '.join(other)}, which is not a setting of a method",
                "give it as a flag, to all methods alike",
            )
    fine_tuned = fine_tunes(recipe["method"])
    own_schedule = fine_tuned or schedule == "own"
    left_out = [key for key in recipe if SETTING_GROUPS[key] == "Training" and not own_schedule]
    recipe = {key: value for key, value in recipe.items() if key not in left_out}
    if is_recipe(name):
        own = (f"{key}={value}" for key, value in recipe.items() if key != "method")
        remarks.append(" ".join([recipe["method"], *own]))
    if left_out:
        remarks.append(f"{', '.join(left_out)} left out, all methods train alike")
    if fine_tuned and schedule == "same":
        remarks.append("fine-tunes a robust network, with the schedule of its recipe")
    return recipe, own_schedule, remarks


def is_recipe(method: str) -> bool:
    return method.endswith(".toml")


def label_methods(methods: Sequence[str]) -> list[str]:
    """Return the name of each method in tables: of a recipe file its stem, if no other has that."""
    short = [Path(name).stem if is_recipe(name) else name for name in methods]
    return [
        label if short.count(label) == 1 else name
        for name, label in zip(methods, short, strict=True)
    ]


def label_configs(configs: Sequence[Config]) -> list[str]:
    """Name each finished run: its method, and how it differs from the first one of that method.

    Configurations that differ by their seed alone have the same label.
    """
    first: dict[str, dict[str, Any]] = {}
    labels = []
    for config in configs:
        own = own_settings(config) | {"seed": None}
        standard = first.setdefault(config.method, own)
        other = [f"{name}={own[name]}" for name in own if own[name] != standard[name]]
        labels.append(" ".join([config.method, *other]))
    return labels


def own_settings(config: Config) -> dict[str, Any]:
    """Return the settings that tell a run from others."""
    return deciding_settings(config) | {name: getattr(config, name) for name in YOUNGER}


def resolve_baseline(labels: Sequence[str], configs: Sequence[Config], baseline: str) -> str:
    """Return the baseline, the first label where it is empty.

    Raises UsageError if there is no such label, nothing to compare, a run twice,
    or runs of different budgets.
    """
    distinct = list(dict.fromkeys(labels))
    if len(distinct) < 2:
        raise UsageError(
            "compare needs at least two methods", f"there are: {', '.join(METHOD_RECIPES)}"
        )
    if baseline and baseline not in distinct:
        raise UsageError(
            f"there is no {baseline!r} to compare with", f"there are: {', '.join(distinct)}"
        )
    budgets = {f"epsilon {budget(vars(config))}": None for config in configs}
    if len(budgets) > 1:
        raise UsageError(
            f"the budgets differ: {' and '.join(budgets)}", "needed: runs with one norm and epsilon"
        )
    seen: dict[str, str] = {}
    for label, config in zip(labels, configs, strict=True):
        own = repr(own_settings(config))
        if own in seen:
            both = " and ".join(dict.fromkeys([seen[own], label]))
            raise UsageError(f"{both}, seed {config.seed}, is given twice", "give it once")
        seen[own] = label
    return baseline or distinct[0]


def planned_runs(
    methods: Sequence[str],
    seeds: Sequence[int],
    common_settings: Mapping[str, Any],
    baseline: str,
    schedule: str,
) -> tuple[list[str], list[Config], str, list[str]]:
    """Return label and configuration of each run of `compare_methods`, the baseline, and notes."""
    labels, configs, notes = build_configs(methods, seeds, common_settings, schedule)
    return labels, configs, resolve_baseline(labels, configs, baseline), notes


def compare_methods(
    methods: Sequence[str],
    seeds: Sequence[int],
    common_settings: Mapping[str, Any],
    evaluation: EvaluationConfig,
    baseline: str,
    observer: Observer,
    launcher: LauncherSettings = HERE,
    schedule: str = "same",
) -> Comparison:
    """Train the missing runs, evaluate all, and compare with `baseline`.

    methods, seeds, common_settings, schedule: see `build_configs`. baseline: the first method where
    it is empty. Raises AbsldError.
    """
    labels, configs, baseline, notes = planned_runs(
        methods, seeds, common_settings, baseline, schedule
    )
    members, more_notes = train_and_evaluate(labels, configs, evaluation, observer, launcher)
    return summarise(members, evaluation, baseline, Path(configs[0].out), [*notes, *more_notes])


def train_and_evaluate(
    labels: Sequence[str],
    configs: Sequence[Config],
    evaluation: EvaluationConfig,
    observer: Observer,
    launcher: LauncherSettings = HERE,
) -> tuple[list[Member], list[str]]:
    """Train the runs that are missing by a launcher, and evaluate all; and notes on the images.

    labels: name the configurations, which are of the same images. Raises AbsldError.
    """
    here = launcher.launcher == "here"
    # Elsewhere trained and evaluated, runs are only read here.
    own_configs = configs if here else [without_device(config) for config in configs]
    splits = planning.load_splits(own_configs[0], resolve_device(own_configs[0].device), observer)
    parse_attacks(evaluation.attacks, splits.test.num_classes, 1)  # before hours of training
    jobs = plan_jobs(labels, configs, evaluation, splits, observer)
    measured = None
    if is_worthwhile(jobs, configs, splits, launcher):
        left = trainings_left(labels, configs, jobs, evaluation, splits)
        measured = sum(training.seconds for training in left)
    observer.wait(forecast(jobs, len(configs), jobs_at_a_time(launcher), measured))
    launched: set[Path] = set()
    if not here:
        launched = launch(launcher, jobs, configs[0].device, observer)
        evaluation = without_device(evaluation)
    members = []
    for number, (label, config) in enumerate(zip(labels, own_configs, strict=True), 1):
        observer.begin_run(label, config.seed, number, len(configs))
        run = planning.plan(config, observer, splits).run
        finished = run.exists() and run.status() == "finished"
        if not finished:
            try:
                training_run.train(config, observer, resume=run.exists(), splits=splits)
            except Interrupted:
                raise
            except AbsldError as error:
                cause = f"{label}, seed {config.seed}: {error}"
                raise type(error)(cause, error.hint) from error
        own = evaluation_of(config, evaluation)
        images = getattr(splits, evaluation.split)
        # A job has shown and tracked its evaluation itself.
        shown = SILENT if run.path in launched else observer
        members.append(evaluate_run(label, run.path, config, own, images, shown))
        reused = finished and run.path not in launched
        observer.end_run(members[-1].figures(), members[-1].seconds, reused)
    return members, splits.describe()


def compare_runs(
    paths: Sequence[str], evaluation: EvaluationConfig, baseline: str, out: str, observer: Observer
) -> Comparison:
    """Compare finished runs, of any methods and seeds. Raises AbsldError."""
    configs = []
    for path in paths:
        run = RunDirectory(path)
        if not (run.path / "config.toml").exists() or run.status() != "finished":
            raise CheckpointError(
                f"{path}: not a finished run", "`absld train --resume` finishes a run"
            )
        configs.append(read_run_config(run.path / "config.toml"))
    labels = label_configs(configs)
    baseline = resolve_baseline(labels, configs, baseline)
    sources = {(c.dataset, c.data, Form.of(c), Columns.of(c)) for c in configs}
    if len({dataset for dataset, *_ in sources}) > 1:
        raise UsageError(
            f"these runs are of {' and '.join(sorted({s[0] for s in sources}))}",
            "needed: runs on the same images",
        )
    refuse_unfetched(configs[0].dataset, paths[0])
    placement = Placement(evaluation.in_memory, resolve_device(evaluation.device), observer)
    images_of = {
        source: load_split(*source[:3], evaluation.split, placement, source[3])
        for source in sources
    }
    members = []
    for number, (label, path, config) in enumerate(zip(labels, paths, configs, strict=True), 1):
        observer.begin_run(label, config.seed, number, len(paths))
        images = images_of[config.dataset, config.data, Form.of(config), Columns.of(config)]
        members.append(evaluate_run(label, Path(path), config, evaluation, images, observer))
        observer.end_run(members[-1].figures(), members[-1].seconds, True)
    return summarise(members, evaluation, baseline, Path(out or Path(paths[0]).parent))


def evaluate_run(
    label: str,
    path: Path,
    config: Config,
    evaluation: EvaluationConfig,
    data: ImageSet,
    observer: Observer,
) -> Member:
    """Evaluate a finished run, after another process that does.

    A network that is a factory counts if `evaluation.model` has it.
    """
    trusted = names_code(config.student) and config.student in evaluation.model.split(",")
    evaluation = replace(evaluation, model=config.student if trusted else "")
    own = complete_config(evaluation, str(path))
    network = load_target(str(path), own, data)
    waits = False
    while True:
        try:
            evaluation_run = run_network_evaluation(str(path), network, data, own, observer)
            break
        except BusyError as error:  # another command computes or reads the same evaluation
            if not waits:
                observer.wait(f"waiting: {error}")
            waits = True
            time.sleep(WAIT)
    seconds = sum(record.get("seconds", 0.0) for record in RunDirectory(path).records())
    return Member(label, path, config, evaluation_run, float(seconds))
