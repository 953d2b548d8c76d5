"""The adapter of AutoAttack: the settings of the parts, their random numbers, and its silence.

What the parts find is tried in test_closed_form, one by one and in evaluations.
"""

import logging
import sys

import pytest
import torch
from helpers import strategies as draw
from helpers.linear import Linear
from helpers.linear import sample as linear
from helpers.small_networks import Cut, network

import absld
from absld.evaluation.attacks import (
    AUTOATTACK_COSTS,
    AttackBatch,
    AutoAttackPart,
    autoattack_parts,
)

parts = pytest.mark.parametrize("part", AUTOATTACK_COSTS)


def sample(classes=5, n=4):
    model = Linear(classes, 0, torch.float32).requires_grad_(False)
    return model, draw.images(0, n, side=4, dtype=torch.float32), torch.arange(n) % classes


@pytest.fixture
def recorded(monkeypatch):
    """What each part was when it was called, in place of what it does."""
    pytest.importorskip("pyautoattack")
    from pyautoattack import autopgd_base, fab_base, square

    found = []

    def record(self, x, y=None, *_, **__):
        drawn = torch.rand(3)
        found.append({**vars(self), "kind": type(self).__name__, "drawn": drawn.tolist()})
        return x.clone()

    for kind in (
        autopgd_base.APGDAttack,
        autopgd_base.APGDAttack_targeted,
        fab_base.FABAttack,
        square.SquareAttack,
    ):
        monkeypatch.setattr(kind, "perturb", record)
    return found


def attack(part, model, x, labels, **settings):
    batch = AttackBatch(x, labels, torch.arange(len(x)), **{"epsilon": 0.05} | settings)
    return AutoAttackPart(part).perturb(model, batch)


def perturbed(part, classes=5, **settings):
    return attack(part, *sample(classes), **settings)


STANDARD = {
    "apgd-ce": {"kind": "APGDAttack", "loss": "ce", "n_iter": 100, "n_restarts": 1, "eot_iter": 1},
    "apgd-t": {"kind": "APGDAttack_targeted", "n_iter": 100, "n_restarts": 1, "eot_iter": 1},
    "fab-t": {"kind": "FABAttack_PT", "targeted": True, "n_iter": 100, "n_restarts": 1},
    "square": {"kind": "SquareAttack", "n_queries": 5000, "n_restarts": 1, "loss": "margin"},
}


@parts
@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (9, 8), (10, 9), (12, 9)])
def test_settings_are_those_of_the_standard_version(part, classes, targets, recorded):
    """As published: Croce and Hein 2020, its own README. With few classes, all are targets."""
    norms = {"linf": "Linf"} | ({"l2": "L2"} if part != "square" else {})  # on images this small
    for norm in norms:
        perturbed(part, classes, epsilon=0.07, norm=norm)
    for used, norm in zip(recorded, norms.values(), strict=True):
        expected = STANDARD[part] | {"norm": norm, "eps": 0.07}
        if part.endswith("-t"):
            expected["n_target_classes"] = targets
        assert {name: used[name] for name in expected} == expected


def test_images_of_fewer_pixels_than_the_pattern_of_square_are_refused():
    pytest.importorskip("pyautoattack")
    with pytest.raises(absld.UsageError, match="images of 5x5 pixels or more, not 4x4"):
        perturbed("square", norm="l2")


def test_square_searches_in_the_l2_norm():
    pytest.importorskip("pyautoattack")
    random = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 5, 5, generator=random)
    weight = torch.randn(75, 5, generator=random)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 5)).requires_grad_(False)
    model[1].weight.copy_(weight.T)
    labels = model(x).argmax(1)
    x_adv = attack("square", model, x, labels, epsilon=3.0, norm="l2")
    assert (model(x_adv).argmax(1) != labels).all()
    assert ((x_adv - x).flatten(1).norm(dim=1) <= 3.0 + 1e-4).all()


@parts
def test_the_key_decides_every_random_number(part, recorded):
    """The seed that a part is given, and what it may draw without one."""
    for seed in (0, 0, 1, 2):
        torch.rand(5)
        perturbed(part, seed=seed)
    seeds, drawn = ([used[name] for used in recorded] for name in ("seed", "drawn"))
    for values in (seeds, drawn):
        assert values[0] == values[1]
        assert len({str(value) for value in values}) == 3


@parts
def test_an_evaluation_gives_each_try_its_own_key(part, recorded):
    """Seed, part, restart and the number of the first image."""
    model, x, labels = sample()

    def made(part=part, first=0, **changed):
        batch = AttackBatch(x, labels, torch.arange(4) + first, epsilon=0.05, **changed)
        AutoAttackPart(part).perturb(model, batch)

    other = next(name for name in AUTOATTACK_COSTS if name != part)
    for changed in ({}, {"first": 1}, {"restart": 1}, {"seed": 1}, {"part": other}, {}):
        made(**changed)
    seeds = [used["seed"] for used in recorded]
    assert seeds[0] == seeds[-1] and len(set(seeds)) == 5


@parts
def test_random_numbers_are_as_before_even_if_it_raises(part, recorded, monkeypatch):
    def fails(self, x, y=None, *_, **__):
        torch.rand(3)
        raise KeyboardInterrupt

    before = torch.get_rng_state()
    perturbed(part)
    assert torch.equal(torch.get_rng_state(), before)
    import pyautoattack

    whole = pyautoattack.AutoAttack(lambda x: x)
    for each in (whole.apgd, whole.apgd_targeted, whole.fab, whole.square):
        monkeypatch.setattr(type(each), "perturb", fails)
    with pytest.raises(KeyboardInterrupt):
        perturbed(part)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("part", ["apgd-ce", "apgd-t", "fab-t"])
def test_the_key_decides_the_result(part):
    """Of the real parts, on a network with kinks; fab-t starts at the image. For square see
    test_attack_parts."""
    pytest.importorskip("pyautoattack")
    model = network(1, torch.float32, classes=4)
    x = draw.images(1, dtype=torch.float32)
    labels = model(x).argmax(1)
    one, again, other = (attack(part, model, x, labels, epsilon=0.1, seed=k) for k in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, x)
    assert torch.equal(one, other) == (part == "fab-t")


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 9, 10, 100])
def test_the_parts_that_there_are(classes):
    expected = ["apgd-ce", "apgd-t", "fab-t", "square"]
    if classes <= 3:
        expected.remove("apgd-t")  # its loss takes the fourth largest logit
    assert [part.name for part in autoattack_parts(classes)] == expected


@parts
def test_a_network_that_cuts_its_gradient_stops_no_part(part, caplog, capfd):
    """And what the package would say of its gradient of zero is not said."""
    pytest.importorskip("pyautoattack")
    x, labels = draw.images(0, dtype=torch.float32), torch.arange(4) % 4
    net, cut = network(0, torch.float32, classes=4), Cut()
    cut.forward = lambda x: net(x.detach())
    x_adv = attack(part, cut, x, labels)
    assert ((x_adv >= 0) & (x_adv <= 1)).all() and (x_adv - x).abs().max() <= 0.05 + 1e-6
    assert caplog.records == [] and capfd.readouterr() == ("", "")
    assert not logging.getLogger("auto-attack").isEnabledFor(logging.WARNING)
    assert logging.getLogger("auto-attack").isEnabledFor(logging.ERROR)


@pytest.mark.parametrize("part", AUTOATTACK_COSTS)
def test_outputs_that_are_a_view_of_the_image(part):
    """Four channels, and the class is that of the brightest corner: a step of 0.1 may change it."""
    pytest.importorskip("pyautoattack")

    class View(torch.nn.Module):
        def forward(self, x):
            return x[:, :, 0, 0]

    x = torch.rand(20, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.4
    data = absld.InMemoryImages(x, x[:, :, 0, 0].argmax(1), tuple("abcd"))
    found = absld.evaluate(View(), data, epsilon=0.06, attacks=[AutoAttackPart(part)])
    assert found.correct.sum(1).tolist() == [20, 0]


def test_a_missing_package_is_missed_before_any_image(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    model, x, labels = sample(4)
    data = absld.InMemoryImages(x, labels, tuple("abcd"))
    seen = []
    with pytest.raises(absld.UsageError, match="pyautoattack"):
        absld.evaluate(
            model,
            data,
            epsilon=0.1,
            attacks="fgsm,autoattack",
            on_batch=lambda *given: seen.append(given),
        )
    assert seen == []


@pytest.mark.parametrize("part", AUTOATTACK_COSTS)
def test_a_single_image(part):
    model, data = linear(0, 5, 1, dtype=torch.float32)
    made = attack(part, model, data.images, data.labels)
    assert made.shape == data.images.shape
