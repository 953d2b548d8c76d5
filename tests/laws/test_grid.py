"""The laws of a sweep's grid and of its frontier."""

import math
from dataclasses import asdict

import pytest
from helpers.small_training import CONFIG, train
from hypothesis import given
from hypothesis import strategies as st

from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.errors import UsageError
from absld.methods import METHODS
from absld.runs.grid import BASE, build_points, frontier, parse_over

figures = st.integers(0, 6).map(float)  # few values, so that many are equal
points = st.lists(st.tuples(figures, figures), min_size=1, max_size=12)


@given(points)
def test_the_frontier_dominates_all_points_and_none_of_itself(given_points):
    kept = [p for p, marked in zip(given_points, frontier(given_points), strict=True) if marked]
    for x, y in given_points:
        assert any(a >= x and b >= y for a, b in kept)
    for x, y in kept:
        assert not any((a > x and b >= y) or (a >= x and b > y) for a, b in given_points)


@given(points, st.randoms(use_true_random=False))
def test_the_frontier_depends_neither_on_the_order_nor_on_points_without_figures(some, random):
    marked = dict(zip(some, frontier(some), strict=True))
    missing = (math.nan, 7.0)
    shuffled = random.sample([*some, missing], len(some) + 1)
    for point, on_it in zip(shuffled, frontier(shuffled), strict=True):
        assert on_it == (point is not missing and marked[point])


values = st.lists(st.integers(1, 99).map(lambda n: f"{n}/100"), min_size=1, max_size=2, unique=True)
grids = st.dictionaries(
    st.sampled_from(["temperature_rate", "temperature_lower", "adv_weight", "flip"]),
    values,
    min_size=1,
    max_size=2,
)


@given(grids)
def test_a_grid_has_every_combination_once_and_the_base(grid):
    over = parse_over([f"{name}={','.join(texts)}" for name, texts in grid.items()])
    found, base = build_points({}, over)
    own = asdict(resolve({}))
    chosen = {tuple(point.settings.values()) for point in found}
    assert len({point.label for point in found}) == len(chosen) == len(found)
    assert len(found) == math.prod(map(len, grid.values())) + (base == BASE)
    for point in found:
        assert asdict(point.config) == own | point.settings
        assert (point.config == resolve({})) == (point.label == base)


def test_a_method_is_swept_over_its_own_settings_alone():
    over = parse_over(["method=absld,rslad,sat", "temperature_rate=0.05,0.1", "adv_weight=0.5,5/6"])
    found, base = build_points({}, over)
    assert [len([p for p in found if p.config.method == m]) for m in over["method"]] == [4, 2, 1]
    assert base == "method=absld temperature_rate=0.1 adv_weight=5/6"
    assert found[-1].settings == {"method": "sat"}


def test_where_temperatures_start_is_swept_over_numbers_and_the_word():
    over = parse_over(["temperature_start=1,1/2,calibrated", "temperature_move=absolute,relative"])
    found, base = build_points({}, over)
    starts = [point.config.temperature_start for point in found]
    assert starts == [1.0, 1.0, 0.5, 0.5, "calibrated", "calibrated"]
    assert base == "temperature_start=1 temperature_move=absolute"
    assert found[-1].label == "temperature_start=calibrated temperature_move=relative"


VALUES = {
    "temperature_rate": 0.5,
    "temperature_lower": 1.0,
    "temperature_upper": 1.0,
    "temperature_start": 0.7,
    "temperature_move": "relative",
    "fidelity": "released",
    "adv_weight": 0.25,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_settings_of_a_method_are_those_that_change_its_training(method):
    def trained(**settings):
        config = TrainConfig(**asdict(CONFIG) | {"method": method, "epochs": 2, **settings})
        _, reports = train(config)
        return [report.loss for report in reports]

    before = trained(adv_weight=0.75)
    changing = {
        n for n, value in VALUES.items() if trained(**{"adv_weight": 0.75, n: value}) != before
    }
    assert changing == {*METHODS[method].settings} - {"kl_scale"}  # which others refuse


@pytest.mark.parametrize(
    ("texts", "cause", "hint"),
    [
        (["temperatur_rate=1"], "there is no setting", "'temperature_rate'"),
        (["temperature_rate"], "takes NAME=VALUE,VALUE, not 'temperature_rate'", "such as"),
        (["temperature_rate=fast"], "takes a number, not 'fast'", ""),
        (["temperature_rate=20"], "must be in [0, 10]", ""),
        (["temperature_start=1,calib"], "takes a number, or calibrated, not 'calib'", "'calibrated'"),
        (["temperature_start=1,0.1"], "must be in [0.5, 5], the bounds", "--temperature-lower 0.1"),
        (["adv_weight=0.5,1/2"], "a value of adv_weight twice", ""),
        (["adv_weight=0.5", "adv_weight=0.6"], "has adv_weight twice", "at once"),
        (["seed=0,1"], "trained with all seeds", "--seeds"),
        (["dataset=digits,svhn"], "same images", "--dataset"),
        (["device=cpu"], "does not change what is trained", "--device"),
        (["epsilon=0.1,0.2"], "one budget", ""),
        (["milestones=0.5,0.75"], "a list itself", ""),
        (["adv_weight=5/6"], "the only point is the base point", ""),
        (["method=sat,trades", "adv_weight=0.5,1"], "adv_weight changes nothing for sat, trades", ""),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_refused(texts, cause, hint):
    with pytest.raises(UsageError) as refused:
        build_points({}, parse_over(texts))
    assert cause in str(refused.value) and hint in refused.value.hint
