"""Settings: what they take, where their values come from, and the files that hold them."""

import inspect
import itertools
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields, replace
from typing import get_type_hints

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from absld.config.fields import MOST
from absld.config.files import MAY_NAME_CODE, read_recipe, to_toml
from absld.config.parsing import choices_of, parse, strip_optional
from absld.config.recipes import METHOD_RECIPES, NORM_RECIPES, RECIPES
from absld.config.resolve import resolve, setting_source
from absld.config.settings import Config, TrainConfig
from absld.errors import CheckpointError, UsageError

TYPES = get_type_hints(Config)


def numbers(low, high):
    return st.floats(low, high, allow_nan=False)


# Lone surrogates are not text, for a file could not hold them, and no path has a zero.
text = st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1), max_size=8)
VALUES = (
    {k: st.sampled_from(choices_of(kind)) for k, kind in TYPES.items() if choices_of(kind)}
    | {k: st.booleans() for k, kind in TYPES.items() if strip_optional(kind) is bool}
    | dict.fromkeys(("data", "student", "teacher", "teacher_model", "out", "device"), text)
    | dict.fromkeys(("student_weights", "teacher_weights"), text)
    | dict.fromkeys(("image_column", "label_column"), st.just(""))  # of data sets on a hub only
    | {"track": st.just("")}  # a run's file starts no tracker
    | {"dataset": st.sampled_from([*RECIPES, "hf:owner/name@v1/subset"])}
    | {"method": st.sampled_from([*METHOD_RECIPES, "mine.methods:Mart"])}
    | dict.fromkeys(("adv_weight", "epsilon", "flip", "momentum"), numbers(0, 1))
    | dict.fromkeys(("learning_rate", "weight_decay", "kl_scale"), numbers(0, MOST))
    | dict.fromkeys(("start_noise", "relative_step_size", "logit_cache_gib"), numbers(0, MOST))
    | dict.fromkeys(("epochs", "batch_size", "max_steps", "teacher_epochs"), st.integers(1, 2**31))
    | {"check_every": st.integers(1, 2**31)}
    | {"attack_steps": st.integers(1, 2**31), "padding": st.integers(0, 2**31)}
    | {"image_size": st.integers(1, 2**31)}
    | {
        "seed": st.integers(),
        "temperature_rate": numbers(0, 10),
        "temperature_lower": numbers(1e-3, 1),
        "temperature_upper": numbers(1, 1e3),
        "milestones": st.lists(numbers(0, 1), max_size=3).map(tuple),
    }
)
settings = st.fixed_dictionaries({}, optional=VALUES)


def refused(*patterns, of):
    with pytest.raises(UsageError) as caught:
        of()
    for pattern in patterns:
        assert pattern in f"{caught.value}\n{caught.value.hint}"
    return caught.value


# --- Files and flags ---


def test_the_strategy_knows_every_setting():
    """Else the round trip below would pass over the ones that are added."""
    assert VALUES.keys() == {f.name for f in fields(Config)} == TYPES.keys()


@given(settings)
@example({"data": "spaces and ümlauts \\ \" '", "out": "日本\n\t"})
@example({"data": "\x7f", "milestones": (), "max_steps": None})
@example({"epsilon": 5e-324, "learning_rate": 1e9, "seed": -(10**30)})
def test_a_recipe_file_reads_back_as_the_same_settings(tmp_path_factory, settings):
    path = tmp_path_factory.getbasetemp() / "spaces ünd.toml"
    config = resolve(settings)
    path.write_bytes(to_toml(config).encode())
    assert resolve(read_recipe(str(path), (*MAY_NAME_CODE, "dataset"))) == config


@given(settings)
def test_a_flag_is_read_as_a_line_of_a_file_is(settings):
    """A flag is a text; the same value as a number in a file is the same setting."""
    for name, value in resolve(settings).__dict__.items():
        if isinstance(value, tuple) and value:
            assert parse(name, ",".join(map(repr, value)), Config) == value
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            assert parse(name, str(value), Config) == value


def test_what_a_file_does_not_say_comes_from_the_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('dataset = "cifar10"\nepsilon = "8/255"\nmilestones = [0.5, 1]\n')
    config = resolve(read_recipe(str(path)))
    assert config == replace(resolve({"dataset": "cifar10"}), milestones=(0.5, 1.0))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epsilom = 0.1", "did you mean 'epsilon'"),
        ("temperature-rate = 0.1", "did you mean 'temperature_rate'"),
        ("zzzz = 1", "absld recipe show"),
        ("epochs = 2.0", "epochs takes a whole number, not 2.0"),
        ("epochs = true", "epochs takes a whole number, not True"),
        ('epochs = "many"', "epochs takes a whole number, not 'many'"),
        ("epsilon = true", "epsilon takes a number, not True"),
        ("epsilon = [0.1]", "epsilon takes a number, not [0.1]"),
        ('epsilon = "8/0"', "epsilon takes a number, not '8/0'"),
        ("data = 3", "data takes a text, not 3"),
        ("allow_weak_teacher = 1", "allow_weak_teacher takes true or false, not 1"),
        ("milestones = 0.5", "milestones takes numbers, not 0.5"),
        ('milestones = ["half"]', "milestones takes numbers"),
        ("max_steps = 0", "max_steps must be 1 or more, not 0"),
        ('method = "abslt"', "did you mean 'absld'?"),
        ('method = "abslt"', ", or package.module:Class, not 'abslt'"),
        ("method = 3", "method takes a text, not 3"),
        ("[data]\npath = 1", "data takes a text"),
        ("epochs == 3", "needed: lines of name = value"),
        ("epochs = 3\nepochs = 4", "needed: lines of name = value"),
    ],
)
def test_a_line_that_is_not_a_setting(line, said, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(line)
    refused(said, of=lambda: resolve(read_recipe(str(path))))


def test_every_setting_that_may_name_code_is_known_as_one():
    """A run's settings name no code: a setting that is added must be among those."""
    naming = {f.name for f in fields(Config) if "package.module:" in f.metadata["meaning"]}
    assert naming == set(MAY_NAME_CODE)


def test_a_recipe_of_the_user_s_own_may_name_code(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('student = "mine:net"\nmethod = "mine:Mart"\n')
    assert resolve(read_recipe(str(path))).student == "mine:net"


def test_a_run_s_settings_count_as_they_are_where_flags_replace_the_names_of_code(tmp_path):
    path = tmp_path / "any name.toml"
    path.write_text(to_toml(resolve({"student": "os:abort", "epochs": 7})))
    refused("student is 'os:abort'", "--student os:abort", of=lambda: read_recipe(str(path)))
    assert read_recipe(str(path), {"student": "convnet"})["epochs"] == 7


CUT, CHANGED = "cut short", "has changed since the run wrote it"
WHOLE = to_toml(resolve({"epochs": 7}))
NO_SEAL = WHOLE[: WHOLE.rindex("\n", 0, -1) + 1]


@pytest.mark.parametrize(
    ("name", "beside", "text", "fault"),
    [
        ("config.toml", None, WHOLE, ""),
        ("config.toml", "STATUS", WHOLE, ""),
        ("config.toml", None, WHOLE[:100], CUT),
        ("config.toml", None, "", CUT),
        ("mine.toml", "STATUS", NO_SEAL, CUT),
        ("mine.toml", "environment.json", NO_SEAL, CUT),
        ("mine.toml", None, NO_SEAL, ""),
        ("mine.toml", None, WHOLE.replace("epochs = 7", "epochs = 8"), CHANGED),
        ("config.toml", None, WHOLE[:-3], CHANGED),
        ("config.toml", None, f"{WHOLE}epochs = 8\n", CHANGED),
    ],
)
def test_settings_of_a_run_are_a_recipe_if_they_are_whole(name, beside, text, fault, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    if beside:
        (tmp_path / beside).touch()
    if not fault:
        assert read_recipe(str(path))["epochs"] == 7
        return
    with pytest.raises(CheckpointError, match=f"{name}: {fault}") as caught:
        read_recipe(str(path))
    assert "another place and no such last line" in caught.value.hint


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_is_no_recipe(content, tmp_path):
    path = tmp_path / "mine.toml"
    if content:
        path.write_bytes(content)
    refused("mine.toml", "lines of name = value", of=lambda: read_recipe(str(path)))
    refused(str(tmp_path), of=lambda: read_recipe(str(tmp_path)))


# --- Values ---


@pytest.mark.parametrize(
    ("given", "value"), [("8/255", 8 / 255), ("0.031", 0.031), (0, 0.0), ("1e-3", 0.001), (1, 1.0)]
)
def test_epsilon_as_a_fraction_or_a_number(given, value):
    found = resolve({"epsilon": given}).epsilon
    assert found == value and type(found) is float


@pytest.mark.parametrize("value", ["2", 2, "nan", "-1", -1, "inf", "1e99999999", "1/0", "8/", ""])
def test_epsilons_that_are_none(value):
    refused("epsilon", of=lambda: resolve({"epsilon": value}))


RANGES = {
    "temperature_rate": (0, 10), "adv_weight": (0, 1), "epsilon": (0, 1), "flip": (0, 1),
    "momentum": (0, 1), "temperature_lower": (1e-3, 1), "temperature_upper": (1, 1e3),
}  # fmt: skip
LEAST = {
    "epochs": 1, "batch_size": 1, "max_steps": 1, "attack_steps": 1, "padding": 0, "start_noise": 0, "logit_cache_gib": 0,
    "relative_step_size": 0, "learning_rate": 0, "weight_decay": 0, "kl_scale": 0,
    "teacher_epochs": 1, "image_size": 1, "check_every": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", RANGES)
def test_ranges_hold_their_ends_and_nothing_beyond(name):
    low, high = RANGES[name]
    for end in (low, high):
        assert getattr(resolve({name: end}), name) == end
    said = f"{name} must be in [{low:g}, {high:g}], not "
    for beyond in (low - 1e-6, high + 1e-6, float("nan"), float("inf"), float("-inf")):
        refused(f"{said}{beyond}", of=lambda value=beyond: resolve({name: value}))


@pytest.mark.parametrize("name", LEAST)
def test_least_values(name):
    assert getattr(resolve({name: LEAST[name]}), name) == LEAST[name]
    said = f"{name} must be {LEAST[name]} or more, not {LEAST[name] - 1}"
    error = refused(said, of=lambda: resolve({name: LEAST[name] - 1}))
    assert error.hint, "the second line of every error says what to do"
    integer = strip_optional(TYPES[name]) is int
    most = "2.14748e+09" if integer else "1e+38"
    for value in (2**31 + 1, 10**400) if integer else (1.1e38, float("inf")):
        said = f"{name} must be in [{LEAST[name]}, {most}], not "
        assert len(str(refused(said, of=lambda value=value: resolve({name: value})))) < 100
    if TYPES[name] is float:
        refused(name, of=lambda: resolve({name: float("nan")}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", "float16"),
        ("method", "nope"),
        ("epochs", 2.5),
        ("seed", "one"),
    ],
)
def test_a_configuration_made_in_python_is_checked_alike(name, value):
    """Without the tests' type checks, which users have not."""
    unchecked = inspect.unwrap(TrainConfig.__init__)
    refused(f"{name} takes ", of=lambda: unchecked(TrainConfig(), **{name: value}))


@pytest.mark.parametrize("name", ["data", "out", "student", "teacher"])
def test_no_text_has_a_zero_which_no_path_has(name):
    refused(f"{name} takes a text, not 'a\\x00b'", of=lambda: resolve({name: "a\0b"}))


@pytest.mark.parametrize("milestones", [(1.5,), (-0.1,), (float("nan"),)])
def test_milestones_are_parts_of_the_run(milestones):
    refused("milestones must be in [0, 1], not ", of=lambda: TrainConfig(milestones=milestones))


def test_every_number_has_a_range():
    """A setting that is added without one would be the first that takes NaN."""
    numbers = {name for name, kind in TYPES.items() if kind in (int, float, int | None)}
    assert numbers - {"seed"} == RANGES.keys() | LEAST.keys()


def test_settings_do_not_change():
    with pytest.raises(FrozenInstanceError):
        resolve({}).epochs = 3


def test_unknown_names_in_a_call():
    said = "there is no setting 'epsilom'", "did you mean 'epsilon'?"
    refused(*said, of=lambda: resolve({"epsilom": 0.1}))


# --- Recipes and sources ---


def test_the_released_settings_are_cifar10s():
    config = resolve({"dataset": "cifar10"})
    found = {name: getattr(config, name) for name in (
        "epochs", "batch_size", "learning_rate", "momentum", "weight_decay", "epsilon",
        "relative_step_size", "attack_steps", "start_noise", "temperature_rate",
        "temperature_lower", "temperature_upper", "adv_weight", "padding", "flip", "student",
        "teacher_model", "select_on",
    )}  # fmt: skip
    assert found == {
        "epochs": 300, "batch_size": 128, "learning_rate": 0.1, "momentum": 0.9,
        "weight_decay": 2e-4, "epsilon": 8 / 255, "relative_step_size": 0.25, "attack_steps": 10,
        "start_noise": 0.001, "temperature_rate": 0.1, "temperature_lower": 0.5,
        "temperature_upper": 5.0, "adv_weight": 5 / 6, "padding": 4, "flip": 0.5,
        "student": "resnet18", "teacher_model": "wrn-34-10", "select_on": "validation",
    }  # fmt: skip
    assert config.milestone_epochs() == [215, 260, 285]
    assert config.epsilon * config.relative_step_size == 2 / 255


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_settings(name):
    config = resolve({"dataset": name})
    assert config.dataset == name
    for setting, (value, _) in RECIPES[name].items():
        assert getattr(config, setting) == value


def test_a_recipe_gives_way_to_what_is_given():
    assert resolve({"epochs": 7}).epochs == 7 and resolve({}).epochs == 40
    assert resolve({"dataset": "cifar100"}).epochs == 300


def test_every_value_has_a_source():
    for names in itertools.product(RECIPES, METHOD_RECIPES, NORM_RECIPES):
        config = resolve(dict(zip(("dataset", "method", "norm"), names, strict=True)))
        for f in fields(Config):
            source = setting_source(config, f.name)
            assert source not in ("", "given") or f.name in ("method", "norm"), (names, f.name)
    assert all(f.metadata["meaning"] and f.metadata["group"] for f in fields(Config))


def test_sources():
    config = resolve({"learning_rate": 0.05, "dataset": "digits"})
    assert setting_source(config, "learning_rate") == "given"
    assert setting_source(config, "momentum") == "the authors' release"
    assert setting_source(config, "epochs") == "decided here, for digits"
    assert setting_source(config, "seed") == "decided here"
    assert setting_source(resolve({"dataset": "cifar10"}), "dataset") == "the paper"
    assert setting_source(resolve({"epochs": 3}), "epochs") == "given"


# --- The parts of a configuration ---


def test_the_training_has_the_settings_of_the_run():
    config = resolve({"epochs": 3, "fidelity": "released", "seed": 5})
    assert type(config.training()) is TrainConfig
    assert asdict(config.training()).items() <= asdict(config).items()


def test_a_method_brings_its_recipe():
    ard = resolve({"dataset": "cifar10", "method": "ard"})
    assert (ard.start, ard.adv_weight, ard.epochs) == ("uniform", 1.0, 200)
    assert ard.milestone_epochs() == [100, 150]
    assert setting_source(ard, "epochs") == setting_source(ard, "start") == "ARD"
    # The data set's recipe goes before it, and what is given before both.
    digits = resolve({"method": "ard", "start": "normal"})
    assert (digits.epochs, digits.start, digits.milestones) == (40, "normal", (0.5, 0.75))
    assert setting_source(digits, "epochs") == "decided here, for digits"
    assert setting_source(digits, "start") == "the authors' release"
    trades = resolve({"dataset": "cifar10", "method": "trades", "epsilon": 0.031})
    assert trades.epsilon * trades.relative_step_size == pytest.approx(0.007)
    assert trades.milestone_epochs() == [75] and trades.epochs == 76


@pytest.mark.parametrize("method", METHOD_RECIPES)
def test_a_norm_brings_its_budget_and_steps(method):
    """Before those of data set and method, which are of the other norm; not before what is given."""
    for dataset in RECIPES:
        plain = {"dataset": dataset, "method": method}
        config = resolve(plain | {"norm": "l2"})
        for found in (config, config.teacher_training()):
            assert found.norm == "l2" and found.epsilon == 0.5
            assert found.relative_step_size * 128 == 15
        assert resolve(plain) == resolve(plain | {"norm": "linf"})
    given = {"norm": "l2", "epsilon": "128/255", "relative_step_size": 0.2, "method": method}
    assert resolve(given).epsilon == 128 / 255 and resolve(given).relative_step_size == 0.2


def test_only_the_l_infinity_norm_has_a_largest_epsilon_of_1():
    assert resolve({"norm": "l2", "epsilon": 20}).epsilon == 20.0
    for value in ("nan", "inf", -1, 1e39):
        refused(
            "epsilon must be ", of=lambda value=value: resolve({"norm": "l2", "epsilon": value})
        )
    refused(
        "epsilon must be in [0, 1], not 20", "did you mean 20/255?",
        of=lambda: resolve({"epsilon": 20}),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHOD_RECIPES)
def test_methods_are_compared_with_one_schedule(method):
    """A comparison takes from a recipe how a method computes, not how long it trains."""
    alike = resolve({"dataset": "cifar10", "method": method}, schedule_of_method=False)
    standard = resolve({"dataset": "cifar10"})
    names = [f.name for f in fields(TrainConfig) if f.metadata["group"] == "Training"]
    assert len(names) > 6
    assert [getattr(alike, n) for n in names] == [getattr(standard, n) for n in names]
    of_recipe = resolve({"dataset": "cifar10", "method": method})
    for name in ("start", "adv_weight", "relative_step_size"):
        assert getattr(alike, name) == getattr(of_recipe, name)


def test_methods_have_the_names_that_are_there():
    from absld.methods import METHODS

    assert METHODS.keys() == METHOD_RECIPES.keys()


METHOD = [
    *({"method": name} for name in METHOD_RECIPES if name != "absld"),
    {"method": "mine.methods:Mart"},
    {"milestones": (0.5, 0.75)}, {"start": "uniform"}, {"weight_decay": 5e-4, "method": "sat"},
    {"fidelity": "released"}, {"temperature_rate": 0.0}, {"kl_scale": 0.1},
    {"adv_weight": 0.5}, {"temperature_lower": 0.9}, {"temperature_upper": 1.5}, {"epochs": 7},
]  # fmt: skip


@pytest.mark.parametrize("given", METHOD, ids=str)
def test_students_of_all_methods_share_a_teacher(given):
    assert resolve(given).teacher_training() == resolve({}).teacher_training()


@pytest.mark.parametrize(
    "given",
    [
        {"seed": 1},
        {"epsilon": 0.05},
        {"batch_size": 3},
        {"teacher_epochs": 2},
        {"precision": "bf16"},
        {"max_steps": 1},
    ],
    ids=str,
)
def test_a_teacher_has_what_is_not_the_methods(given):
    config = resolve(given)
    teacher = config.teacher_training()
    assert teacher != resolve({}).teacher_training()
    assert (teacher.method, teacher.epochs) == ("trades", config.teacher_epochs)
    assert (teacher.seed, teacher.epsilon) == (config.seed, config.epsilon)


def test_milestones_are_at_the_nearest_epoch():
    assert TrainConfig(epochs=40).milestone_epochs() == [29, 35, 38]
    assert TrainConfig(epochs=10, milestones=(0.5, 1.0)).milestone_epochs() == [5, 10]


def test_settings_cost_no_torch_and_no_hub():
    code = (
        "import sys, absld, absld.config.settings, absld.cli.app; "
        "sys.exit(bool({'torch', 'huggingface_hub'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
