"""The checks of an evaluation: an honest network passes all, a broken one is found out."""

import copy

import pytest
import torch
from torch import nn

import absld
from absld.config.resolve import resolve
from absld.data.sources import load_data
from absld.evaluation.evaluate import evaluate
from absld.evaluation.sanity_checks import allowed, checks

NAMES = [
    "the outputs are logits",
    "repeated forwards agree",
    "an image's output is its own",
    "it takes pixels in [0,1]",
    "no input gradient is zero",
    "epsilon 0 changes nothing",
    "PGD is no weaker than FGSM and noise",
    "more steps and restarts change little",
    "a search without gradients finds nothing more",
    "accuracy falls with epsilon, to about zero",
    "a margin attack is among the attacks",
]


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "")


@pytest.fixture(scope="module")
def honest(digits):
    """A convnet trained adversarially for a few epochs."""
    config = resolve({"method": "trades", "epochs": 6}).training()
    model = absld.build_model("convnet", 10, "checks")
    for _ in absld.fit(model, None, digits.train, digits.validation, config):
        pass
    return model.eval()


class Changed(nn.Module):
    """The honest network, called in another way."""

    def __init__(self, net, forward):
        super().__init__()
        self.net, self.change = net, forward

    def forward(self, x):
        return self.change(self.net, x)


def warned(model, data, attacks="pgd20,cw30"):
    evaluation = evaluate(model, data, epsilon=0.1, attacks=attacks)
    found = list(checks(model, data, evaluation))
    assert [check.name for check in found] == NAMES and all(check.numbers for check in found)
    return {check.name for check in found if not check.passed}


def test_an_honest_network_passes_all(honest, digits):
    assert warned(honest, digits.test) == set()
    assert warned(honest, digits.train) == set()


LOGITS, REPEAT, COMPANY, PIXELS, GRADIENT, ZERO, STRENGTH, MORE, SEARCH, FALLS, MARGIN = NAMES


@pytest.mark.parametrize(
    ("forward", "must", "may"),
    [
        # Gradients that lead nowhere: PGD stays behind what a search finds.
        (lambda net, x: net(x.detach()), {GRADIENT, SEARCH, FALLS}, {STRENGTH}),
        (lambda net, x: net((x * 8).round() / 8), {GRADIENT, SEARCH, FALLS}, {STRENGTH}),
        (lambda net, x: net(x) * 300, {GRADIENT}, {SEARCH, FALLS, MORE, STRENGTH}),
        # Other outputs at every call.
        (
            lambda net, x: net(x + 0.2 * torch.randn_like(x)),
            {REPEAT, COMPANY},
            {ZERO, STRENGTH, MORE, SEARCH, FALLS, PIXELS},
        ),
        (
            lambda net, x: net(x) + 3 * torch.randn(len(x), 10),
            {REPEAT, ZERO, COMPANY},
            {STRENGTH, MORE, SEARCH, FALLS, PIXELS},
        ),
        # An image is judged by its company.
        (lambda net, x: net(x - x.mean(0) + 0.3), {COMPANY}, {PIXELS, ZERO, MORE, SEARCH, FALLS}),
        (lambda net, x: net.train()(x), {COMPANY, REPEAT}, {PIXELS, ZERO, MORE, SEARCH, FALLS}),
        # Other units at either end.
        (lambda net, x: net(x).softmax(1), {LOGITS}, set()),
        (lambda net, x: net(0.3 * x + 0.3), {PIXELS}, {FALLS}),
        (lambda net, x: net(x / 255), {PIXELS}, {FALLS, GRADIENT}),
        (lambda net, x: net((x + 1) / 2), {PIXELS}, {FALLS}),
    ],
    ids=[
        "gradient cut",
        "input rounded",
        "saturated",
        "random input",
        "random output",
        "centred by the batch",
        "in train mode",
        "softmax",
        "normalised outside",
        "0 to 255",
        "-1 to 1",
    ],
)
def test_a_broken_network_is_found_out(forward, must, may, honest, digits):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = warned(Changed(copy.deepcopy(honest), forward), digits.test)
    assert must <= found <= must | may


def test_an_evaluation_without_a_margin_attack(honest, digits):
    assert warned(honest, digits.test, "fgsm,pgd50") == {MARGIN}


def test_a_network_that_says_one_class_always(digits):
    class Stubborn(nn.Module):
        def forward(self, x):
            return torch.eye(10)[0] + 0 * x.flatten(1)[:, :10]

    assert {PIXELS, GRADIENT, FALLS} <= warned(Stubborn(), digits.test)


def test_they_leave_the_network_and_the_random_numbers_alone(honest, digits):
    honest.train()
    state = {k: v.clone() for k, v in honest.state_dict().items()}
    random = torch.get_rng_state()
    warned(honest, digits.test)
    assert honest.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in honest.state_dict().items())
    honest.eval()


def test_a_small_sample_is_judged_strictly(honest, digits):
    """Two images of ten would be a fifth: none may differ there."""
    few = digits.test.subset(torch.arange(10))
    cut = Changed(honest, lambda net, x: net((x * 8).round() / 8))
    assert GRADIENT in warned(cut, few)
    assert (allowed(10, 0.03), allowed(40, 0.03), allowed(100, 0.03)) == (0, 2, 3)


def test_stronger_attacks_clear_the_warnings_about_weak_ones(honest, digits):
    """What is judged is what withstood the evaluation."""
    data = digits.test.subset(torch.arange(200))
    found = {}
    for attacks in ("fgsm", "pgd100,cw100,pgd100-sat"):
        evaluation = evaluate(honest, data, epsilon=0.2, attacks=attacks, restarts=3)
        found[attacks] = {c.name for c in checks(honest, data, evaluation) if not c.passed}
    assert found["fgsm"] == {MORE, MARGIN} or found["fgsm"] == {MORE, MARGIN, SEARCH}
    assert found["pgd100,cw100,pgd100-sat"] == set()
