"""The methods that ABSLD is compared with: whole steps on a linear network against NumPy, where
every gradient is known in closed form, and the class weights and margins against their formulas."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import strategies as draw
from helpers.plain_methods import (
    ATTACK,
    EPSILON,
    STEP_SIZE,
    STEPS,
    C,
    batch,
    linear,
    one_hot,
    parameters,
    softmax,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

import absld
from absld.attack import geometry
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.errors import UsageError
from absld.methods import METHODS, Method, build_method, method_class
from absld.methods.balance import WatchedNetwork, boundary_images
from absld.methods.class_distance import distance_weights
from absld.methods.margins import class_margins
from absld.methods.reweighting import CountingObjective, class_weights
from absld.stepper import train_step

LEARNING_RATE, MOMENTUM, DECAY = 0.5, 0.9, 0.01
OF_TRADES = ("trades", "wat", "frl", "cfa", "dafa")  # methods with its two terms


# --- Two steps of every method, in NumPy ---


def per_class(values, labels):
    return np.array([values[labels == k].mean() for k in range(C)])


def kl(one, other):
    return (one * (np.log(one) - np.log(other))).sum(1)


def kl_gradient(one, other):
    """The gradient of kl(one, other) by the logits of `one`."""
    return one * (np.log(one) - np.log(other) - kl(one, other)[:, None])


class ByHand:
    """A method on linear networks z = x W' + b: attack, gradient of the loss, SGD; all by hand."""

    def __init__(self, name, config, student, teacher):
        self.name, self.config = name, config
        self.w, self.b = student
        self.tw, self.tb = teacher
        self.velocity = [np.zeros_like(self.w), np.zeros_like(self.b)]
        self.temperature = np.ones((2, C))
        if name.startswith("absld"):
            self.temperature *= config.temperature_start
        self.weight, self.margin, self.beta = np.ones(C), np.ones(C), np.full(C, 6.0)
        if name == "wat":
            self.weight, self.costs = 2 * np.ones(C), np.zeros(C + 1)
        self.multipliers = np.zeros((2, C))  # of FRL
        self.seen, self.held_out, self.epochs = [], [], 0

    def logits(self, x):
        return x @ self.w.T + self.b

    def teacher_logits(self, x):
        return x @ self.tw.T + self.tb

    def slope(self, x, soft_adv, labels):
        """The gradient by the image of what the attack climbs."""
        q = softmax(self.logits(x))
        if self.name in ("sat", "ard", "iad", "mart") or soft_adv is None:
            return (q - one_hot(labels)) @ self.w
        if self.name == "adaad":
            p = softmax(self.teacher_logits(x))
            log_ratio = np.log(p) - np.log(q)
            kl = (p * log_ratio).sum(1, keepdims=True)
            return (q - p) @ self.w + (p * (log_ratio - kl)) @ self.tw
        return (q - soft_adv) @ self.w

    def attack(self, x_nat, noise, labels, soft_adv, steps=STEPS):
        epsilon, step_size = EPSILON, STEP_SIZE
        if self.name in ("absld-margins", "cfa"):
            epsilon = EPSILON * self.margin[labels][:, None]
        if self.name == "dafa":
            epsilon, step_size = (
                size * self.weight[labels][:, None] for size in (epsilon, step_size)
            )
        x, self.robust = x_nat + noise, np.zeros(len(labels))
        self.iterates = []
        for _ in range(steps):
            self.iterates.append(x)
            self.robust += self.logits(x).argmax(1) == labels
            x = x + step_size * np.sign(self.slope(x, soft_adv, labels))
            x = np.clip(np.clip(x, x_nat - epsilon, x_nat + epsilon), 0, 1)
        self.iterates.append(x)
        return x

    def boundary(self, x_nat, labels):
        """The iterates of the last attack before and at the first misclassification of each image."""
        pairs = []
        for image, (clean, y) in enumerate(zip(x_nat, labels, strict=True)):
            path = [x[[image]] for x in self.iterates]
            wrong = [k for k in range(STEPS) if self.logits(path[k]).argmax() != y]
            after = wrong[0] if wrong else STEPS
            before = max(after - 1, 0) if wrong else STEPS
            pair = np.concatenate([path[before], path[after]])
            pairs.append(np.clip(np.clip(pair, clean - EPSILON, clean + EPSILON), 0, 1))
        return np.stack(pairs, axis=1)

    def step(self, x_nat, labels, noise):
        """The loss, and its gradients by the logits of adversarial and clean images."""
        y, a, n = one_hot(labels), self.config.adv_weight, len(labels)
        v = self.teacher_logits(x_nat)
        soft_adv, soft_nat = (softmax(v / t[labels][:, None]) for t in self.temperature)
        if self.name in ("bat", *OF_TRADES):
            soft_adv = softmax(self.logits(x_nat))
        x_adv = self.attack(x_nat, noise, labels, soft_adv)
        z_adv, z_nat = self.logits(x_adv), self.logits(x_nat)
        p, q = softmax(z_adv), softmax(z_nat)

        hard_adv, hard_nat = -np.log((p * y).sum(1)), -np.log((q * y).sum(1))
        more = []  # gradients by the logits of other images, and those images
        if self.name == "sat":
            loss, by_adv, by_nat = hard_adv, p - y, 0 * q
        elif self.name in OF_TRADES:
            robust, (w_nat, w_adv) = kl(q, p)[:, None], self.weights_of_terms(labels)
            loss = w_nat * hard_nat[:, None] + w_adv * robust
            by_adv = w_adv * (p - q)
            by_nat = w_nat * (q - y) + w_adv * kl_gradient(q, p)
        elif self.name == "mart":
            k = one_hot((p * (1 - y)).argmax(1))
            p_k, q_y = ((one * which).sum(1, keepdims=True) for one, which in ((p, k), (q, y)))
            doubt, robust = 1 - q_y, kl(q, p)[:, None]
            loss = hard_adv - np.log(1 - p_k[:, 0]) + 5 * (robust * doubt)[:, 0]
            by_adv = p - y + p_k / (1 - p_k) * (k - p) + 5 * doubt * (p - q)
            by_nat = 5 * (doubt * kl_gradient(q, p) - robust * q_y * (y - q))
        elif self.name == "bat":
            before, after = self.boundary(x_nat, labels)
            r, s, u = (softmax(self.logits(x)) for x in (before, after, 0 * before))
            u = np.full_like(u, 1 / C)
            loss = -np.log((r * y).sum(1)) + 6 * kl(q, s) + kl(r, u) + kl(s, u)
            by_adv, by_nat = 0 * p, 6 * kl_gradient(q, s)
            more = [
                (r - y + kl_gradient(r, u), before),
                (6 * (s - q) + kl_gradient(s, u), after),
            ]
        elif self.name == "ard":
            t = 30.0
            soft, own = softmax(v / t), softmax(z_adv / t)
            loss = a * t * t * kl(soft, own) + (1 - a) * hard_nat
            by_adv, by_nat = a * t * (own - soft), (1 - a) * (q - y)
        elif self.name == "iad":
            begun = self.epochs >= round(0.3 * self.config.epochs)
            trust = (softmax(self.teacher_logits(x_adv)) * y).sum(1, keepdims=True)
            doubt = 1 - trust**0.1 if begun else 0 * trust
            loss = a * (kl(soft_nat, p) + doubt[:, 0] * kl(q, p)) + (1 - a) * hard_nat
            by_adv = a * (p - soft_nat + doubt * (p - q))
            by_nat = a * doubt * kl_gradient(q, p) + (1 - a) * (q - y)
        else:
            if self.name == "adaad":
                soft_adv = softmax(self.teacher_logits(x_adv))
            w = self.weight[labels] if self.name in ("fair-rslad", "absld-weights") else np.ones(n)
            loss = w * (a * kl(soft_adv, p) + (1 - a) * kl(soft_nat, q))
            by_adv = w[:, None] * a * (p - soft_adv)
            by_nat = w[:, None] * (1 - a) * (q - soft_nat)
        self.seen.append((labels, self.robust, p.argmax(1) == labels, p, hard_adv, hard_nat))
        parts = [(by_adv, x_adv), (by_nat, x_nat), *more]
        gradients = [sum(by.T @ x for by, x in parts) / n, sum(by.sum(0) for by, _ in parts) / n]
        for k, (weight, gradient) in enumerate(zip((self.w, self.b), gradients, strict=True)):
            self.velocity[k] = MOMENTUM * self.velocity[k] + gradient + DECAY * weight
            weight -= LEARNING_RATE * self.velocity[k]
        return loss.mean()

    def weights_of_terms(self, labels):
        """The weights (N,1) of the two terms of TRADES, of which the mean is the loss."""
        ones = np.ones((len(labels), 1))
        if self.name == "trades":
            return ones, 6 * ones
        if self.name == "wat":
            return (factor * self.weight[labels][:, None] for factor in (1, 6))
        if self.name == "cfa":
            beta = self.beta[labels][:, None]
            return 1 / (1 + beta), beta / (1 + beta)
        if self.name == "dafa":
            return self.weight[labels][:, None], 6 * ones
        nat, adv = (self.frl_weights(kind)[labels][:, None] for kind in (0, 1))
        return nat / nat.mean(), 1.5 * adv / adv.mean()

    def frl_weights(self, kind):
        own = self.multipliers[kind]
        return np.array([1 / C + (1 - 1 / C) * m - (own.sum() - m) / C for m in own])

    def observe(self, x_nat, labels, noise):
        """Gather the costs, or clean and boundary errors, of held-out images."""
        q = softmax(self.logits(x_nat))
        if self.name == "wat":
            p = softmax(self.logits(self.attack(x_nat, noise, labels, q)))
            figures = [-np.log((q * one_hot(labels)).sum(1)) + 6 * kl(q, p)]
        else:
            x_adv = self.attack(x_nat, noise, labels, None, steps=20)
            clean, robust = (self.logits(x).argmax(1) == labels for x in (x_nat, x_adv))
            figures = [1 - clean.astype(float), clean * 1.0 - robust]
        self.held_out.append((labels, *figures))

    def adapt_to_held_out(self):
        labels, *figures = (np.concatenate(parts) for parts in zip(*self.held_out, strict=True))
        self.held_out = []
        if self.name == "wat":
            self.costs += [*per_class(figures[0], labels), figures[0].mean()]
            factor = np.exp(0.1 * self.costs)
            factor *= C / factor.sum()
            self.weight = factor[:C] + factor[C]
        else:
            for own, error, rate in zip(self.multipliers, figures, (0.05, 0.1), strict=True):
                own += rate * (per_class(error, labels) - error.mean() - 0.1)
                own[:] = np.maximum(own, 0)
                own *= 0.5 / max(own.sum(), 0.5)

    def end_epoch(self, rate):
        if self.held_out:
            self.adapt_to_held_out()
        labels, robust, right, p, *risks = (
            np.concatenate(parts) for parts in zip(*self.seen, strict=True)
        )
        self.seen, self.epochs = [], self.epochs + 1
        if self.name.startswith("absld"):
            lower, upper = self.config.temperature_lower, self.config.temperature_upper
            for t, risk in zip(self.temperature, risks, strict=True):
                gap = per_class(risk, labels) - per_class(risk, labels).mean()
                step = rate * gap / abs(gap).max()
                relative = self.config.temperature_move == "relative"
                t[:] = np.clip(t / np.exp(step) if relative else t - step, lower, upper)
        if self.name in ("fair-rslad", "absld-weights"):
            inverse = np.maximum(per_class(robust, labels), 1e-9) ** -2.0  # 0: the limit
            self.weight = np.clip(C * inverse / inverse.sum(), 5 / 6, 5 / 2)
        if self.name in ("absld-margins", "cfa"):
            self.margin = 0.3 + per_class(right.astype(float), labels)
            self.beta = 6 * (self.margin + 0.2)
        if self.name == "dafa" and (self.weight == 1).all():  # once, after the warm-up
            self.weight = moved_weights([p[labels == k].mean(0) for k in range(C)], 1.0)


def moved_weights(p, transfer):
    """The class weights of DAFA, by its sums over pairs; p[i][j]: of class j on images of i."""
    weights = [1.0 for _ in p]
    for i, j in itertools.permutations(range(len(p)), 2):
        if p[i][i] < p[j][j]:
            weights[i] += transfer * p[i][j] * p[j][j]
        else:
            weights[i] -= transfer * p[j][i] * p[i][i]
    return np.array(weights)


COLD = {"temperature_start": 0.4, "temperature_lower": 0.3, "temperature_upper": 0.5}
FRL = "nat", "adv"


def plain(given):
    """A batch in NumPy, each image a row."""
    return [part.flatten(1).numpy() if part.ndim > 1 else part.numpy() for part in given[:3]]


def held_out(epoch):
    """Two batches, the second without its last images: not as many of each class."""
    second = batch(10 * epoch + 10)
    return [batch(10 * epoch + 9), Batch(*(part[:4] for part in second[:3]))]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "given", [{}, {"adv_weight": 0.7}, COLD, COLD | {"temperature_move": "relative"}],
    ids=["recipe", "adv_weight", "start", "start and move"],
)  # fmt: skip
def test_two_epochs_of_two_steps_are_those_by_hand(name, given):
    """Attack, loss, gradients, momentum, and what an epoch changes: to the weights after each.
    Of the methods without temperatures, where these start changes nothing."""
    epochs = {"dafa": 2, "iad": 3}.get(name, 20)  # so that the second epoch differs
    config = resolve({"method": name, "epochs": epochs} | given).training()
    student, teacher = linear(1), linear(2, 2.0).requires_grad_(False)
    ours = build_method(config, C).double()  # or an epoch's temperatures would be of float32
    by_hand = ByHand(name, config, parameters(student), parameters(teacher))
    optimizer = torch.optim.SGD(
        student.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, weight_decay=DECAY
    )
    for epoch in range(2):
        for number in range(2):
            given = batch(10 * epoch + number, config.start)
            losses = train_step(ours, student, teacher, given, ATTACK, optimizer)
            assert losses["loss"].item() == pytest.approx(by_hand.step(*plain(given)), rel=1e-6)
            for mine, theirs in zip(student.parameters(), (by_hand.w, by_hand.b), strict=True):
                np.testing.assert_allclose(mine.detach().numpy(), theirs, rtol=1e-5, atol=1e-6)
        if ours.uses_validation:
            ours.observe_validation(student, held_out(epoch), ATTACK)
            for each in held_out(epoch):
                by_hand.observe(*plain(each))
        report = ours.end_epoch(0.3)
        by_hand.end_epoch(0.3)
        expected = {"class_weight": by_hand.weight, "class_margin": by_hand.margin}
        expected |= {f"class_weight_{k}": by_hand.frl_weights(i) for i, k in enumerate(FRL)}
        expected["class_beta"] = by_hand.beta
        expected["temperature_adv"], expected["temperature_nat"] = by_hand.temperature
        for key in expected.keys() & report.keys():
            np.testing.assert_allclose(report[key].numpy(), expected[key], rtol=1e-5, err_msg=key)


def test_iad_asks_the_teacher_for_attacked_images_after_three_tenths_of_the_run():
    """And then the student's own predictions count, but not before."""
    ours = build_method(TrainConfig(method="iad", epochs=10), C)
    teacher, calls = linear(2, 2.0).requires_grad_(False), []
    teacher.register_forward_pre_hook(lambda module, x: calls.append(x[0]))
    for epoch in range(5):
        calls.clear()
        own = ours.step(linear(1), teacher, batch(0), ATTACK).parts["own_kl"]
        assert (own > 0, len(calls)) == ((True, 2) if epoch >= 3 else (False, 1))
        ours.end_epoch(0.0)


def iterates_of_bat(labels, paths):
    """Keep images whose one pixel is the number of the iterate, from their predicted classes."""
    paths, labels = torch.tensor(paths), torch.tensor(labels)
    watched = WatchedNetwork(nn.Identity(), labels, torch.zeros(len(labels), 1, 1, 1))
    for number, predicted in enumerate(paths.T):
        x = torch.full((len(labels), 1, 1, 1), float(number))
        watched.keep(x, predicted == labels)
    end = torch.full((len(labels), 1, 1, 1), float(paths.shape[1]))
    watched.keep(end, watched.correct)
    return [x.flatten().tolist() for x in (watched.last_correct, watched.first_wrong)]


def test_bat_keeps_the_iterates_around_the_first_misclassification():
    """Also where the image is classified correctly again later; at the ends, one iterate twice."""
    paths = {(1, 1, 1): (3, 3), (1, 1, 0): (1, 2), (1, 0, 1): (0, 1), (0, 1, 1): (0, 0)}
    found = iterates_of_bat([1] * len(paths), [*paths])
    assert [*zip(*found, strict=True)] == [*paths.values()]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bat_projects_a_start_that_is_misclassified(norm):
    """As all later iterates are: in the ball, and in [0,1]."""
    student, given = linear(1), batch(0)
    start = given.x_nat + 1000 * given.noise
    wrong = (student(start).argmax(1) + 1) % C
    given = given._replace(noise=1000 * given.noise, labels=wrong)
    clean = student(given.x_nat).softmax(1).detach()
    attack = replace(ATTACK, norm=norm)
    before, after = boundary_images(student, clean, given, attack)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, geometry(norm).project(start, given.x_nat, EPSILON))
    assert not torch.equal(before, start)


def test_mart_is_finite_where_a_wrong_class_is_certain():
    student = linear(1)
    with torch.no_grad():
        student[1].weight.mul_(1e4)
    step = build_method(TrainConfig(method="mart"), C).step(student, None, batch(0), ATTACK)
    step.loss.backward()
    assert step.loss.isfinite() and student[1].weight.grad.isfinite().all()


MOVES = {
    "absld-weights": "class_weight", "fair-rslad": "class_weight", "absld-margins": "class_margin",
    "wat": "class_weight", "frl": "class_weight_adv",
    "cfa": "class_beta", "dafa": "class_weight",
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_the_second_epoch_differs_from_the_first(name):
    """Or the test above would say nothing of weights and margins."""
    ours = build_method(TrainConfig(method=name, epochs=2 if name == "dafa" else 20), C)
    losses = []
    for _ in range(2):
        losses.append(ours.step(linear(1), linear(2, 2.0), batch(0), ATTACK).loss.item())
        ours.observe_validation(linear(1), held_out(0), ATTACK)
        moved = ours.end_epoch(0.0)[MOVES[name]]
        assert (moved != moved[0]).any()
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_goes_on_from_its_state_in_the_middle_of_an_epoch(name):
    config = TrainConfig(method=name, epochs=3)
    whole, taken_up = build_method(config, C), build_method(config, C)
    teacher = linear(2, 2.0).requires_grad_(False)
    whole.step(linear(1), teacher, batch(0), ATTACK)
    whole.observe_validation(linear(1), held_out(0), ATTACK)
    whole.end_epoch(0.1)
    whole.step(linear(1), teacher, batch(1), ATTACK)
    whole.observe_validation(linear(1), held_out(1), ATTACK)
    state = whole.state_dict()
    kept = {key: value.clone() for key, value in state.items()}
    taken_up.load_state_dict(state)
    results = []
    for ours in (whole, taken_up):
        told = {k: v.tolist() for k, v in ours.end_epoch(0.1).items()}
        loss = ours.step(linear(1), teacher, batch(2), ATTACK).loss.item()
        results.append((loss, told, {k: v.tolist() for k, v in ours.state_dict().items()}))
    assert results[0] == results[1]
    assert all(torch.equal(state[key], kept[key]) for key in kept), "a state is a copy"


@pytest.mark.parametrize("name", METHODS)
def test_a_step_leaves_the_student_in_train_mode_and_the_teacher_alone(name):
    student, teacher = linear(1), linear(2).eval().requires_grad_(False)
    before = absld.digest(teacher.state_dict())
    step = build_method(resolve({"method": name}).training(), C).step(
        student.eval(), teacher, batch(3), ATTACK
    )
    assert step.loss.requires_grad and not any(part.requires_grad for part in step.parts.values())
    assert all(module.training for module in student.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in student.parameters())
    assert not teacher.training and absld.digest(teacher.state_dict()) == before
    assert all(weight.grad is None for weight in teacher.parameters())


ALONE = ("sat", "mart", "bat", *OF_TRADES)
NEED = [name for name in METHODS if name not in ALONE]


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_distil_need_a_teacher(name):
    built = build_method(TrainConfig(method=name), C)
    assert built.needs_teacher == (name in NEED)
    if name in NEED:
        with pytest.raises(UsageError, match="needs a teacher"):
            built.step(linear(1), None, batch(0), ATTACK)


def test_ard_s_gradient_survives_its_temperature():
    """t^2 keeps the KL's gradient of the size that it has at temperature 1, about."""
    step = build_method(TrainConfig(method="ard", adv_weight=1.0), C).step(
        linear(1), linear(2).requires_grad_(False), batch(0), ATTACK
    )
    assert step.parts["adv_kl"] > 0.01


@pytest.mark.parametrize("name", ["adaad"])
def test_the_attack_of_adaad_differentiates_the_teacher(name):
    """With the student for a teacher there is nothing to climb: the images stay where they start."""
    student = linear(1)
    seen = []
    student.register_forward_pre_hook(lambda module, x: seen.append(x[0].detach().clone()))
    twin = linear(1).requires_grad_(False)
    given = batch(4)
    build_method(TrainConfig(method=name), C).step(student, twin, given, ATTACK)
    last_attacked = seen[STEPS - 1]  # where the last step began
    assert (last_attacked - given.x_nat).abs().max() <= EPSILON + 1e-9
    other = linear(7, 3.0).requires_grad_(False)
    student_apart = linear(1)
    step = build_method(TrainConfig(method=name, adv_weight=1.0), C).step(
        student_apart, other, given, ATTACK
    )
    plain = build_method(TrainConfig(method="rslad", adv_weight=1.0), C).step(
        linear(1), other, given, ATTACK
    )
    assert step.loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


# --- Class weights and margins ---

steps_of_classes = st.lists(st.just(0.0) | st.floats(1e-6, 10), min_size=2, max_size=8)


@given(steps_of_classes)
@example([0.0, 0.0, 10.0])
@example([1e-100, 10.0])
@example([5.0, 5.0, 5.0])
def test_class_weights_are_the_formula(kappa):
    """Brute force in exact limits: where some withstand nothing, they share all."""
    weights = class_weights(torch.tensor(kappa, dtype=draw.DTYPE), lower=5 / 6, upper=5 / 2)
    zeros = kappa.count(0.0)
    count = len(kappa)
    for value, weight in zip(kappa, weights.tolist(), strict=True):
        if zeros:
            plain = count / zeros if value == 0 else 0.0
        else:
            plain = count / math.fsum((value / other) ** 2 for other in kappa)
        assert weight == pytest.approx(min(max(plain, 5 / 6), 5 / 2), rel=1e-9)


@given(steps_of_classes, st.randoms())
def test_class_weights_are_ordered_equivariant_and_of_mean_one(kappa, random):
    """A class that gives way earlier weighs no less; classes are told by their figures alone;
    equal ones weigh 1; the mean is 1 where nothing is clipped."""
    tensor = torch.tensor(kappa, dtype=draw.DTYPE)
    weights = class_weights(tensor, lower=0.0, upper=math.inf)
    assert weights.mean().item() == pytest.approx(1)
    by_steps = tensor.argsort(stable=True)
    assert (weights[by_steps].diff() <= 1e-12).all()
    order = list(range(len(kappa)))
    random.shuffle(order)
    shuffled = class_weights(tensor[order], lower=0.0, upper=math.inf)
    torch.testing.assert_close(shuffled, weights[order], rtol=1e-12, atol=0)
    same = class_weights(torch.full((4,), kappa[0], dtype=draw.DTYPE), lower=5 / 6, upper=5 / 2)
    assert same.tolist() == [1.0] * 4


def test_an_absent_class_keeps_its_weight_and_does_not_count():
    nan = float("nan")
    with_absent = class_weights(torch.tensor([2.0, nan, 4.0]), lower=0.0, upper=9.0)
    without = class_weights(torch.tensor([2.0, 4.0]), lower=0.0, upper=9.0)
    assert with_absent[1] == 1 and with_absent[[0, 2]].tolist() == without.tolist()
    assert class_weights(torch.tensor([nan, nan]), lower=0.0, upper=9.0).tolist() == [1.0, 1.0]


@st.composite
def probabilities(draw_one):
    """Mean probabilities of the classes, row by class of the images; NaN for absent classes."""
    count = draw_one(st.integers(2, 6))
    logits = draw_one(st.lists(st.floats(-4, 4), min_size=count**2, max_size=count**2))
    rows = softmax(np.array(logits).reshape(count, count))
    rows[list(draw_one(st.sets(st.integers(0, count - 1)))), :] = np.nan
    return rows


@given(probabilities(), st.sampled_from([1.0, 1.5]))
@example(np.array([[0.9, 0.1], [0.9, 0.1]]), 1.5)  # a weight below 0
@example(np.array([[0.6, 0.4, 0.0], [0.5, 0.5, 0.0], [np.nan] * 3]), 1.0)
def test_distance_weights_are_the_formula_over_the_classes_that_are_there(p, transfer):
    found = distance_weights(torch.from_numpy(p), transfer).numpy()
    present = np.flatnonzero(~np.isnan(p[:, 0]))
    expected = np.ones(len(p))
    expected[present] = moved_weights(p[np.ix_(present, present)], transfer)
    np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-12, atol=1e-12)
    if len({*p.diagonal()[present]}) == len(present) > 0:  # what one takes, another gives
        assert expected.mean() == pytest.approx(1)


@pytest.mark.parametrize(("epochs", "last"), [(110, 70), (40, 25), (2, 1), (1, 1)])
def test_distance_weights_are_set_once_by_the_last_epoch_of_the_warm_up(epochs, last):
    ours = build_method(TrainConfig(method="dafa", epochs=epochs), C)
    seen = []
    for epoch in range(1, epochs + 1):
        if epoch >= last - 1:
            ours.step(linear(epoch), None, batch(epoch), ATTACK)
        seen.append(ours.end_epoch(0.1)["class_weight"].tolist())
    assert seen[: last - 1] == [[1.0] * C] * (last - 1) and seen[last - 1] != [1.0] * C
    assert seen[last:] == [seen[last - 1]] * (epochs - last)
    alone = build_method(TrainConfig(method="dafa", epochs=1), C)  # weights of that epoch alone
    alone.step(linear(last), None, batch(last), ATTACK)
    assert alone.end_epoch(0.1)["class_weight"].tolist() == seen[last - 1]


@pytest.mark.parametrize(("count", "transfer"), [(10, 1.0), (99, 1.0), (100, 1.5), (200, 1.5)])
def test_dafa_moves_more_between_many_classes(count, transfer):
    assert build_method(TrainConfig(method="dafa"), count).transfer == transfer


def test_class_margins_are_the_formula():
    margins = class_margins(torch.tensor([0.0, 0.5, 1.0, float("nan")]), 0.3)
    torch.testing.assert_close(margins, torch.tensor([0.3, 0.8, 1.3, 1.0]))


@pytest.mark.parametrize("name", ["absld-margins", "cfa"])
@pytest.mark.parametrize(("epochs", "begins"), [(20, 1), (40, 2), (200, 10), (4, 1)])
def test_margins_begin_after_a_twentieth_of_the_run(name, epochs, begins):
    ours = build_method(TrainConfig(method=name, epochs=epochs), C)
    teacher = linear(2, 2.0).requires_grad_(False)
    for epoch in range(1, begins + 1):
        ours.step(linear(1), teacher, batch(epoch), ATTACK)
        assert (ours.end_epoch(0.1)["class_margin"] != 1).any() == (epoch >= begins)


def test_a_class_margin_scales_the_epsilon_of_its_images():
    ours = build_method(TrainConfig(method="absld-margins"), C)
    ours.margin = torch.tensor([0.0, 0.5, 1.3])
    student, seen = linear(1), []
    student.register_forward_pre_hook(lambda module, x: seen.append(x[0].detach().clone()))
    given = batch(5)
    attack = replace(ATTACK, step_size=EPSILON)
    ours.step(student, linear(2).requires_grad_(False), given, attack)
    moved = (seen[STEPS] - given.x_nat).abs().amax((1, 2, 3))
    for k, factor in enumerate([0.0, 0.5, 1.3]):
        reached = moved[given.labels == k]
        assert (reached <= EPSILON * factor + 1e-7).all()
        assert reached.max() > 0.9 * EPSILON * factor - 1e-12


def test_the_counting_objective_counts_steps_that_find_an_image_right():
    labels = torch.tensor([0, 1])
    counting = CountingObjective(lambda logits: logits.sum() * 3, labels)
    for logits in ([[1.0, 0], [1, 0]], [[1.0, 0], [0, 1]], [[0.0, 1], [0, 1]]):
        assert counting(torch.tensor(logits)) == 6
    assert counting.correct.tolist() == [2, 2]


# --- Methods of other people ---


class Mine(Method):
    needs_teacher = False


def test_a_method_by_import_path(monkeypatch, tmp_path):
    (tmp_path / "minez.py").write_text(
        "from absld.methods import Sat\nclass Own(Sat):\n    beta = 3\nclass No:\n    pass\nx = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    built = build_method(TrainConfig(method="minez:Own"), C)
    assert type(built).__name__ == "Own" and built.config.method == "minez:Own"
    for spec, said in {
        "minez:No": "not a method", "minez:x": "not a method", "minez:nothing": "nothing",
        "no_such_module:X": "no_such_module",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=said) as caught:
            method_class(spec)
        assert caught.value.hint


def test_a_method_without_a_step_raises():
    with pytest.raises(NotImplementedError):
        Mine(TrainConfig(), C).step(linear(1), None, batch(0), ATTACK)
    assert Mine(TrainConfig(), C).end_epoch(0.1) == {} == Mine(TrainConfig(), C).state_dict()
