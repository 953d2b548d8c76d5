"""The checks one by one, on a linear network that passes all of them, and on it with one fault.

Some are tried on a trained network, too.
"""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

import absld
from absld.data.dataset import stratified
from absld.data.sources import load_data
from absld.errors import Stopped
from absld.evaluation.attacks import parse_attack
from absld.evaluation.evaluate import evaluate
from absld.evaluation.input_scale import examine_scale
from absld.evaluation.sanity_checks import (
    SAMPLE,
    allowed_changes,
    check_margin_attack,
    run_checks,
)

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
LOGITS, REPEAT, COMPANY, PIXELS, GRADIENT, ZERO, STRENGTH, MORE, SEARCH, FALLS, MARGIN = NAMES
C, SIDE, EPSILON = 4, 4, 0.1


class Nearest(nn.Module):
    """Logits: how near is the image to each class's own? Linear. `change` may break it."""

    def __init__(self, change=lambda net, x: net(x)):
        super().__init__()
        signs = torch.randint(2, (C, 3 * SIDE * SIDE), generator=torch.Generator().manual_seed(0))
        self.register_buffer("own", 0.5 + EPSILON * (2.0 * signs - 1))
        self.change, self.asked = change, []

    def near(self, x):
        logits = 10 * (x.flatten(1) @ self.own.T - self.own.square().sum(1) / 2)
        return logits - logits.mean(1, keepdim=True)

    def forward(self, x):
        self.asked.append(x.detach().clone())
        return self.change(self.near, x)


@pytest.fixture(scope="module")
def data():
    """Images about as far from the border as the attacks go."""
    random = torch.Generator().manual_seed(1)
    labels = torch.arange(240) % C
    noise = 0.1 * torch.randn(240, 3 * SIDE * SIDE, generator=random)
    images = (Nearest().own[labels] + noise).clamp(0, 1).view(-1, 3, SIDE, SIDE)
    return absld.InMemoryImages(images, labels, tuple("abcd"))


def checked(data, change=lambda net, x: net(x), attacks="pgd20,cw30", epsilon=EPSILON, **settings):
    """The checks by name, with the random numbers of a network, if it draws any, from a seed."""
    model = Nearest(change)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        evaluation = evaluate(model, data, epsilon=epsilon, attacks=attacks, **settings)
        found = {check.name: check for check in run_checks(model, data, evaluation)}
    assert list(found) == NAMES
    return found


def warned(*given, **settings):
    return {name for name, check in checked(*given, **settings).items() if not check.passed}


# --- Which fault is found by which check ---


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.5)])
def test_a_linear_network_passes_all(norm, epsilon, data):
    found = checked(data, norm=norm, epsilon=epsilon)
    assert {name: check.numbers for name, check in found.items() if not check.passed} == {}
    evaluation = evaluate(Nearest(), data, norm=norm, epsilon=epsilon, attacks="cw30")
    assert 0.2 < evaluation.robust_accuracy.mean() < 0.8 and evaluation.clean_accuracy.mean() > 0.95


FAULTS = {
    "gradient cut": (lambda net, x: net(x.detach()), {GRADIENT, SEARCH, FALLS}),
    "rounded": (lambda net, x: net((x * 8).round() / 8), {GRADIENT, SEARCH, FALLS}),
    # CW is blind to this one's cross-entropy, so that what is robust stays so.
    "saturated": (lambda net, x: 1000 * net(x), {GRADIENT, FALLS}),
    "softmax": (lambda net, x: net(x).softmax(1), {LOGITS}),
    "softmax less a number": (lambda net, x: net(x).softmax(1) - 0.25, {LOGITS}),
    "sigmoid": (lambda net, x: net(x).sigmoid(), {LOGITS}),
    "sigmoid, pixels clipped": (lambda net, x: net(x.clamp(0, 1)).sigmoid(), {LOGITS, GRADIENT}),
    "pixels clipped": (lambda net, x: net(x.clamp(0, 1)), {GRADIENT}),
    "pixels clipped at 0": (lambda net, x: net(x.relu()), {GRADIENT}),
    "tanh, scaled": (lambda net, x: 10 * net(x).tanh() - 2, {LOGITS}),
    "softsign": (lambda net, x: nn.functional.softsign(net(x)), {LOGITS}),
    "outputs clipped": (lambda net, x: net(x).clamp(-9, 9), {LOGITS}),
    "random output, slightly": (lambda net, x: net(x) + 0.005 * torch.randn(len(x), C), {REPEAT}),
    "random output far from 0": (
        lambda net, x: net(x) + 1000 + 0.005 * torch.randn(len(x), C),
        {REPEAT},
    ),
    "random output": (lambda net, x: net(x) + 0.05 * torch.randn(len(x), C), {REPEAT, COMPANY}),
    "company": (lambda net, x: net(x) + 0.5 * net(x).mean(0).detach(), {COMPANY}),
    "normalised": (lambda net, x: net(x * 0.1 + 0.5), {PIXELS}),
    "-1 to 1": (lambda net, x: net((x + 1) / 2), {PIXELS}),
    "0 to 255": (lambda net, x: net(x / 255), {PIXELS, FALLS}),
}
HARMLESS = {
    "rounding": lambda net, x: net(x) + 1e-5 * torch.randn(len(x), C),  # as a GPU may round
    "log of softmax": lambda net, x: net(x).softmax(1).log(),
    "positive": lambda net, x: net(x) + 20,  # positive, but no probabilities
    "sums to 1": lambda net, x: net(x) / 10 + 0.25,  # adds up to 1, but some are negative
    "in [0,1]": lambda net, x: net(x) / 10 + 0.4,  # in [0,1], but not of every image
    "a shift of its own": lambda net, x: net(x + 0.03),
}
# Of these, another one in the default run takes the same branches.
ALIKE = {"softmax less a number", "pixels clipped at 0", "tanh, scaled", "softsign",
         "outputs clipped", "random output far from 0", "positive", "sums to 1"}  # fmt: skip


def each(*names):
    """Parametrise by name; the rarer ones are slow."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=slow) if n in ALIKE else n for n in names]
    )


@each(*FAULTS)
def test_every_fault_is_found_by_its_check(name, data):
    change, expected = FAULTS[name]
    assert warned(data, change) == expected


@each("gradient cut", "saturated", "softmax", "pixels clipped", "0 to 255")
def test_faults_are_found_in_the_l2_norm_by_the_same_checks(name, data):
    change, expected = FAULTS[name]
    assert warned(data, change, norm="l2", epsilon=0.7) == expected


@each(*HARMLESS)
def test_harmless_changes_pass_all_checks(name, data):
    assert warned(data, HARMLESS[name]) == set()


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_network_that_refuses_pixels_outside_of_0_to_1_is_checked(error, data):
    def strict(net, x):
        if x.min() < 0 or x.max() > 1:
            raise error("pixels must be in [0,1]")
        return net(x)

    found = checked(data, strict)
    assert all(check.passed for check in found.values())
    assert found[PIXELS].numbers.startswith("takes pixels in [0,1]: clean accuracy 100.0%")


@pytest.mark.parametrize(
    ("error", "above"), [(ValueError("any"), 0), (SystemExit(3), 0), (Stopped(143), 2)]
)
def test_faults_on_pixels_of_0_to_1_are_those_of_the_network(error, above, data):
    """A signal ends the command on any scale."""

    def fails(net, x):
        if x.max() > above:
            raise error
        return net(x)

    with pytest.raises(type(error)):
        examine_scale(Nearest(fails), data)


def test_the_check_says_that_the_input_is_clamped(data):
    check = checked(data, lambda net, x: net(x.clamp(0, 1)))[GRADIENT]
    assert check.numbers.endswith("it vanishes at pixels of 0 or 1: the network clamps its input")


def test_noise_in_the_input_is_found(data):
    """Which attacks find more than which others is then a matter of chance."""
    found = warned(data, lambda net, x: net(x + 0.2 * torch.randn_like(x)))
    assert {REPEAT, COMPANY, ZERO} <= found <= {REPEAT, COMPANY, ZERO, STRENGTH, MORE, SEARCH}


def distance(x, images):
    """To the nearest of the images, in the L-infinity norm."""
    return (x[:, None] - images).abs().flatten(2).amax(2).amin(1).view(-1, 1, 1, 1)


def test_gradients_only_at_the_images_are_found(data):
    """PGD starts elsewhere and does not move; FGSM starts there, as CW does for a step."""
    sample = data.subset(torch.arange(60))

    def change(net, x):
        return net(torch.where(distance(x, sample.images) < 1e-6, x, x.detach()))

    found = checked(sample, change)
    failed = {name for name, check in found.items() if not check.passed}
    assert {STRENGTH, SEARCH} <= failed <= {STRENGTH, SEARCH, FALLS}
    fgsm, pgd = map(int, re.findall(r"(\d+) under (?:fgsm|pgd20)", found[STRENGTH].numbers))
    assert pgd >= 58 and fgsm < 30


def test_gradients_that_vanish_beyond_the_budget_are_found(data):
    """Accuracy falls, rises at twice the budget, and is zero in the whole box."""
    sample = data.subset(torch.arange(60))

    def change(net, x):
        far = distance(x, sample.images)
        return net(torch.where((far > 0.12) & (far < 0.35), x.detach(), x))

    assert warned(sample, change) == {FALLS}


def test_a_buffer_that_counts_calls_is_a_network_that_changes(data):
    class Counts(Nearest):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    evaluation = evaluate(Counts(), data, epsilon=EPSILON, attacks="pgd20,cw30")
    found = {check.name: check for check in run_checks(Counts(), data, evaluation)}
    assert {name for name, check in found.items() if not check.passed} == {REPEAT}
    assert found[REPEAT].numbers.endswith("0 classes and 1 buffers changed")


# --- The numbers ---


def test_images_without_a_gradient_are_counted(data):
    """One is enough for a warning."""
    sample = data.subset(torch.arange(60))
    for number in (0, 1, 7):
        cut = sample.images[:number]

        def change(net, x, cut=cut):
            same = (x[:, None] == cut).flatten(2).all(2).any(1).view(-1, 1, 1, 1)
            return net(torch.where(same, x.detach(), x))

        check = checked(sample, change)[GRADIENT]
        assert check.passed == (number == 0)
        assert check.numbers.startswith(f"{number} of 60 images; median of the largest entry 0.0")


def test_numbers_are_those_of_attacks_on_the_sample(data):
    """As many images are right as evaluations of one's own say."""
    sample = data.subset(torch.arange(80))
    found = checked(sample)

    def right(name, epsilon):
        attacked = evaluate(Nearest(), sample, epsilon=epsilon, attacks=name, each=True)
        return int(attacked.correct[-1].sum())

    clean, fgsm, pgd = right("", 0.1), right("fgsm", 0.1), right("pgd20", 0.1)
    numbers = found[STRENGTH].numbers
    assert numbers.startswith(f"of 80 images, {clean} are correct when clean, ")
    assert numbers.endswith(f" under noise, {fgsm} under fgsm, {pgd} under pgd20")
    curve = [f"{right('pgd20', size)} at {size:.3g}" for size in (0.05, 0.1, 0.2, 1.0)]
    assert found[FALLS].numbers == f"of 80 images correct: {clean} clean, " + ", ".join(curve)
    assert found[PIXELS].numbers.startswith(
        f"takes pixels in [0,1]: clean accuracy {clean / 80:.1%}, against "
    )


@pytest.mark.parametrize(("name", "steps"), [("nothing", 0), ("pgd1", 1)])
def test_weak_attacks_leave_what_stronger_ones_break(name, steps, data):
    weak = replace(parse_attack("pgd20"), name=name, steps=steps)
    found = checked(data, attacks=[weak])
    assert {key for key, check in found.items() if not check.passed} == {MORE, SEARCH, MARGIN}
    for key in (MORE, SEARCH):
        assert found[key].numbers.endswith(" images that are robust to all attacks")


@pytest.mark.parametrize(
    ("attacks", "passed"),
    [("pgd20", False), ("cw2", True), ("fgsm,pgd20-sat", False), ("cw30,fgsm", True)],
)
def test_the_margin_attacks_are_named(attacks, passed, data):
    check = checked(data, attacks=attacks)[MARGIN]
    names = [name for name in attacks.split(",") if name.startswith("cw")]
    assert check.passed == passed
    assert check.numbers == (", ".join(names) or "add cw30 or autoattack to the attacks")


@pytest.mark.parametrize(
    ("attacks", "passed"), [(("apgd-ce", "fab-t", "square"), False), (("apgd-ce", "apgd-t"), True)]
)
def test_a_part_of_autoattack_is_a_margin_attack(attacks, passed, data):
    evaluation = evaluate(Nearest(), data, epsilon=EPSILON, attacks=())
    check = check_margin_attack(replace(evaluation, attacks=("clean", *attacks)))
    assert check.passed == passed and (check.numbers == "apgd-t") == passed


def test_where_no_image_is_robust_all_checks_pass(data):
    found = checked(data, epsilon=0.5)
    assert all(check.passed for check in found.values())
    for name in (MORE, SEARCH):
        assert " breaks 0 of the 0 images" in found[name].numbers.replace("break ", "breaks ")


@pytest.mark.parametrize(
    ("images", "share", "most"),
    [(10, 0.01, 0), (20, 0.01, 1), (40, 0.01, 2), (100, 0.01, 2), (100, 0.03, 3), (100, 0.05, 5)],
)
def test_allowed_changes_grow_with_the_sample(images, share, most):
    assert allowed_changes(images, share) == most


# --- The sample ---


@pytest.mark.parametrize("examples", [None, 60])
def test_the_sample_is_of_the_evaluated_images_in_proportion(examples, data):
    model = Nearest()
    settings = {"epsilon": EPSILON, "attacks": "cw30", "examples": examples, "seed": 3}
    evaluation = evaluate(model, data, **settings)
    model.asked.clear()
    found = {check.name: check for check in run_checks(model, data, evaluation)}
    n = min(SAMPLE, examples or len(data))
    chosen = stratified(evaluation.labels, C, n, "checks", 3)
    assert torch.equal(model.asked[0], data.images[evaluation.index[chosen]])
    assert evaluation.labels[chosen].bincount().tolist() == [n // C] * C
    assert found[ZERO].numbers == f"0 of {n} classes changed"
    left = int(evaluation.robust[chosen].sum())
    assert found[MORE].numbers.endswith(f" of the {left} images that are robust to all attacks")


def test_a_smaller_sample_may_be_asked_for(data):
    evaluation = evaluate(Nearest(), data, epsilon=EPSILON, attacks="cw30")
    found = [
        list(run_checks(Nearest(), data, evaluation, examples=examples))
        for examples in (24, 24, 500)
    ]
    assert found[0] == found[1] and found[0] != found[2]
    numbers = [next(c.numbers for c in each if c.name == GRADIENT) for each in found]
    assert [each.split(" images")[0] for each in numbers] == ["0 of 24", "0 of 24", "0 of 240"]


def test_one_image_and_classes_without_images_are_checked(data):
    for few in (data.subset(torch.tensor([0])), data.subset((data.labels != 2).nonzero()[:, 0])):
        assert warned(few) <= {PIXELS}  # one image is right by chance, too


def test_bytes_are_images_too(data):
    whole = replace(data, images=(data.images * 255).round().to(torch.uint8))
    assert warned(whole) == set()


# --- A trained network ---


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "")


def failed_checks(model, data, attacks="pgd20,cw30", **settings):
    evaluation = evaluate(model, data, **{"epsilon": 0.1, "attacks": attacks} | settings)
    return {check.name for check in run_checks(model, data, evaluation) if not check.passed}


def test_a_trained_network_passes_all_and_is_left_unchanged(trained_on_digits, digits):
    """Also the random state of torch."""
    trained_on_digits.train()
    state = {k: v.clone() for k, v in trained_on_digits.state_dict().items()}
    random = torch.get_rng_state()
    assert failed_checks(trained_on_digits, digits.test) == set()
    assert trained_on_digits.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in trained_on_digits.state_dict().items())


class TrainMode(nn.Module):
    """Goes to train mode in each forward."""

    def __init__(self, net):
        super().__init__()
        self.net = copy.deepcopy(net)

    def forward(self, x):
        return self.net.train()(x)


def test_a_network_in_train_mode_is_found(trained_on_digits, digits):
    failed = failed_checks(TrainMode(trained_on_digits), digits.test)
    assert {COMPANY, REPEAT} <= failed <= {COMPANY, REPEAT, PIXELS, ZERO, MORE, SEARCH, FALLS}


def test_a_constant_network_is_found(digits):
    class Constant(nn.Module):
        def forward(self, x):
            return torch.eye(10)[0] + 0 * x.flatten(1)[:, :10]

    assert {PIXELS, GRADIENT, FALLS} <= failed_checks(Constant(), digits.test)


@pytest.mark.slow
def test_stronger_attacks_clear_the_warnings_about_weak_ones(trained_on_digits, digits):
    """The images judged are those that the attacks of the evaluation leave robust."""
    settings = {"epsilon": 0.2, "restarts": 3}
    data = digits.test.subset(torch.arange(200))
    assert (
        {MORE, MARGIN}
        <= failed_checks(trained_on_digits, data, "fgsm", **settings)
        <= {MORE, MARGIN, SEARCH}
    )
    assert failed_checks(trained_on_digits, data, "pgd100,cw100,pgd100-sat", **settings) == set()
