"""The package's methods: one step of each against the oracles, and what an epoch changes."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers import strategies as draw
from torch import nn

import absld
from absld.attack import kl
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch
from absld.errors import UsageError
from absld.methods import Absld, build_method

C = 3
EPSILON = 0.1
ATTACK = absld.TrainingAttack(EPSILON, EPSILON / 4, 3)
ADV, NAT = [0.6, 1.5, 3.0], [2.0, 0.9, 0.7]


def batch(seed=0, n=8):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (n,), generator=random)
    noise = 0.001 * torch.randn(n, 3, 8, 8, generator=random, dtype=draw.DTYPE)
    return Batch(draw.images(seed, n), labels, noise)


def network(*key):
    return absld.build_model("convnet", C, "test", *key).to(draw.DTYPE)


def frozen_teacher():
    return network("teacher").eval().requires_grad_(False)


def method(**settings):
    """A method whose temperatures, if it has any, have moved."""
    built = build_method(TrainConfig(**settings), C)
    if isinstance(built, Absld):
        built.temperature.adv = torch.tensor(ADV, dtype=draw.DTYPE)
        built.temperature.nat = torch.tensor(NAT, dtype=draw.DTYPE)
    return built


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def forwards(model):
    """Hear of each forward from now on: (in train mode?, images)."""
    seen = []
    model.register_forward_pre_hook(lambda m, x: seen.append((m.training, x[0].detach().clone())))
    return seen


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_a_step_of_absld_is_the_algorithm(fidelity):
    """D1 to D5 by hand: labels, loss, risks by the oracles; gradients in closed form."""
    ours = method(fidelity=fidelity, adv_weight=0.7, kl_scale=0.1)
    student, by_hand, teacher, given = (
        network("student"), network("student"), frozen_teacher(), batch()
    )  # fmt: skip
    x_nat, labels, noise, _ = given
    step = ours.step(student, teacher, given, ATTACK)

    used = [ADV, NAT]
    if fidelity == "released":
        used = [[a * b for a, b in zip(ADV, NAT, strict=True)]] * 2
    soft = [oracles.soften(teacher(x_nat).tolist(), labels.tolist(), t) for t in used]
    soft_adv, soft_nat = (torch.tensor(rows, dtype=draw.DTYPE) for rows in soft)
    x_adv = ATTACK(by_hand, kl(soft_adv), x_nat, noise)
    by_hand.train()
    logits = by_hand(x_adv), by_hand(x_nat)
    kls = [oracles.soft_label_kl(z.tolist(), p) for z, p in zip(logits, soft, strict=True)]
    close(step.loss.item(), 0.1 * (0.7 * kls[0] + 0.3 * kls[1]))
    assert list(step.parts) == ["adv_kl", "nat_kl"]
    for part, expected in zip(step.parts.values(), kls, strict=True):
        close(part.item(), expected)
        assert not part.requires_grad

    for z, risk in zip(logits, (ours.temperature.adv_risk, ours.temperature.nat_risk), strict=True):
        sums, counts = oracles.class_risk_sums(z.tolist(), labels.tolist(), C)
        torch.testing.assert_close(risk.sums.double(), torch.tensor(sums).double())  # float32
        assert risk.counts.tolist() == counts

    step.loss.backward()
    weights = torch.tensor([0.7, 0.3]) * 0.1 / len(labels)
    gradients = [
        weight * (F.softmax(z.detach(), dim=1) - p)
        for weight, z, p in zip(weights, logits, (soft_adv, soft_nat), strict=True)
    ]
    torch.autograd.backward(logits, gradients)
    for mine, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-9)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name
    assert all(weight.grad is None for weight in teacher.parameters())


@pytest.mark.parametrize("name", ["absld", "rslad"])
def test_a_step_forwards_the_adversarial_images_first_and_apart(name):
    student, teacher, given = network("student").eval(), frozen_teacher(), batch()
    seen, asked = forwards(student), forwards(teacher)
    method(method=name).step(student, teacher, given, ATTACK)
    assert [training for training, _ in seen] == [False] * ATTACK.steps + [True] * 2
    assert torch.equal(seen[-1][1], given.x_nat) and not torch.equal(seen[-2][1], given.x_nat)
    assert all(m.training for m in student.modules())
    assert student.get_submodule("1").num_batches_tracked == 2
    # The teacher sees the clean images, once.
    assert len(asked) == 1 and torch.equal(asked[0][1], given.x_nat) and not asked[0][0]


@pytest.mark.parametrize("name", ["absld", "rslad"])
def test_without_a_teacher_there_is_no_distillation(name):
    student = network("student")
    with pytest.raises(UsageError, match="needs a teacher") as caught:
        method(method=name).step(student, None, batch(), ATTACK)
    assert "trades" in caught.value.hint
    assert student.get_submodule("1").num_batches_tracked == 0


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_step_of_trades_is_the_formula(with_teacher):
    """Also where a teacher is handed over: TRADES asks none."""
    student, by_hand, given = network("student"), network("student"), batch(5)
    x_nat, labels, noise, _ = given
    teacher = frozen_teacher() if with_teacher else None
    step = method(method="trades").step(student, teacher, given, ATTACK)
    clean = F.softmax(by_hand.eval()(x_nat), dim=1).detach()
    x_adv = ATTACK(by_hand, kl(clean), x_nat, noise)
    by_hand.train()
    nat_logits, adv_logits = by_hand(x_nat), by_hand(x_adv)
    q = [oracles.softmax(row) for row in nat_logits.tolist()]
    cross_entropy = -sum(math.log(row[y]) for row, y in zip(q, labels.tolist(), strict=True)) / 8
    robust = oracles.soft_label_kl(adv_logits.tolist(), q)
    close(step.loss.item(), cross_entropy + 6 * robust)
    assert list(step.parts) == ["cross_entropy", "kl"]
    for part, expected in zip(step.parts.values(), (cross_entropy, robust), strict=True):
        close(part.item(), expected)
        assert not part.requires_grad

    # d KL(q||p)/d z_nat = q * (log q/p - KL) per image; d/d z_adv = p - q; d CE/d z_nat = q - y.
    step.loss.backward()
    q, p = F.softmax(nat_logits.detach(), dim=1), F.softmax(adv_logits.detach(), dim=1)
    log_ratio = q.log() - p.log()
    image_kl = (q * log_ratio).sum(1, keepdim=True)
    natural = q - F.one_hot(labels, C) + 6 * q * (log_ratio - image_kl)
    torch.autograd.backward([nat_logits, adv_logits], [natural / 8, 6 * (p - q) / 8])
    for mine, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-10)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def test_trades_forwards_the_clean_images_first_and_apart():
    student, given = network("student"), batch()
    seen = forwards(student)
    method(method="trades").step(student, None, given, ATTACK)
    # In eval mode the label and the attack; in train mode the clean, then the attacked images.
    assert [training for training, _ in seen] == [False] * (1 + ATTACK.steps) + [True] * 2
    assert torch.equal(seen[0][1], given.x_nat) and torch.equal(seen[-2][1], given.x_nat)
    assert not torch.equal(seen[-1][1], given.x_nat)
    assert all(isinstance(m, nn.Module) and m.training for m in student.modules())


# --- Epochs ---


def test_absld_moves_its_temperatures_once_an_epoch():
    ours = build_method(TrainConfig(temperature_lower=0.9, temperature_upper=1.2), C)
    student, teacher = network("student"), frozen_teacher()
    for seed in range(2):
        ours.step(student, teacher, batch(seed), ATTACK)
        assert torch.equal(ours.temperature.adv, torch.ones(C))
    sums = ours.temperature.adv_risk.sums, ours.temperature.nat_risk.sums
    counts = ours.temperature.adv_risk.counts
    report = ours.end_epoch(0.15)
    assert list(report) == [
        "temperature_adv", "temperature_nat", "class_risk_adv", "class_risk_nat"
    ]  # fmt: skip
    for side, total in zip(("adv", "nat"), sums, strict=True):
        assert torch.equal(report[f"class_risk_{side}"], total / counts)
        risk = report[f"class_risk_{side}"].double()
        expected = oracles.update_temperature([1.0] * C, risk.tolist(), 0.15, 0.9, 1.2)
        moved = report[f"temperature_{side}"]
        torch.testing.assert_close(moved.double(), torch.tensor(expected).double())
        assert torch.equal(getattr(ours.temperature, side), moved)
        assert moved.min() == 0.9 or moved.max() == torch.tensor(1.15)
    assert not ours.temperature.adv_risk.counts.any()


def test_rslad_reports_risks_and_moves_nothing():
    ours = build_method(TrainConfig(method="rslad"), C)
    ours.step(network("student"), frozen_teacher(), batch(), ATTACK)
    report = ours.end_epoch(0.1)
    assert torch.equal(report["temperature_adv"], torch.ones(C))
    assert torch.equal(report["temperature_nat"], torch.ones(C))
    assert report["class_risk_adv"].max() > report["class_risk_adv"].min() > 0
    assert not ours.temperature.adv_risk.counts.any()


def test_trades_has_no_state():
    ours = build_method(TrainConfig(method="trades"), C)
    ours.step(network("student"), None, batch(), ATTACK)
    assert ours.end_epoch(0.1) == {} and ours.state_dict() == {}
    ours.load_state_dict({})


@pytest.mark.parametrize("name", ["absld", "ard", "iad", "adaad"])
def test_kl_scale_scales_the_loss_of_a_method_with_soft_labels(name):
    losses = [
        build_method(TrainConfig(method=name, adv_weight=1.0, kl_scale=scale), C)
        .double()
        .step(network("student"), frozen_teacher(), batch(), ATTACK)
        .loss.item()
        for scale in (1.0, 0.1)
    ]
    assert losses[1] == pytest.approx(0.1 * losses[0], rel=1e-12)


@pytest.mark.parametrize("name", ["sat", "trades", "mart", "bat"])
def test_kl_scale_is_refused_where_the_loss_has_no_soft_labels(name):
    with pytest.raises(UsageError, match=f"kl_scale has no meaning for {name}") as caught:
        build_method(TrainConfig(method=name, kl_scale=0.1), C)
    assert caught.value.hint == "leave out --kl-scale"
