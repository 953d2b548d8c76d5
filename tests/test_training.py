"""Whole steps and runs: D3, D7, both readings of the method, RSLAD, the teacher, TRADES."""

import math

import oracles
import pytest
import strategies as draw
import torch
import torch.nn.functional as F
from torch import nn

import absld_min
from absld_min import Config, attack, build_model, digest, trades_step, train, train_step

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
    return [(images[:24], labels[:24]), (images[24:], labels[24:])]


TEMPERATURE = torch.tensor([[0.6, 1.5, 3.0], [2.0, 0.9, 0.7]], dtype=draw.DTYPE)


@pytest.mark.parametrize("fidelity", ["paper", "released"])
def test_a_step_is_the_algorithm(fidelity):
    """Each line of D1 to D5 again, with the oracles for soft labels, loss and class risk."""
    config = Config(device="cpu", epsilon=0.1, fidelity=fidelity)
    student, teacher, (x_nat, labels, noise) = network("student"), frozen_teacher(), batch()
    by_hand = network("student")
    loss, risk = train_step(config, student, teacher, TEMPERATURE, x_nat, labels, noise)

    used = TEMPERATURE
    if fidelity == "released":  # v is divided by T_adv[y], and that again by T_nat[y]
        used = (TEMPERATURE[0] * TEMPERATURE[1]).expand(2, -1)
    logits = teacher(x_nat).tolist()
    adv_labels, nat_labels = (oracles.soften(logits, labels.tolist(), t.tolist()) for t in used)
    x_adv = attack(config, by_hand, torch.tensor(adv_labels, dtype=draw.DTYPE), x_nat, noise)
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
    rows = torch.tensor([sums[0][0], sums[1][0], sums[0][1]], dtype=draw.DTYPE)
    torch.testing.assert_close(risk, rows, rtol=0, atol=1e-12)
    assert not risk.requires_grad
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, by_hand.state_dict()[name]), name


def test_a_step_forwards_the_adversarial_images_first_and_apart():
    student, seen = network("student"), []
    student.register_forward_pre_hook(lambda m, x: seen.append((m.training, x[0].clone())))
    x_nat, labels, noise = batch()
    train_step(CONFIG, student, frozen_teacher(), TEMPERATURE, x_nat, labels, noise)
    assert [training for training, _ in seen] == [False] * 10 + [True] * 2
    assert torch.equal(seen[11][1], x_nat) and not torch.equal(seen[10][1], x_nat)
    assert student.get_submodule("1").num_batches_tracked == 2


def test_the_attack_climbs_from_the_adversarial_label(monkeypatch):
    """p_adv and not p_nat is what the attack maximises the distance from."""
    given = []
    monkeypatch.setattr(
        absld_min, "attack", lambda c, m, soft, x, noise: given.append(soft) or x + noise
    )
    x_nat, labels, noise = batch()
    train_step(CONFIG, network("student"), frozen_teacher(), TEMPERATURE, x_nat, labels, noise)
    expected = absld_min.soften(frozen_teacher()(x_nat), labels, TEMPERATURE[0])
    assert torch.equal(given[0], expected)


def test_both_readings_agree_while_all_temperatures_are_one():
    ones, results = torch.ones(2, C, dtype=draw.DTYPE), []
    for fidelity in ("paper", "released"):
        config = Config(device="cpu", epsilon=0.1, fidelity=fidelity)
        student = network("student")
        results.append(train_step(config, student, frozen_teacher(), ones, *batch())[0].item())
    assert results[0] == results[1]


def test_teacher_is_frozen_even_if_handed_over_otherwise():
    teacher = network("teacher").train()
    before = digest(teacher.state_dict())
    train_step(CONFIG, network("student"), teacher, TEMPERATURE, *batch())[0].backward()
    assert all(weight.grad is None for weight in teacher.parameters())
    assert digest(teacher.state_dict()) == before and not teacher.training


def test_trades_is_the_formula():
    model, by_hand, (x_nat, labels, noise) = network("t"), network("t"), batch(5)
    loss, risk = trades_step(CONFIG, model, None, TEMPERATURE, x_nat, labels, noise)
    assert risk.shape == (3, C) and not risk.any()
    soft = F.softmax(by_hand.eval()(x_nat), dim=1).detach()
    x_adv = attack(CONFIG, by_hand, soft, x_nat, noise)
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


def run(tmp_path, config=CONFIG, name="student", teacher=True, step=train_step):
    model = build_model("convnet", C, config.seed, name)
    frozen = build_model("convnet", C, "teacher").eval().requires_grad_(False) if teacher else None
    path = str(tmp_path / f"{name}.pt")
    train(config, model, frozen, small_sets(), C, path, step)
    return model, torch.load(path, weights_only=True), frozen


def losses(saved):
    return [row["loss"] for row in saved["history"]]


def test_a_run_is_a_function_of_its_flags(tmp_path):
    state = torch.get_rng_state()
    first, saved, _ = run(tmp_path, name="student")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    (tmp_path / "again").mkdir()
    assert digest(run(tmp_path / "again")[0].state_dict()) == digest(first.state_dict())
    other = Config(**(saved["config"] | {"seed": 1}))
    assert digest(run(tmp_path, other)[0].state_dict()) != digest(first.state_dict())


def test_teacher_is_as_before_after_a_run(tmp_path):
    fresh = build_model("convnet", C, "teacher")
    _, _, teacher = run(tmp_path)
    assert digest(teacher.state_dict()) == digest(fresh.state_dict())


def test_what_is_saved(tmp_path):
    model, saved, _ = run(tmp_path)
    assert saved["sha256"] == digest(saved["model"]) == digest(model.state_dict())
    assert saved["config"]["epochs"] == len(saved["history"]) == 4
    for number, row in enumerate(saved["history"], 1):
        assert row["epoch"] == number and row["seconds"] > 0 and math.isfinite(row["loss"])
        temperature = row["temperature"]
        assert temperature.shape == (2, C)
        assert (temperature >= 0.5).all() and (temperature <= 5).all()
        for accuracy in (row["clean"], row["robust"]):
            assert accuracy.min() >= 0 and accuracy.max() <= 1
    kept = saved["history"][saved["epoch"] - 1]
    assert torch.equal(saved["temperature"], kept["temperature"])
    assert saved["score"] == kept["score"] == max(row["score"] for row in saved["history"])
    assert list(tmp_path.iterdir()) == [tmp_path / "student.pt"]  # no temporary file stays


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """Of the highest average + worst robust accuracy, not the last, not the first of a tie's end."""
    robust = iter([[0.5, 0.4, 0.3], [0.6, 0.6, 0.6], [1.0, 1.0, 0.0], [0.6, 0.6, 0.6]])
    states = []

    def evaluate(model, images, labels, epsilon):
        states.append(digest(model.state_dict()))
        return torch.tensor([[1.0, 1.0, 1.0], next(robust)])

    monkeypatch.setattr(absld_min, "evaluate", evaluate)
    model, saved, _ = run(tmp_path)
    assert digest(model.state_dict()) == saved["sha256"] == states[1]
    assert saved["epoch"] == 2


def test_temperatures_move_once_an_epoch_by_the_mean_risk(tmp_path, monkeypatch):
    seen, moves = [], []

    def step(config, model, teacher, temperature, *batch):
        seen.append(temperature.clone())
        loss, _ = train_step(config, model, teacher, temperature, *batch)
        # Class 0 has 4 images of risk 1, class 1 has 1 of risk 3, class 2 none, in each batch.
        return loss, torch.tensor([[4.0, 3.0, 0.0], [4.0, 3.0, 0.0], [4.0, 1.0, 0.0]])

    def update(temperature, risk, **settings):
        moves.append((risk, settings))
        return temperature + 0.01

    monkeypatch.setattr(absld_min, "update_temperature", update)
    run(tmp_path, step=step)
    assert [t[0, 0].item() for t in seen] == pytest.approx(
        [1.0] * 3 + [1.01] * 3 + [1.02] * 3 + [1.03] * 3
    )
    assert len(moves) == 8  # adversarial and natural, four epochs
    for risk, settings in moves:
        assert risk[:2].tolist() == [1.0, 3.0] and risk[2].isnan()
        assert settings["lower"] == 0.5 and settings["upper"] == 5.0


def schedule(epochs, tmp_path, monkeypatch):
    """The learning rate and the temperature rate of every epoch."""
    rates = []
    monkeypatch.setattr(
        absld_min, "update_temperature", lambda t, r, rate, **_: rates.append(rate) or t
    )
    monkeypatch.setattr(absld_min, "evaluate", lambda *_: torch.ones(2, C))
    config = Config(device="cpu", epochs=epochs, batch_size=8, max_steps=1)

    def step(config, model, teacher, temperature, *batch):
        return sum(p.sum() for p in model.parameters()) * 0, torch.ones(3, C)

    _, saved, _ = run(tmp_path, config, step=step)
    return [row["lr"] for row in saved["history"]], rates[::2]


def test_schedule_of_the_paper(tmp_path, monkeypatch):
    expected = [1.0] * 215 + [0.1] * 45 + [0.01] * 25 + [0.001] * 15  # of epochs 1 to 300
    learning, temperature = schedule(300, tmp_path, monkeypatch)
    assert learning == pytest.approx([0.1 * decay for decay in expected])
    # The rate decays together with it, so before the update that ends epochs 215, 260 and 285.
    assert temperature == pytest.approx([0.1 * decay for decay in [*expected[1:], 0.001]])


def test_a_shorter_run_keeps_the_shape(tmp_path, monkeypatch):
    learning, _ = schedule(20, tmp_path, monkeypatch)
    assert learning == pytest.approx([0.1] * 14 + [0.01] * 3 + [0.001] * 2 + [0.0001])
    assert schedule(1, tmp_path, monkeypatch)[0] == [0.1]


def test_optimiser_is_that_of_the_release(tmp_path, monkeypatch):
    made, sgd = [], torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, **kw: made.append(kw) or sgd(*a, **kw))
    run(tmp_path)
    assert made == [{"momentum": 0.9, "weight_decay": 2e-4}]


def test_rate_zero_is_rslad(tmp_path, monkeypatch):
    """All temperatures stay 1, and soft labels are a plain softmax: the same weights."""
    config = Config(device="cpu", epochs=2, batch_size=8, epsilon=0.1, temperature_rate=0.0)
    first, saved, _ = run(tmp_path, config)
    assert all((row["temperature"] == 1).all() for row in saved["history"])
    assert losses(run(tmp_path, Config(**(vars(config) | {"temperature_rate": 0.1})))[1]) != losses(
        saved
    )
    monkeypatch.setattr(absld_min, "soften", lambda logits, *_: F.softmax(logits, dim=1))
    again, saved_again, _ = run(tmp_path, config)
    assert losses(saved_again) == losses(saved)
    assert digest(again.state_dict()) == digest(first.state_dict())


def test_readings_part_once_temperatures_have_moved(tmp_path):
    released = Config(**(vars(CONFIG) | {"fidelity": "released"}))
    first, second = losses(run(tmp_path)[1]), losses(run(tmp_path, released)[1])
    assert first[0] == second[0] and first[1] != second[1]


def test_a_teacher_is_trained_with_temperatures_at_rest(tmp_path):
    _, saved, _ = run(tmp_path, name="teacher", teacher=False, step=trades_step)
    assert len(saved["history"]) == CONFIG.teacher_epochs
    assert all((row["temperature"] == 1).all() for row in saved["history"])


def test_nan_stops_before_the_optimiser_step(tmp_path):
    """Weights as after the last good step; the best epoch so far stays; where and what is said."""
    steps, models = [], []

    def step(config, model, teacher, temperature, *batch):
        steps.append(digest(model.state_dict()))
        models.append(model)
        loss, risk = train_step(config, model, teacher, temperature, *batch)
        return loss * (float("nan") if len(steps) == 5 else 1), risk

    with pytest.raises(FloatingPointError, match=r"(?s)epoch=2 step=1 loss=.*nan.*risk=.*temp"):
        run(tmp_path, step=step)
    trained = {n: p for n, p in models[0].state_dict().items()}
    assert all(p.isfinite().all() for p in trained.values())
    best = torch.load(tmp_path / "student.pt.best", weights_only=True)
    assert len(best["history"]) == 1 and not (tmp_path / "student.pt").exists()


@pytest.mark.parametrize("classes", [2, 100])
def test_two_and_a_hundred_classes(classes, tmp_path):
    images = (draw.images(0, n=4 * classes) * 255).to(torch.uint8)
    labels = torch.arange(4 * classes) % classes
    config = Config(device="cpu", epochs=1, batch_size=classes)
    model, teacher = (build_model("convnet", classes, role) for role in ("student", "teacher"))
    path = str(tmp_path / "student.pt")
    sets = [(images, labels), (images[:classes], labels[:classes])]
    train(config, model, teacher.eval().requires_grad_(False), sets, classes, path)
    assert torch.load(path, weights_only=True)["temperature"].shape == (2, classes)


def test_a_failing_save_leaves_the_file_that_was(tmp_path, monkeypatch):
    run(tmp_path)
    before = (tmp_path / "student.pt").read_bytes()

    def save(content, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["student.pt"]
    assert (tmp_path / "student.pt").read_bytes() == before


def test_batch_norm_of_a_student_in_another_mode_is_set(tmp_path):
    student = network("student").eval()
    train_step(CONFIG, student, frozen_teacher(), TEMPERATURE, *batch())
    assert all(m.training for m in student.modules() if isinstance(m, nn.BatchNorm2d))
