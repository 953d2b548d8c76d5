"""The single file against the package, in stages: the first that fails says where they part.

Everything is compared bit for bit; what is not says why.
"""

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import strategies as draw
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from implementations import evaluate, image_set, training_attack
from tolerance import assert_close

import absld
import absld.data
import absld.temperature
import absld_min
from absld.config import TrainConfig, resolve
from absld.data import Batch, Views
from absld.methods import build_method
from absld.seeding import generator
from absld.trainer import train_step

ROOT = Path(absld_min.__file__).parent
C = 3
EPSILON = 0.1
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
readings = pytest.mark.parametrize("fidelity", ["paper", "released"])
keys = st.lists(st.integers(0, 2**40) | st.text(max_size=5), max_size=3)


def equal(ours, theirs):
    """Bit for bit, NaN included, and of one type."""
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def equal_states(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# --- Stage 1: pure functions ---


@given(draw.labelled(), draw.labelled(), st.floats(0, 1), st.floats(0.1, 10))
def test_soft_labels_and_loss(case, other, weight, scale):
    soft = absld.soften(*case)
    equal(soft, absld_min.soften(*case))
    adv, nat = case[0] / 2, case[0] - 3
    equal(absld.soft_label_kl(adv, soft), absld_min.soft_label_kl(adv, soft))
    given = adv, nat, soft, soft.flip(0)
    equal(absld.absld_loss(*given), absld_min.absld_loss(*given))
    settings = {"adv_weight": weight, "kl_scale": scale}
    equal(absld.absld_loss(*given, **settings), absld_min.absld_loss(*given, **settings))


@given(draw.labelled())
def test_class_risks(case):
    logits, labels, temperature = case
    ours = absld.class_risk_sums(logits, labels, len(temperature))
    theirs = absld_min.class_risk_sums(logits, labels, len(temperature))
    equal(ours[0], theirs[0])
    equal(ours[1], theirs[1])


some_risk = st.floats(0, 100) | st.sampled_from([0.1, float("nan"), float("inf")])


@given(st.lists(st.tuples(some_risk, draw.temperatures), min_size=1, max_size=8), st.floats(0, 2))
def test_temperatures(pairs, rate):
    risk, old = torch.tensor(pairs, dtype=draw.DTYPE).unbind(1)
    settings = {"rate": rate, "lower": 0.5, "upper": 5.0}
    equal(
        absld.update_temperature(old, risk, **settings),
        absld_min.update_temperature(old, risk, **settings),
    )


@given(st.lists(st.tuples(st.floats(-2, 3), st.floats(-1, 2)), min_size=1), st.floats(0, 1))
def test_projection(pixels, epsilon):
    x_adv, x_nat = torch.tensor(pixels, dtype=draw.DTYPE).unbind(1)
    equal(absld.project_linf(x_adv, x_nat, epsilon), absld_min.project_linf(x_adv, x_nat, epsilon))


@given(draw.vectors(0, 1), st.sampled_from([0, 1]), st.booleans())
def test_fairness(accuracy, ddof, absent):
    if absent:
        accuracy = torch.cat([accuracy, torch.tensor([float("nan")], dtype=accuracy.dtype)])
    assert tuple(absld.fairness(accuracy, ddof)) == absld_min.fairness(accuracy, ddof)


@given(draw.seeds)
def test_digests(seed):
    state = absld.build_model("convnet", 2, seed).state_dict()
    assert absld.digest(state) == absld_min.digest(state)


@given(st.integers(1, 400))
def test_milestones(epochs):
    """Those of the single file are inside its loop; this is its line."""
    of_the_single_file = [round(m / 300 * epochs) for m in (215, 260, 285)]
    assert TrainConfig(epochs=epochs).milestone_epochs() == of_the_single_file


# --- Stage 2: what enters a training ---


@given(keys)
def test_generators(key):
    ours, theirs = generator(*key), absld_min.generator("cpu", *key)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize(("name", "side"), [("convnet", 8), ("resnet18", 32), ("wrn-34-10", 8)])
def test_networks(name, side):
    """Initial weights, their names, and what is computed from them, in either mode."""
    ours, theirs = (module.build_model(name, 4, 7, "student") for module in (absld, absld_min))
    equal_states(ours, theirs)
    x = draw.images(0, n=2, side=side, dtype=torch.float32)
    with torch.no_grad():
        for mode in (True, False):
            equal(ours.train(mode)(x), theirs.train(mode)(x))
    equal_states(ours, theirs)  # the buffers


@given(draw.seeds, st.sampled_from(["digits", "cifar10"]), st.integers(1, 9), keys)
def test_batches(seed, dataset, batch_size, key):
    images = (draw.images(seed, n=9, side=6) * 255).to(torch.uint8)
    labels = torch.arange(9) % C
    config = absld_min.Config(device="cpu", dataset=dataset, batch_size=batch_size)
    theirs = list(absld_min.batches(config, images, labels, *key))
    settings = resolve({"dataset": dataset, "batch_size": batch_size})

    def ours(first_step=0):
        return list(
            absld.data.batches(
                Views(image_set(images, labels), settings.padding),
                *key,
                batch_size=batch_size,
                flip=settings.flip,
                radius=settings.start_noise,
                steps=absld.data.steps_per_epoch(len(images), batch_size, settings.max_steps),
                first_step=first_step,
            )
        )

    whole = ours()
    assert len(whole) == len(theirs) == 9 // batch_size
    for one, other in zip(whole, theirs, strict=True):
        for mine, tensor in zip(one, other, strict=True):
            equal(mine, tensor)
    # An epoch that is taken up later has the same batches.
    for one, other in zip(ours(first_step=1), theirs[1:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_digits():
    config = absld_min.Config(device="cpu")
    theirs, classes = absld_min.load_data(config)
    ours = absld.load_data("digits", "nowhere")
    assert list(ours.train.classes) == classes
    for mine, (images, labels) in zip(ours, theirs, strict=True):
        equal(mine.images, images)
        equal(mine.labels, labels)


def test_a_folder_of_images(tmp_path):
    from PIL import Image

    for part, count in (("train", 9), ("test", 2)):
        for number, kind in enumerate(("cat", "dog")):
            (tmp_path / part / kind).mkdir(parents=True)
            for i in range(count):
                colour = (17 * i, 100 * number, 255 - 9 * i)
                image = Image.linear_gradient("L").resize((40, 30 + i)).convert("RGB")
                image.paste(colour, (0, 0, 20, 15))
                image.save(tmp_path / part / kind / f"{i}.png")
    config = absld_min.Config(device="cpu", dataset="folder", data=str(tmp_path), batch_size=4)
    theirs, classes = absld_min.load_data(config)
    ours = absld.load_data("folder", str(tmp_path))
    assert list(ours.train.classes) == classes == ["cat", "dog"]
    for mine, (images, labels) in zip(ours, theirs, strict=True):
        equal(mine.images, images)
        equal(mine.labels, labels)


def test_cifar(monkeypatch):
    """Images of noise, so that no two pixels may change places. The archive is torchvision's."""
    import numpy
    from PIL import Image
    from torchvision import datasets

    class Archive:
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            random = numpy.random.default_rng(int(train))
            self.targets = [0, 1] * 10
            self.data = random.integers(0, 256, (20, 32, 32, 3), dtype=numpy.uint8)

        def __getitem__(self, index):
            return Image.fromarray(self.data[index]), self.targets[index]

    monkeypatch.setattr(datasets, "CIFAR10", Archive)
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: None)
    config = absld_min.Config(device="cpu", dataset="cifar10", batch_size=4)
    theirs, classes = absld_min.load_data(config)
    ours = absld.load_data("cifar10", "nowhere")
    assert ours.train.classes == classes == ("cat", "dog")
    for mine, (images, labels) in zip(ours, theirs, strict=True):
        equal(mine.images, images)
        equal(mine.labels, labels)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_settings(dataset):
    """The fields that both have, with each data set's values."""
    ours = vars(resolve({"dataset": dataset, "device": "cpu"}))
    changed = absld_min.DIGITS if dataset == "digits" else {}
    theirs = vars(absld_min.Config(**{"dataset": dataset, "device": "cpu"} | changed))
    del theirs["max_steps"]  # no limit is None here, a billion there
    assert {name: ours[name] for name in theirs} == theirs


# --- Stage 3: an attack ---


def network(*key, dtype=draw.DTYPE):
    return absld_min.build_model("convnet", C, "test", *key).to(dtype)


@both_dtypes
@given(draw.seeds)
def test_attack(dtype, seed):
    """Eight images: a division and a multiplication by a power of two take nothing away."""
    random = torch.Generator().manual_seed(seed)
    x_nat = draw.images(seed, n=8, dtype=dtype)
    soft = F.softmax(3 * torch.randn(8, C, generator=random, dtype=dtype), dim=1)
    noise = 0.001 * torch.randn(x_nat.shape, generator=random, dtype=dtype)
    given = network(seed, dtype=dtype), soft, x_nat, noise
    theirs = training_attack(absld_min, EPSILON)(*given)
    equal(training_attack(absld, EPSILON)(*given), theirs)
    assert not torch.equal(theirs, x_nat)


@given(draw.seeds, st.integers(1, 7))
def test_attack_of_any_number_of_images(seed, n):
    """Exactly equal in float64, although the single file's objective is n times a mean."""
    random = torch.Generator().manual_seed(seed)
    x_nat = draw.images(seed, n=n)
    soft = F.softmax(3 * torch.randn(n, C, generator=random, dtype=draw.DTYPE), dim=1)
    given = network(seed), soft, x_nat, 0.001 * torch.randn(x_nat.shape, generator=random).double()
    equal(training_attack(absld, EPSILON)(*given), training_attack(absld_min, EPSILON)(*given))


# --- Stage 4: a training step ---


def batch(seed, dtype, n=8):
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (n,), generator=random)
    noise = 0.001 * torch.randn(n, 3, 8, 8, generator=random, dtype=dtype)
    return Batch(draw.images(seed, n, dtype=dtype), labels, noise)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)


class Steps:
    """The same training in both implementations, step by step, from the same start."""

    def __init__(self, dtype, step, **settings):
        self.dtype, self.step_of_the_single_file = dtype, step
        self.config = absld_min.Config(
            device="cpu", epsilon=EPSILON, fidelity=settings.get("fidelity", "paper")
        )
        self.method = build_method(TrainConfig(epsilon=EPSILON, **settings), C)
        self.ours, self.theirs = network("student", dtype=dtype), network("student", dtype=dtype)
        self.optimizers = sgd(self.ours), sgd(self.theirs)
        self.teacher = network("teacher", dtype=dtype).eval().requires_grad_(False)
        self.temperature = torch.tensor([[0.6, 1.5, 3.0], [2.0, 0.9, 0.7]], dtype=dtype)
        self.risks = torch.zeros(3, C, dtype=dtype)

    def __call__(self, seed):
        given = batch(seed, self.dtype)
        attack = absld.TrainingAttack(EPSILON, EPSILON / 4, 10)
        ours, theirs = self.optimizers
        losses = train_step(self.method, self.ours, self.teacher, given, attack, ours)
        loss, risk = self.step_of_the_single_file(
            self.config, self.theirs, self.teacher, self.temperature, *given
        )
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        self.risks += risk
        assert losses["loss"] == loss
        self.compare()

    def compare(self):
        named = zip(self.ours.named_parameters(), self.theirs.parameters(), strict=True)
        for (name, mine), other in named:
            assert torch.equal(mine.grad, other.grad), f"gradient of {name}"
            momentum = [
                optimizer.state[weight]["momentum_buffer"]
                for optimizer, weight in zip(self.optimizers, (mine, other), strict=True)
            ]
            assert torch.equal(*momentum), f"momentum of {name}"
        equal_states(self.ours, self.theirs)  # weights and batch-norm buffers


@both_dtypes
@readings
def test_steps_of_absld(fidelity, dtype):
    steps = Steps(dtype, absld_min.train_step, fidelity=fidelity)
    held = absld.ClassTemperature(C, fidelity=fidelity, dtype=dtype)
    held.adv, held.nat = steps.temperature.clone()
    steps.method.temperature = held
    for seed in range(3):
        steps(seed)
        equal(held.adv_risk.sums, steps.risks[0])
        equal(held.nat_risk.sums, steps.risks[1])
        assert torch.equal(held.adv_risk.counts, steps.risks[2])
        assert torch.equal(held.nat_risk.counts, steps.risks[2])
    held.step()
    for mine, old, risk in zip((held.adv, held.nat), steps.temperature, steps.risks, strict=False):
        risk = risk / steps.risks[2]
        equal(mine, absld_min.update_temperature(old, risk, rate=0.1, lower=0.5, upper=5.0))
        assert not torch.equal(mine, old)


@both_dtypes
def test_steps_of_trades(dtype):
    steps = Steps(dtype, absld_min.trades_step, method="trades")
    for seed in range(3):
        steps(seed)
    assert not steps.risks.any()


# --- Stage 5: evaluation ---


@given(draw.seeds, st.floats(0, 0.2))
def test_evaluation(seed, epsilon):
    images = (draw.images(seed, n=12) * 255).to(torch.uint8)
    labels = torch.arange(12) % C
    model = network(seed, dtype=torch.float32).eval()
    for ours, theirs in zip(
        evaluate(absld, model, images, labels, epsilon),
        evaluate(absld_min, model, images, labels, epsilon),
        strict=True,
    ):
        equal(ours, theirs)


def test_evaluation_in_batches_of_which_the_last_is_short():
    images = (draw.images(1, n=1100, side=4) * 255).to(torch.uint8)
    labels = torch.arange(1100) % C
    model = network(dtype=torch.float32).train()  # each sets the mode for itself
    ours = evaluate(absld, model, images, labels, 0.02)
    assert model.training
    theirs = evaluate(absld_min, model, images, labels, 0.02)
    equal(torch.stack([*ours]), theirs)
    assert not torch.equal(*theirs)


# --- Stage 6: a trajectory ---


def small_sets():
    images = (draw.images(3, n=40) * 255).to(torch.uint8)
    labels = torch.arange(40) % C
    return [(images[:24], labels[:24]), (images[24:], labels[24:])]


EPOCHS = 8  # the fewest with three milestones: after epochs 6, 7 and 8


def single_file(tmp_path, monkeypatch, **settings):
    """Model, records, and the digest of the weights after each epoch, as evaluated."""
    digests, evaluate = [], absld_min.evaluate

    def note(model, *given):
        digests.append(absld_min.digest(model.state_dict()))
        return evaluate(model, *given)

    monkeypatch.setattr(absld_min, "evaluate", note)
    trades = settings.pop("method", "absld") == "trades"
    config = absld_min.Config(
        **{"device": "cpu", "epochs": EPOCHS, "teacher_epochs": EPOCHS, "batch_size": 8}
        | {"epsilon": EPSILON}
        | settings
    )
    role, path = ("teacher" if trades else "student"), str(tmp_path / "network.pt")
    model = absld_min.build_model("convnet", C, config.seed, role)
    if trades:
        absld_min.train_teacher(config, model, None, small_sets(), C, path)
    else:
        absld_min.train(config, model, frozen_teacher(), small_sets(), C, path)
    return model, torch.load(path, weights_only=True), digests


def frozen_teacher():
    return absld_min.build_model("convnet", C, "teacher").eval().requires_grad_(False)


def package(**settings):
    """Model, reports, and the digest of the weights after each epoch, as reported."""
    method = settings.pop("method", "absld")  # without its recipe, which the single file has not
    config = resolve({"epochs": EPOCHS, "batch_size": 8, "epsilon": EPSILON} | settings)
    config = replace(config.training(), method=method)
    role = "teacher" if config.method == "trades" else "student"
    model = absld.build_model("convnet", C, config.seed, role)
    train, validation = (image_set(*part) for part in small_sets())
    teacher = None if role == "teacher" else frozen_teacher()
    reports, digests = [], []
    for report in absld.fit(model, teacher, train, validation, config, role=role):
        reports.append(report)
        digests.append(absld.digest(model.state_dict()))
    return model, reports, digests


TRAJECTORIES = [
    {"method": "absld"},
    {"method": "absld", "fidelity": "released", "seed": 3},
    {"method": "absld", "temperature_rate": 1.5, "dataset": "cifar10", "max_steps": 2},
    {"method": "trades"},
]


@pytest.mark.parametrize("settings", TRAJECTORIES, ids=["paper", "released", "views", "trades"])
def test_trajectory(settings, tmp_path, monkeypatch):
    """Epoch by epoch: rates, losses, temperatures, accuracies, weights; then the best weights."""
    model, saved, weights = single_file(tmp_path, monkeypatch, **settings)
    ours, reports, our_weights = package(**settings)
    assert len(reports) == len(saved["history"]) == EPOCHS
    for report, row in zip(reports, saved["history"], strict=True):
        number = report.epoch
        assert (number, report.learning_rate) == (row["epoch"], row["lr"])
        # A sum of a few floats, which from Python 3.12 on `sum` takes more exactly than a loop.
        assert_close(report.loss, row["loss"], scale=row["loss"], terms=4)
        equal(report.accuracies.clean, row["clean"])
        equal(report.accuracies.robust, row["robust"])
        assert report.score == row["score"]
        assert our_weights[number - 1] == weights[number - 1], f"weights after epoch {number}"
        if settings["method"] == "absld":
            equal(report.per_class["temperature_adv"], row["temperature"][0])
            equal(report.per_class["temperature_nat"], row["temperature"][1])
    if settings["method"] == "absld":
        assert (saved["temperature"] != 1).any() and len(set(weights)) == EPOCHS
    best = max(report.epoch for report in reports if report.is_best)
    assert best == saved["epoch"]
    equal_states(ours, model)
    assert absld.digest(ours.state_dict()) == saved["sha256"] == weights[best - 1]


def test_four_ways_to_rslad(tmp_path, monkeypatch):
    """Rate 0 in both, the method of that name, and labels by a plain softmax: one student."""
    _, saved, _ = single_file(tmp_path, monkeypatch, temperature_rate=0.0)
    by_rate, by_name = package(temperature_rate=0.0), package(method="rslad")
    for _, reports, _ in (by_rate, by_name):
        for report in reports:
            assert (report.per_class["temperature_adv"] == 1).all()
            assert (report.per_class["temperature_nat"] == 1).all()
    moved = package()
    monkeypatch.setattr(absld.temperature, "soften", lambda logits, *_: F.softmax(logits, dim=1))
    plain = package()
    weights = [digests for _, _, digests in (by_rate, by_name, plain)]
    assert weights[0] == weights[1] == weights[2] != moved[2]
    for model, _, _ in (by_rate, by_name, plain):
        assert absld.digest(model.state_dict()) == saved["sha256"]


# --- Stage 7: the certificate ---


def test_certificate(tmp_path, single_thread):
    """From the command line, data and teacher included: the same digests."""
    flags = [
        "--dataset",
        "digits",
        "--epochs",
        "3",
        "--teacher-epochs",
        "3",
        "--seed",
        "0",
        "--device",
        "cpu",
        "--out",
    ]
    outputs = []
    for program in (["absld_min.py"], ["-m", "absld", "train"]):
        child = subprocess.run(
            [sys.executable, *program, *flags, str(tmp_path / program[-1])],
            cwd=ROOT,
            env=single_thread,
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        outputs.append(child.stdout.splitlines())
    ours, theirs = ([line for line in out if " sha256: " in line] for out in outputs)
    assert [line.split(":")[0] for line in ours] == ["teacher sha256", "student sha256"]
    assert ours == theirs
    assert all(len(line.split()[-1]) == 64 for line in ours) and ours[0] != ours[1]
