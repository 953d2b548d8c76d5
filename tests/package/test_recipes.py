"""Recipes that come with the package, by their names; what a recipe says to `absld compare`."""

import hashlib
from pathlib import Path

import pytest
from helpers.program import main, refused

from absld.cli.recipe_view import file_parts
from absld.config.files import RECIPE_FILES, SEAL, read_recipe, read_whole_recipe, to_toml
from absld.config.recipes import METHOD_RECIPES, RECIPES
from absld.config.resolve import resolve
from absld.errors import AbsldError, UsageError
from absld.models.architectures import find_model
from absld.models.published import PUBLISHED, refuse_published
from absld.runs import comparison

NAMES = sorted(RECIPE_FILES)
PAPER = "paper-cifar10-resnet18"
TABLE = """\
epochs = 3
[compare]
methods = ["sat", "rslad"]
seeds = [4]
baseline = "rslad"
schedule = "own"
attacks = "fgsm"
checks = false
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def compared(monkeypatch):
    """Return what a command line asks to compare: methods, seeds, settings, evaluation, baseline, schedule."""

    def parse(*flags):
        seen = []

        def stop(methods, seeds, settings, evaluation, baseline, observer, launcher, schedule):
            seen.append((methods, seeds, settings, evaluation, baseline, schedule))
            raise AbsldError("seen", "enough")

        monkeypatch.setattr(comparison, "compare_methods", stop)
        assert main("compare", *flags) == 1
        return seen[0]

    return parse


# --- Those of the package ---


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_the_package_says_what_its_name_does(name):
    config = resolve(read_recipe(name))
    assert name == f"paper-{config.dataset}-{config.student}" and config.dataset in RECIPES
    assert find_model(config.student) and find_model(config.teacher_model)
    if teacher := config.teacher.removeprefix("published:"):
        assert (config.dataset, teacher, config.teacher_model) in {
            (row.dataset, row.name, row.architecture) for row in PUBLISHED
        }


@pytest.mark.parametrize("name", NAMES)
def test_each_of_its_values_has_a_source_and_is_shown_with_it(name, capfd):
    _, sources, _ = file_parts(name)
    assert sources.keys() == read_recipe(name).keys()
    assert all(
        s.startswith(("the paper", "the authors' release", "assumed")) for s in sources.values()
    )
    assert main("recipe", "show", name) == 0
    shown = capfd.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80 and "# [compare]" in shown
    for setting, source in sources.items():
        assert any(
            line.startswith(f"{setting} ") and line.endswith(source) for line in shown.splitlines()
        )


@pytest.mark.parametrize("name", NAMES)
def test_it_leaves_attack_loss_and_schedule_to_the_methods(name):
    """Else the value for all methods would replace what their authors train with."""
    own = {setting for recipe in METHOD_RECIPES.values() for setting in recipe}
    assert not own & read_recipe(name).keys()


def test_its_methods_are_known():
    for name in NAMES:
        known = read_whole_recipe(name)[1]["methods"].split(",")
        assert known and {*known} <= METHOD_RECIPES.keys()


def test_all_are_listed(capfd):
    assert main("recipe", "list") == 0
    rows = [line.split()[0] for line in capfd.readouterr().out.splitlines()]
    assert rows == [*RECIPES, *NAMES]


# --- Names and files ---


def test_a_name_never_reads_a_file():
    Path(PAPER).write_text("epochs = 1\n")
    assert "epochs" not in read_recipe(PAPER)
    assert read_recipe(f"./{PAPER}") == {"epochs": 1}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("paper-cifar10-resnet", f"did you mean '{PAPER}'"),
        ("cifar10", "--dataset cifar10"),
        ("mine.toml", "name = value"),
    ],
)
def test_a_name_that_there_is_not(name, hint, capfd):
    refused(capfd, 2, f"{name}: No such file", hint, "train", "--recipe", name)


@pytest.mark.parametrize(
    ("teacher", "hint"),
    [
        (
            "Zhang2019Theoretically",
            "https://drive.google.com/file/d/10sHvaXhTNZGz618QmD5gSOAjO3rMzV33",
        ),
        ("Wang2023Better_WRN-28-10", "--teacher hf:wzekai99/DM-Improves-AT/"),
        ("Gowal2020Uncovering", "absld teacher list --dataset cifar10"),
    ],
)
def test_a_published_teacher_is_not_fetched_but_said_where_it_is(teacher, hint):
    with pytest.raises(UsageError) as caught:
        refuse_published(f"published:{teacher}", "cifar10")
    assert teacher in str(caught.value) and hint in caught.value.hint


# --- [compare] ---


def test_a_recipe_may_say_what_is_compared(compared):
    Path("mine.toml").write_text(TABLE)
    methods, seeds, settings, evaluation, baseline, schedule = compared("--recipe", "mine.toml")
    assert (methods, seeds, baseline, schedule) == (["sat", "rslad"], [4], "rslad", "own")
    assert (evaluation.attacks, evaluation.checks) == ("fgsm", False)
    assert settings == {}  # its own schedule would be that of all methods


def test_flags_override_it(compared):
    Path("mine.toml").write_text(TABLE)
    flags = ["--methods", "trades,sat", "--seeds", "2", "--schedule", "same", "--attacks", "pgd3"]
    methods, seeds, settings, evaluation, baseline, schedule = compared(
        "--recipe", "mine.toml", *flags
    )
    assert (methods, seeds, baseline, schedule) == (["trades", "sat"], [0, 1], "", "same")
    assert evaluation.attacks == "pgd3" and settings == {"epochs": 3}
    *_, settings, _, _, _ = compared("--recipe", "mine.toml", "--epochs", "5")
    assert settings == {"epochs": "5"}


@pytest.mark.parametrize(
    ("lines", "cause", "hint"),
    [
        ("[compare]\nmethod = 'sat'", "there is no 'method' in [compare]", "methods, seeds"),
        ("compare = 3", "compare is a table", "[compare]"),
        ("[compare]\nmethods = ['sat', 'rslad']\nschedule = 'mine'", "schedule", "--help"),
        ("[compare]\nmethods = ['sat', 'rslad']\nseeds = ['few']", "whole numbers", "5, or 0,3,7"),
        ("[compare]\nmethods = 3", "methods in [compare] takes a text, not 3", "methods ="),
        ("[compare]\nmethods = 'sat,rslad'\nbaseline = 5", "baseline in [compare]", "baseline ="),
    ],
)
def test_a_comparison_that_cannot_be_read(lines, cause, hint, capfd):
    Path("mine.toml").write_text(lines)
    refused(capfd, 2, cause, hint, "compare", "--recipe", "mine.toml")


def test_settings_of_a_run_compare_nothing():
    """They may be somebody else's, and methods may name code."""
    text = to_toml(resolve({})).partition(SEAL)[0] + '[compare]\nmethods = ["os:abort"]\n'
    Path("any.toml").write_text(f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n")
    with pytest.raises(UsageError, match="no setting 'compare'"):
        read_whole_recipe("any.toml")


def test_methods_train_as_their_authors_do_if_that_is_wanted():
    of_all = {"dataset": "cifar10"}
    names = ["trades", "ard", "absld"]
    _, same, _ = comparison.build_configs(names, [0], of_all)
    _, own, _ = comparison.build_configs(names, [0], of_all, "own")
    assert [config.epochs for config in same] == [300] * 3
    assert [config.epochs for config in own] == [76, 200, 300]
    Path("mine.toml").write_text('method = "ard"\nepochs = 7\n')
    labels, (mine,), notes = comparison.build_configs(["mine.toml"], [0], of_all, "own")
    assert labels == ["mine"] and mine.epochs == 7 and notes == ["mine: ard epochs=7"]
