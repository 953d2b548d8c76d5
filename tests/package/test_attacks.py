"""The attacks of an evaluation one by one: their starts, their steps, and where they end.

That they reach the closed form of a linear network is tried in test_closed_form.
"""

import math
import sys
from dataclasses import replace

import pytest
import torch
from helpers import strategies as draw
from helpers.small_networks import Cut, network
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.attack import margins
from absld.evaluation.attacks import (
    AUTOATTACK_COSTS,
    AttackBatch,
    AutoAttackPart,
    GradientAttack,
    SquareSearch,
    differentiable,
    parse_attack,
    parse_attacks,
)

C = 3
NAMES = ["fgsm", "pgd4", "pgd4-sat", "cw4"]
named = pytest.mark.parametrize("name", NAMES)
parts = pytest.mark.parametrize("part", AUTOATTACK_COSTS)


def made(attack, x, index=None, *, seed=0, net=None, **settings):
    """What an attack makes of images, which are labelled 0, 1, 2, 0, ..."""
    index = torch.arange(len(x)) if index is None else index
    batch = AttackBatch(x, index % C, index, **{"epsilon": 0.1, "seed": seed} | settings)
    return attack.perturb(net or network(dtype=x.dtype), batch)


def start(attack, n=8, **settings):
    """Where it begins, less the image: what is left of it without its steps."""
    x = torch.full((n, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    return made(replace(attack, steps=0), x, **settings) - x


# --- Names ---


@pytest.mark.parametrize("names", ["", "clean", " , ", "Clean, CLEAN"])
def test_clean_images_are_no_attack(names):
    assert parse_attacks(names, 10) == ()


@pytest.mark.parametrize(
    "names", ["fgsm,fgsm", "pgd20, PGD20", "cw30,fgsm,cw30", "autoattack,AutoAttack"]
)
def test_an_attack_is_named_once(names):
    if "auto" in names:
        pytest.importorskip("pyautoattack")
    with pytest.raises(absld.UsageError, match="named twice") as caught:
        parse_attacks(names, 10)
    assert caught.value.hint == "name each once"


def test_the_order_is_that_of_the_names():
    attacks = parse_attacks("cw4,fgsm,pgd4-sat,pgd4", 10)
    assert [attack.name for attack in attacks] == ["cw4", "fgsm", "pgd4-sat", "pgd4"]


def test_a_package_that_is_missing_is_missed_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert len(parse_attacks("fgsm,pgd4", 10)) == 2
    with pytest.raises(absld.UsageError, match="needs the package pyautoattack") as caught:
        parse_attacks("fgsm,autoattack", 10)
    assert caught.value.hint == "pip install 'absld[autoattack]'"


def test_restarts_are_of_pgd_and_cw():
    pytest.importorskip("pyautoattack")
    attacks = parse_attacks("fgsm,pgd4,pgd4-sat,cw4,autoattack", 10, restarts=5)
    assert [attack.restarts for attack in attacks] == [1, 5, 5, 5, 1, 1, 1, 1]
    assert [attack.cost for attack in attacks[:4]] == [1.0, 4.0, 4.0, 4.0]
    assert all(attack.cost == AUTOATTACK_COSTS[attack.name] for attack in attacks[4:])


@pytest.mark.parametrize(
    "name",
    ["x", "pgd", "pgd0", "pgd-5", "pgd100000", "pgd 20", "pgd\uff12", "pgd20-SAT-sat", "cw-30",
     "cw30-sat", "fgsm2", "apgd-ce"],
)  # fmt: skip
def test_names_that_look_like_one(name):
    with pytest.raises(absld.UsageError, match="there is no attack"):
        parse_attack(name)


# --- Starts ---


@pytest.mark.parametrize("name", ["fgsm", "cw4"])
def test_these_start_at_the_image_itself(name):
    assert not start(parse_attack(name)).any()


@pytest.mark.parametrize(
    ("name", "restart"), [("pgd4", 0), ("pgd4", 2), ("pgd4-sat", 0), ("cw4", 1)]
)
@pytest.mark.parametrize("epsilon", [8 / 255, 0.3])
def test_other_starts_are_uniform_in_the_ball(name, restart, epsilon):
    """The largest distance of the distributions is above the bound once in a million tries
    (Dvoretzky, Kiefer, Wolfowitz)."""
    begun = start(parse_attack(name), 20, restart=restart, epsilon=epsilon).flatten()
    assert begun.abs().max() <= epsilon * (1 + 1e-6)
    expected = (begun.sort().values / epsilon + 1) / 2
    reached = torch.arange(1, len(begun) + 1) / len(begun)
    assert (reached - expected).abs().max() <= math.sqrt(math.log(2e6) / (2 * len(begun)))


def test_no_two_starts_are_alike():
    """Of another image, restart, seed or attack."""
    attack = parse_attack("pgd4")
    begun = [
        *start(attack, 4),
        *start(attack, 4, restart=1),
        *start(attack, 4, seed=1),
        *start(parse_attack("pgd4-sat"), 4),
        *start(parse_attack("pgd5"), 4),
    ]
    assert len({tuple(each.flatten().tolist()) for each in begun}) == len(begun)


@named
@given(draw.seeds, st.integers(0, 1), st.permutations(range(6)), st.integers(1, 6))
def test_an_image_and_its_number_decide(name, seed, restart, order, keep):
    """Not the company in which it is attacked, nor its place there."""
    attack, x = parse_attack(name), draw.images(seed, 6)
    whole = made(attack, x, seed=seed, restart=restart)
    some = torch.tensor(order[:keep])
    assert torch.equal(made(attack, x[some], some, seed=seed, restart=restart), whole[some])


def test_the_random_numbers_of_torch_are_left_alone():
    net, before = network(), torch.get_rng_state()
    for attack in (*map(parse_attack, NAMES), SquareSearch("search", 3)):
        made(attack, draw.images(0), restart=1, net=net)
    assert torch.equal(torch.get_rng_state(), before)


# --- Steps ---


@pytest.mark.parametrize("epsilon", [0.01, 8 / 255, 0.2])
@pytest.mark.parametrize(
    ("name", "length"),
    [("fgsm", 8 / 255), ("pgd4", 0.003), ("pgd4-sat", 2 / 255), ("cw4", 2 / 255)],
)
def test_a_step_is_in_proportion_to_epsilon(name, length, epsilon):
    """Its length at 8/255 is that of the spec; it goes by the sign of the gradient."""
    attack = replace(parse_attack(name), steps=1, uniform_start=False)
    x = torch.full((1, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    moved = made(attack, x, epsilon=epsilon) - x
    expected = torch.full_like(moved, length * epsilon / (8 / 255))
    assert torch.allclose(moved.abs(), expected, rtol=1e-9, atol=0.0)
    assert (moved > 0).any() and (moved < 0).any()


@pytest.mark.parametrize("name", ["pgd4", "cw4"])
def test_steps_are_counted(name):
    asked = []

    class Counted(nn.Module):
        def forward(self, x):
            asked.append(x)
            return self.net(x)

    counted = Counted()
    counted.net = network()
    made(parse_attack(name), draw.images(0), net=counted)
    assert len(asked) == 4


def test_cross_entropy_and_margin_climb_what_they_are_called():
    """With three classes: the margin knows the best wrong class only."""

    class Three(nn.Module):
        def forward(self, x):
            red, green, blue = x.mean((2, 3)).unbind(1)
            return torch.stack([red, 5 * green + 4, 5 * blue + 3.9], 1)

    x = torch.full((1, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    for name, blue in (("cw1", 0), ("pgd1", 1)):
        attack = replace(parse_attack(name), uniform_start=False)
        moved = (made(attack, x, net=Three()) - x).sign().mean((0, 2, 3))
        assert moved.tolist() == [-1, 1, blue]


# --- Where they end ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    draw.seeds,
    st.sampled_from([*map(parse_attack, NAMES), SquareSearch("search", 12)]),
    st.integers(0, 1),
    st.sampled_from([0.0, 1e-4, 8 / 255, 0.5, 1.0]),
)
def test_they_end_in_ball_and_box(dtype, seed, attack, restart, epsilon):
    x = draw.images(seed, dtype=dtype)
    x_adv = made(attack, x, seed=seed, restart=restart, epsilon=epsilon)
    assert x_adv.shape == x.shape and x_adv.dtype == dtype
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert ((x_adv >= x - epsilon) & (x_adv <= x + epsilon)).all()
    assert torch.equal(draw.images(seed, dtype=dtype), x)


@parts
def test_parts_of_autoattack_end_in_ball_and_box(part):
    pytest.importorskip("pyautoattack")
    x = draw.images(0, dtype=torch.float32)
    net = network(dtype=x.dtype, classes=4)
    x_adv = made(AutoAttackPart(part), x, net=net, epsilon=0.03)
    assert ((x_adv >= 0) & (x_adv <= 1)).all()
    assert (x_adv - x).abs().max() <= 0.03 + 1e-6


# --- A search without gradients ---


@given(draw.seeds, st.integers(0, 20))
def test_a_search_ends_no_lower_than_it_starts(seed, queries):
    """Than none, after which a search is at its start."""
    x, net = draw.images(seed), network()
    labels = torch.arange(len(x)) % C
    ends = [made(SquareSearch("search", most), x, net=net, seed=seed) for most in (0, queries)]
    low, high = (margins(net(x_adv), labels) for x_adv in ends)
    assert (high >= low).all()


@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_search_asks_for_outputs_alone_and_returns_the_best_it_saw(queries):
    x, net, asked = draw.images(0), network(), []
    labels = torch.arange(len(x)) % C

    class Watched(nn.Module):
        def forward(self, given):
            assert not torch.is_grad_enabled()
            assert ((given >= 0) & (given <= 1)).all()
            assert ((given >= x - 0.1) & (given <= x + 0.1)).all()
            asked.append((given.clone(), margins(net(given), labels)))
            return net(given)

    search = SquareSearch("search", queries)
    assert search.cost == queries / 3
    x_adv = made(search, x, net=Watched())
    assert len(asked) == queries + 1
    images, found = map(torch.stack, zip(*asked, strict=True))
    best = found.max(0).indices
    assert torch.equal(x_adv, images[best, torch.arange(len(x))])
    assert torch.equal(made(search, x), x_adv)
    for other in ({"restart": 1}, {"seed": 1}, {"index": torch.arange(3, 7)}):
        assert not torch.equal(made(search, x, **other), x_adv)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 1, 3, 7), (1, 4, 9, 2)])
def test_images_of_any_shape_are_searched(shape):
    class Sum(nn.Module):
        def forward(self, x):
            total = x.flatten(1).sum(1)
            return torch.stack([total, -total, 0 * total], 1)

    x = torch.full(shape, 0.5)
    x_adv = made(SquareSearch("search", 100), x, net=Sum())
    assert x_adv.shape == x.shape
    # Class 0 is broken by dark images, class 1 by bright ones; it gets nearly there.
    for row, sign in zip(x_adv - x, (-1, 1), strict=False):
        assert (row * sign / 0.1).mean() > 0.8


# --- Networks that have no gradient ---


def test_a_gradient_is_put_in_place_only_where_there_is_none():
    net, x = network(), draw.images(0).requires_grad_()
    for model, cut in ((net, False), (Cut(), True)):
        logits = differentiable(model)(x)
        assert torch.equal(logits, net(x))
        (gradient,) = torch.autograd.grad(logits.sum(), x)
        (expected,) = torch.autograd.grad(net(x).sum(), x)
        assert torch.equal(gradient, torch.zeros_like(x) if cut else expected)
    with torch.no_grad():
        assert not differentiable(net)(x).requires_grad


@named
def test_a_network_that_cuts_its_gradient_stays_at_its_start(name):
    x = torch.full((8, 3, 8, 8), 0.5, dtype=draw.DTYPE)
    attack: GradientAttack = parse_attack(name)
    assert torch.equal(made(attack, x, net=Cut()) - x, start(attack))
