"""Whole steps and runs of the single file: D3, D7, both readings, RSLAD, the teacher, TRADES."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import oracles
from helpers import strategies as draw

import absld_min
from absld import digest
from absld_min import Config, absld_step, build_model, trades_step, train, training_attack

CONFIG = Config(device="cpu", epochs=4, teacher_epochs=4, batch_size=8, epsilon=0.1)
C = 3


def batch(seed=0, n=8, dtype=draw.DTYPE):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (n,), generator=random)
    noise = 0.001 * torch.randn(n, 3, 8, 8, generator=random, dtype=dtype)
    return draw.images(seed, n, dtype=dtype), labels, noise


def network(*key):
    return build_model("convnet", C, "test", *key).to(draw.DTYPE)


def frozen_teacher():
    return network("teacher").eval().requires_grad_(False)


def small_sets():
    images = (draw.images(3, n=40) * 255).to(torch.uint8)
    labels = torch.arange(40) % C
    return [(images[:24], labels[:24]), (images[24:], labels[24:]), ()]


TEMPERATURE = torch.tensor([[0.6, 1.5, 3.0], [2.0, 0.9, 0.7]], dtype=draw.DTYPE)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_a_step_is_the_algorithm(fidelity):
    """Each line of D1 to D5 again, with the oracles for soft labels, loss and class risk."""
    config = replace(CONFIG, fidelity=fidelity)
    student, teacher, (x_nat, labels, noise) = network("student"), frozen_teacher(), batch()
    by_hand = network("student")
    given = x_nat, labels, noise
    loss, risks, counts = absld_step(config, student, teacher, TEMPERATURE, given)

    used = TEMPERATURE
    if fidelity == "released":  # v is divided by T_adv[y], and that again by T_nat[y]
        used = (TEMPERATURE[0] * TEMPERATURE[1]).expand(2, -1)
    logits = teacher(x_nat).tolist()
    adv_labels, nat_labels = (oracles.soften(logits, labels.tolist(), t.tolist()) for t in used)
    x_adv = training_attack(config, by_hand, torch.tensor(adv_labels, dtype=draw.DTYPE), given)
    by_hand.train()
    adv_logits, nat_logits = by_hand(x_adv), by_hand(x_nat)
    expected = (
        5 * oracles.soft_label_kl(adv_logits.tolist(), adv_labels)
        + oracles.soft_label_kl(nat_logits.tolist(), nat_labels)
    ) / 6
    torch.testing.assert_close(loss.item(), expected, rtol=0, atol=1e-12)
    sums = [
        oracles.class_risk_sums(z.tolist(), labels.tolist(), C) for z in (adv_logits, nat_logits)
    ]
    rows = torch.tensor([sums[0][0], sums[1][0]], dtype=draw.DTYPE)
    torch.testing.assert_close(risks, rows, rtol=0, atol=1e-12)
    assert counts.tolist() == sums[0][1]
    assert not risks.requires_grad
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def test_a_step_forwards_the_adversarial_images_first_and_apart():
    student, seen = network("student").eval(), []
    student.register_forward_pre_hook(lambda m, x: seen.append((m.training, x[0].clone())))
    given = batch()
    absld_step(CONFIG, student, frozen_teacher(), TEMPERATURE, given)
    assert [training for training, _ in seen] == [False] * 10 + [True] * 2
    assert torch.equal(seen[11][1], given[0]) and not torch.equal(seen[10][1], given[0])
    assert all(module.training for module in student.modules())
    assert student.get_submodule("1").num_batches_tracked == 2


def test_the_attack_climbs_from_the_adversarial_label(monkeypatch):
    """p_adv and not p_nat is what the attack maximises the distance from."""
    given = []

    def attack(config, model, soft_labels, batch):
        given.append(soft_labels)
        return batch[0] + batch[2]

    monkeypatch.setattr(absld_min, "training_attack", attack)
    x_nat, labels, noise = batch()
    absld_step(CONFIG, network("student"), frozen_teacher(), TEMPERATURE, (x_nat, labels, noise))
    expected = absld_min.soften(frozen_teacher()(x_nat), labels, TEMPERATURE[0])
    assert torch.equal(given[0], expected)


def test_trades_is_the_formula():
    model, by_hand, (x_nat, labels, noise) = network("t"), network("t"), batch(5)
    loss = trades_step(CONFIG, model, (x_nat, labels, noise))
    soft = F.softmax(by_hand.eval()(x_nat), dim=1).detach()
    x_adv = training_attack(CONFIG, by_hand, soft, (x_nat, labels, noise))
    by_hand.train()
    nat_logits, adv_logits = by_hand(x_nat), by_hand(x_adv)
    q = [oracles.softmax(row) for row in nat_logits.tolist()]
    cross_entropy = -sum(math.log(row[y]) for row, y in zip(q, labels.tolist(), strict=True)) / 8
    expected = cross_entropy + 6 * oracles.soft_label_kl(adv_logits.tolist(), q)
    torch.testing.assert_close(loss.item(), expected, rtol=0, atol=1e-12)
    # The gradient goes through both sides of the KL: another one than with q held fixed.
    loss.backward()
    fixed = F.cross_entropy(nat_logits, labels)
    fixed = fixed + 6 * absld_min.soft_label_kl(adv_logits, F.softmax(nat_logits, dim=1).detach())
    torch.testing.assert_close(loss, fixed, rtol=0, atol=1e-12)
    both = fixed + 6 * (F.softmax(nat_logits, 1) * (
        F.log_softmax(nat_logits, 1) - F.log_softmax(adv_logits, 1)
    ).detach()).sum() / 8  # fmt: skip
    both.backward()
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10)


# --- Runs ---


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs `train` on small sets and returns what it computed: network, saved weights, losses,
    temperatures (2,C) that each step was given."""

    def run(config=CONFIG, role="student", **replaced):
        record = SimpleNamespace(losses=[], temperatures=[], evaluated=[])
        steps = {"absld_step": absld_step, "trades_step": trades_step} | replaced

        def record_absld(config, model, teacher, temperature, batch):
            record.temperatures.append(temperature.clone())
            loss, *risks = steps["absld_step"](config, model, teacher, temperature, batch)
            record.losses.append(loss.item())
            return loss, *risks

        def record_trades(config, model, batch):
            loss = steps["trades_step"](config, model, batch)
            record.losses.append(loss.item())
            return loss

        evaluate = replaced.get("evaluate", absld_min.evaluate)

        def record_evaluation(config, model, images, labels):
            record.evaluated.append(digest(model.state_dict()))
            return evaluate(config, model, images, labels)

        with monkeypatch.context() as patch:
            patch.setattr(absld_min, "absld_step", record_absld)
            patch.setattr(absld_min, "trades_step", record_trades)
            patch.setattr(absld_min, "evaluate", record_evaluation)
            record.model = build_model("convnet", C, config.seed, role)
            record.teacher = build_model("convnet", C, "teacher").eval().requires_grad_(False)
            record.path = tmp_path / f"{role}.pt"
            teacher = record.teacher if role == "student" else None
            train(replace(config, out=str(tmp_path)), record.model, teacher, small_sets())
        record.saved = torch.load(record.path, weights_only=True)
        return record

    return run


def test_a_run_is_a_function_of_its_flags(run):
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert digest(run().saved) == digest(first.saved)
    assert digest(run(replace(CONFIG, seed=1)).saved) != digest(first.saved)


def test_a_run_changes_nothing_of_the_teacher(run):
    teacher, fresh = run().teacher, build_model("convnet", C, "teacher")
    assert digest(teacher.state_dict()) == digest(fresh.state_dict()) and not teacher.training
    assert all(weight.grad is None for weight in teacher.parameters())


def test_what_is_saved_is_a_plain_state_dict(run, tmp_path):
    record = run()
    assert record.saved.keys() == build_model("convnet", C).state_dict().keys()
    assert digest(record.saved) == digest(record.model.state_dict())
    assert digest(record.saved) in record.evaluated
    assert list(tmp_path.iterdir()) == [tmp_path / "student.pt"]


def test_the_best_epoch_is_kept(run):
    """Of the highest average + worst robust accuracy, not the last, not the first of a tie's end."""
    robust = iter([[0.5, 0.4, 0.3], [0.6, 0.6, 0.6], [1.0, 1.0, 0.0], [0.6, 0.6, 0.6]])

    def evaluate(config, model, images, labels):
        assert len(labels) == 16  # the validation images
        return torch.tensor([[1.0, 1.0, 1.0], next(robust)])

    record = run(evaluate=evaluate)
    assert digest(record.model.state_dict()) == digest(record.saved) == record.evaluated[1]


def test_temperatures_move_once_an_epoch_by_the_mean_risk(run, monkeypatch):
    moves = []

    def step(*given):
        # Class 0 has 4 images of risk 1, class 1 has 1 of risk 3, class 2 none, in each batch.
        sums = torch.tensor([[4.0, 3.0, 0.0], [8.0, 1.0, 0.0]])
        return absld_step(*given)[0], sums, torch.tensor([4, 1, 0])

    def update(temperature, risk, **settings):
        moves.append((risk, settings))
        return temperature + 0.01

    monkeypatch.setattr(absld_min, "update_temperature", update)
    record = run(absld_step=step)
    assert [t[0, 0].item() for t in record.temperatures] == pytest.approx(
        [1.0] * 3 + [1.01] * 3 + [1.02] * 3 + [1.03] * 3
    )
    assert len(moves) == 4  # epochs, of adversarial and natural together
    for risk, settings in moves:
        assert risk[:, :2].tolist() == [[1.0, 3.0], [2.0, 1.0]] and risk[:, 2].isnan().all()
        assert settings["lower"] == 0.5 and settings["upper"] == 5.0


def schedule(epochs, run, monkeypatch):
    """The learning rate and the temperature rate of every epoch."""
    learning, rates, sgd = [], [], torch.optim.SGD

    class Sgd(sgd):
        def step(self):
            learning.append(self.param_groups[0]["lr"])

    def step(config, model, teacher, temperature, batch):
        return sum(p.sum() for p in model.parameters()) * 0, torch.ones(2, C), torch.ones(C)

    def update(temperature, risk, rate, **_):
        rates.append(rate)
        return temperature

    monkeypatch.setattr(torch.optim, "SGD", Sgd)
    monkeypatch.setattr(absld_min, "update_temperature", update)
    config = replace(CONFIG, epochs=epochs, batch_size=24)  # a step an epoch
    run(config, absld_step=step, evaluate=lambda *_: torch.ones(2, C))
    monkeypatch.setattr(torch.optim, "SGD", sgd)
    return learning, rates


def test_the_schedule_is_that_of_the_paper(run, monkeypatch):
    expected = [1.0] * 215 + [0.1] * 45 + [0.01] * 25 + [0.001] * 15  # of epochs 1 to 300
    learning, temperature = schedule(300, run, monkeypatch)
    assert learning == pytest.approx([0.1 * decay for decay in expected])
    # The rate decays together with it, so before the update that ends epochs 215, 260 and 285.
    assert temperature == pytest.approx([0.1 * decay for decay in [*expected[1:], 0.001]])


def test_a_shorter_run_keeps_the_shape(run, monkeypatch):
    learning, _ = schedule(20, run, monkeypatch)
    assert learning == pytest.approx([0.1] * 14 + [0.01] * 3 + [0.001] * 2 + [0.0001])
    assert schedule(1, run, monkeypatch)[0] == [0.1]


def test_the_optimiser_is_that_of_the_release(run, monkeypatch):
    made, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **kw: made.append(kw) or sgd(*a, **kw))
    run()
    assert made == [{"lr": 0.1, "momentum": 0.9, "weight_decay": 2e-4}]


def test_rate_zero_is_rslad(run, monkeypatch):
    """All temperatures stay 1, and soft labels are a plain softmax: the same weights."""
    config = replace(CONFIG, epochs=2, temperature_rate=0.0)
    first = run(config)
    assert all((temperature == 1).all() for temperature in first.temperatures)
    assert run(replace(config, temperature_rate=0.1)).losses != first.losses
    monkeypatch.setattr(absld_min, "soften", lambda logits, *_: F.softmax(logits, dim=1))
    again = run(config)
    assert again.losses == first.losses and digest(again.saved) == digest(first.saved)


def test_both_fidelities_agree_until_the_temperatures_move(run):
    first, second = run().losses, run(replace(CONFIG, fidelity="released")).losses
    assert first[:3] == second[:3] and first[3] != second[3]  # three steps an epoch


def test_a_teacher_is_trained_without_temperatures(run, monkeypatch, capsys):
    monkeypatch.setattr(absld_min, "update_temperature", None)
    record = run(replace(CONFIG, epochs=3), role="teacher")
    assert len(record.evaluated) == 3 and len(record.losses) == 9 and not record.temperatures
    assert capsys.readouterr().out.splitlines()[0] == "teacher"


def test_nan_stops_before_the_optimiser_step(run, tmp_path):
    """Weights as after the last good step; the best epoch so far stays; where and what is said."""
    models, before = [], []

    def step(config, model, *given):
        loss, *risks = absld_step(config, model, *given)
        models.append(model)
        before.append(digest(dict(model.named_parameters())))
        return loss * (float("nan") if len(models) == 5 else 1), *risks

    with pytest.raises(FloatingPointError, match=r"(?s)epoch 2: loss=.*nan.*temperature="):
        run(absld_step=step)
    assert len(models) == 5 and digest(dict(models[0].named_parameters())) == before[-1]
    saved = torch.load(tmp_path / "student.pt", weights_only=True)  # of the first epoch
    assert all(tensor.isfinite().all() for tensor in saved.values())


@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes_train(classes, tmp_path, monkeypatch):
    images = (draw.images(0, n=4 * classes) * 255).to(torch.uint8)
    labels = torch.arange(4 * classes) % classes
    config = Config(device="cpu", epochs=1, batch_size=classes, out=str(tmp_path))
    model, teacher = (build_model("convnet", classes, role) for role in ("student", "teacher"))
    data, moved = [(images, labels), (images[:classes], labels[:classes]), ()], []
    update = absld_min.update_temperature
    monkeypatch.setattr(
        absld_min,
        "update_temperature",
        lambda *a, **kw: moved.append(update(*a, **kw)) or moved[-1],
    )
    train(config, model, teacher.eval().requires_grad_(False), data)
    assert moved[0].shape == (2, classes) and ((moved[0] >= 0.5) & (moved[0] <= 5)).all()
    saved = torch.load(tmp_path / "student.pt", weights_only=True)
    assert saved["linear.weight"].shape == (classes, 64)
