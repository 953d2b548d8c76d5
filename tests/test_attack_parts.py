"""The adapter of AutoAttack, and the search without gradients."""

import sys

import pytest
import torch
from test_closed_form import sample as linear

import absld
import absld.suite
from absld import autoattack
from absld.attack import margins
from absld.suite import SquareSearch, differentiable

part = pytest.mark.parametrize("part", autoattack.COSTS)


def sample(classes=5, n=6):
    """A network in float32 and images that it has right."""
    model, data = linear(0, classes, n, dtype=torch.float32)
    model.requires_grad_(False)
    return model, data.images, model(data.images).argmax(1)


def perturbed(name, model, x, labels, key=("test",)):
    forward = differentiable(model)
    return autoattack.perturb(name, forward, x, labels, epsilon=0.05, key=key)


@part
def test_a_part_is_repeatable_and_leaves_the_random_numbers_alone(part):
    pytest.importorskip("pyautoattack")
    model, x, labels = sample()
    before, given = torch.get_rng_state(), x.clone()
    one, again = (perturbed(part, model, x, labels) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again) and torch.equal(x, given)
    assert one.shape == x.shape and all(p.grad is None for p in model.parameters())
    broken = model(one).argmax(1) != labels
    assert broken.any()
    assert (one - x)[broken].abs().max() <= 0.05 + 1e-6


def test_another_key_is_another_start():
    pytest.importorskip("pyautoattack")
    model, x, labels = sample()
    assert not torch.equal(
        perturbed("square", model, x, labels), perturbed("square", model, x, labels, ("other",))
    )


@part
def test_a_network_that_cuts_its_gradient_does_not_stop_a_part(part, capfd):
    pytest.importorskip("pyautoattack")
    model, x, labels = sample()
    found = absld.evaluate(
        torch.nn.Sequential(Cut(), model),
        absld.ImageSet(x, labels, tuple("abcde")),
        epsilon=0.05,
        attacks=[absld.suite.AutoAttackPart(part)],
    )
    assert (found.predictions >= 0).all()
    assert capfd.readouterr() == ("", "")  # its own warnings are not shown


class Cut(torch.nn.Module):
    def forward(self, x):
        return x.detach()


@part
def test_a_single_image(part):
    pytest.importorskip("pyautoattack")
    model, x, labels = sample(n=1)
    assert perturbed(part, model, x, labels).shape == x.shape


def test_the_package_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(absld.UsageError, match="pyautoattack") as caught:
        autoattack.library()
    assert caught.value.way_out == "pip install 'absld[autoattack]'"


@pytest.mark.parametrize("queries", [1, 5, 60])
def test_a_search_asks_for_outputs_alone_and_never_goes_back(queries):
    model, x, labels = sample()
    asked = []

    class Watched(torch.nn.Module):
        def forward(self, given):
            assert not torch.is_grad_enabled()
            assert given.min() >= 0 and given.max() <= 1
            assert (given - x).abs().max() <= 0.05 + 1e-6
            asked.append(margins(model(given), labels))
            return model(given)

    search = SquareSearch("search", queries)
    index = torch.arange(len(x))
    x_adv = search.perturb(Watched(), x, labels, index, restart=0, epsilon=0.05, seed=0)
    assert len(asked) == queries + 1 and search.cost == queries / 3
    best = torch.stack(asked).amax(0)
    assert torch.allclose(margins(model(x_adv), labels), best, atol=1e-5)
    again = search.perturb(Watched(), x, labels, index, restart=0, epsilon=0.05, seed=0)
    assert torch.equal(again, x_adv)
    other = search.perturb(Watched(), x, labels, index, restart=1, epsilon=0.05, seed=0)
    assert not torch.equal(other, x_adv)
