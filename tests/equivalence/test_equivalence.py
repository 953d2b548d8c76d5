"""The single file against the package, in stages: the first that fails says where they part.

Everything is compared bit for bit; what is not says why.
"""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import strategies as draw
from helpers.image_files import make_cifar
from helpers.implementations import evaluate, image_set, project, training_attack
from helpers.tolerance import assert_close
from hypothesis import given
from hypothesis import strategies as st

import absld
import absld.cli.app
import absld.data.dataset
import absld.temperature
import absld_min
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.data.augmentation import Batch, Views
from absld.methods import build_method
from absld.seeding import generator
from absld.stepper import train_step

ROOT = Path(absld_min.__file__).parent
C = 3
EPSILON = 0.1


def of_the_single_file(**settings):
    """Its settings, with those of the data set."""
    recipe = absld_min.DIGITS if settings.get("dataset", "digits") == "digits" else {}
    return absld_min.Config(**{"device": "cpu"} | recipe | settings)


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
def test_soft_labels_and_losses_are_equal(case, other, weight, scale):
    soft = absld.soften(*case)
    equal(soft, absld_min.soften(*case))
    adv, nat = case[0] / 2, case[0] - 3
    equal(absld.soft_label_kl(adv, soft), absld_min.soft_label_kl(adv, soft))
    given = adv, nat, soft, soft.flip(0)
    equal(absld.absld_loss(*given), absld_min.absld_loss(*given))
    settings = {"adv_weight": weight, "kl_scale": scale}
    equal(absld.absld_loss(*given, **settings), absld_min.absld_loss(*given, **settings))


@given(draw.labelled())
def test_class_risks_are_equal(case):
    logits, labels, temperature = case
    ours = absld.class_risk_sums(logits, labels, len(temperature))
    theirs = absld_min.class_risk_sums(logits, labels, len(temperature))
    equal(ours[0], theirs[0])
    equal(ours[1], theirs[1])


some_risk = st.floats(0, 100) | st.sampled_from([0.1, float("nan"), float("inf")])


@given(st.lists(st.tuples(some_risk, draw.temperatures), min_size=1, max_size=8), st.floats(0, 2))
def test_temperature_updates_are_equal(pairs, rate):
    risk, old = torch.tensor(pairs, dtype=draw.DTYPE).unbind(1)
    settings = {"rate": rate, "lower": 0.5, "upper": 5.0}
    equal(
        absld.update_temperature(old, risk, **settings),
        absld_min.update_temperature(old, risk, **settings),
    )


@given(
    st.lists(st.tuples(draw.on_a_grid(-2, 3), draw.on_a_grid(-1, 2)), min_size=1), st.floats(0, 1)
)
def test_projections_are_equal(pixels, epsilon):
    x_adv, x_nat = torch.tensor(pixels, dtype=draw.DTYPE).unbind(1)
    equal(project(absld, x_adv, x_nat, epsilon), project(absld_min, x_adv, x_nat, epsilon))


@given(draw.vectors(0, 1), st.sampled_from([0, 1]), st.booleans())
def test_fairness_is_equal(accuracy, ddof, absent):
    if absent:
        accuracy = torch.cat([accuracy, torch.tensor([float("nan")], dtype=accuracy.dtype)])
    assert tuple(absld.fairness(accuracy, ddof)) == absld_min.fairness(accuracy, ddof)


@given(st.integers(1, 400))
def test_milestones_are_equal(epochs):
    """By the line of the single file's loop."""
    (line,) = re.findall(r"milestones = (\[.*\])", (ROOT / "absld_min.py").read_text())
    found = eval(line, {"config": of_the_single_file(epochs=epochs)})
    assert TrainConfig(epochs=epochs).milestone_epochs() == found


# --- Stage 2: what enters a training ---


@given(keys)
def test_generators_are_equal(key):
    ours, theirs = generator(*key), absld_min.generator(*key)
    assert torch.equal(ours.get_state(), theirs.get_state())


@pytest.mark.parametrize(("name", "side"), [("convnet", 8), ("resnet18", 32), ("wrn-34-10", 8)])
def test_networks_are_equal(name, side):
    """Initial weights, their names, and what is computed from them, in either mode."""
    ours, theirs = (module.build_model(name, 4, 7, "student") for module in (absld, absld_min))
    equal_states(ours, theirs)
    x = draw.images(0, n=2, side=side, dtype=torch.float32)
    with torch.no_grad():
        for mode in (True, False):
            equal(ours.train(mode)(x), theirs.train(mode)(x))
    equal_states(ours, theirs)  # the buffers


@given(draw.seeds, st.sampled_from(["digits", "cifar10"]), st.integers(1, 9), keys)
def test_batches_are_equal(seed, dataset, batch_size, key):
    images = (draw.images(seed, n=9, side=6) * 255).to(torch.uint8)
    labels = torch.arange(9) % C
    config = of_the_single_file(dataset=dataset, batch_size=batch_size)
    theirs = list(absld_min.batches(config, images, labels, *key))
    settings = resolve({"dataset": dataset, "batch_size": batch_size})

    def ours(first_step=0):
        return list(
            absld.data.augmentation.batches(
                Views(image_set(images, labels), settings.padding),
                *key,
                batch_size=batch_size,
                flip=settings.flip,
                radius=settings.start_noise,
                steps=absld.data.augmentation.steps_per_epoch(
                    len(images), batch_size, settings.max_steps
                ),
                first_step=first_step,
            )
        )

    whole = ours()
    assert len(whole) == len(theirs) == 9 // batch_size
    for one, other in zip(whole, theirs, strict=True):
        for mine, tensor in zip(one[:3], other, strict=True):  # the file has no numbers of views
            equal(mine, tensor)
    # An epoch that is taken up later has the same batches.
    for one, other in zip(ours(first_step=1), theirs[1:], strict=True):
        assert all(torch.equal(*pair) for pair in zip(one[:3], other, strict=True))


def test_digits_are_equal():
    config = absld_min.Config(device="cpu")
    theirs, classes = absld_min.load_data(config)
    ours = absld.load_data("digits", "nowhere")
    assert list(ours.train.classes) == classes
    for mine, (images, labels) in zip(ours, theirs, strict=True):
        equal(mine.images, images)
        equal(mine.labels, labels)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_cifar_images_are_equal(dataset, tmp_path, monkeypatch):
    """Images of noise, so that no two pixels may change places."""
    make_cifar(tmp_path, dataset, monkeypatch, train=20, test=1)
    theirs, classes = absld_min.load_data(of_the_single_file(dataset=dataset, data=str(tmp_path)))
    ours = absld.load_data(dataset, str(tmp_path))
    assert ours.train.classes == tuple(classes)
    for mine, (images, labels) in zip(ours, theirs, strict=True):
        equal(mine.images, images)
        equal(mine.labels, labels)


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_settings_and_their_defaults_are_equal(dataset):
    """The settings of the single file are settings of the package, with the same defaults; the
    engine chooses the precision, the file's on CUDA."""
    ours = vars(resolve({"dataset": dataset, "device": "cpu"}))
    theirs = vars(of_the_single_file(dataset=dataset)) | {"precision": None}
    assert {name: ours[name] for name in theirs} == theirs


# --- Stage 3: an attack ---


def network(*key, dtype=draw.DTYPE):
    return absld_min.build_model("convnet", C, "test", *key).to(dtype)


@both_dtypes
@given(draw.seeds)
def test_attacks_are_equal(dtype, seed):
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
def test_attacks_on_any_number_of_images_are_equal(seed, n):
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

    def __init__(self, dtype, method="absld", fidelity="paper"):
        self.dtype, self.method_name = dtype, method
        self.config = of_the_single_file(epsilon=EPSILON, fidelity=fidelity)
        settings = {"method": method, "fidelity": fidelity}
        self.method = build_method(TrainConfig(epsilon=EPSILON, **settings), C)
        self.ours, self.theirs = network("student", dtype=dtype), network("student", dtype=dtype)
        self.optimizers = sgd(self.ours), sgd(self.theirs)
        self.teacher = network("teacher", dtype=dtype).eval().requires_grad_(False)
        self.temperature = torch.tensor([[0.6, 1.5, 3.0], [2.0, 0.9, 0.7]], dtype=dtype)
        self.risks, self.counts = torch.zeros(2, C, dtype=dtype), torch.zeros(C)

    def __call__(self, seed):
        given = batch(seed, self.dtype)
        attack = absld.TrainingAttack(EPSILON, EPSILON / 4, 10)
        ours, theirs = self.optimizers
        losses = train_step(self.method, self.ours, self.teacher, given, attack, ours)
        if self.method_name == "trades":
            loss = absld_min.trades_step(self.config, self.theirs, given[:3])
        else:
            loss, risks, counts = absld_min.absld_step(
                self.config, self.theirs, self.teacher, self.temperature, given[:3]
            )
            self.risks, self.counts = self.risks + risks, self.counts + counts
        theirs.zero_grad()
        loss.backward()
        theirs.step()
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
def test_steps_of_absld_are_equal(fidelity, dtype):
    steps = Steps(dtype, fidelity=fidelity)
    held = absld.ClassTemperature(C, fidelity=fidelity, dtype=dtype)
    held.adv, held.nat = steps.temperature.clone()
    steps.method.temperature = held
    for seed in range(3):
        steps(seed)
        equal(held.adv_risk.sums, steps.risks[0])
        equal(held.nat_risk.sums, steps.risks[1])
        assert torch.equal(held.adv_risk.counts, steps.counts)
        assert torch.equal(held.nat_risk.counts, steps.counts)
    held.step()
    risk, old = steps.risks / steps.counts, steps.temperature
    moved = absld_min.update_temperature(old, risk, rate=0.1, lower=0.5, upper=5.0)
    equal(torch.stack([held.adv, held.nat]), moved)
    assert (moved != old).any(dim=1).all()


@both_dtypes
def test_steps_of_trades_are_equal(dtype):
    steps = Steps(dtype, method="trades")
    for seed in range(3):
        steps(seed)


# --- Stage 5: evaluation ---


@given(draw.seeds, st.floats(0, 0.2))
def test_evaluations_are_equal(seed, epsilon):
    images = (draw.images(seed, n=12) * 255).to(torch.uint8)
    labels = torch.arange(12) % C
    model = network(seed, dtype=torch.float32).eval()
    for ours, theirs in zip(
        evaluate(absld, model, images, labels, epsilon),
        evaluate(absld_min, model, images, labels, epsilon),
        strict=True,
    ):
        equal(ours, theirs)


def test_evaluations_with_a_short_last_batch_are_equal():
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
    return [(images[:24], labels[:24]), (images[24:], labels[24:]), ()]


EPOCHS = 8  # the fewest with three milestones: after epochs 6, 7 and 8


class SingleFile:
    """A training by the single file, and what there was to see in each epoch."""

    def __init__(self, tmp_path, monkeypatch, network="convnet", method="absld", **settings):
        self.accuracies, self.weights, self.temperatures, self.losses = [], [], [], []
        self.learning_rates = []
        given = {"epochs": EPOCHS, "teacher_epochs": EPOCHS, "batch_size": 8, "epsilon": EPSILON}
        config = of_the_single_file(**given | {"out": str(tmp_path)} | settings)
        self.model = absld_min.build_model(network, C, config.seed, role_of(method))
        self.teacher = frozen_teacher() if method == "absld" else None
        with monkeypatch.context() as patch:
            for name in ("evaluate", "update_temperature", "absld_step", "trades_step"):
                patch.setattr(absld_min, name, getattr(self, name)(getattr(absld_min, name)))
            patch.setattr(torch.optim, "SGD", self.optimizer(torch.optim.SGD))
            absld_min.train(config, self.model, self.teacher, small_sets())
        self.saved = torch.load(tmp_path / f"{role_of(method)}.pt", weights_only=True)

    def evaluate(self, original):
        def evaluate(config, model, *data):
            self.weights.append(absld.digest(model.state_dict()))
            self.accuracies.append(original(config, model, *data))
            return self.accuracies[-1]

        return evaluate

    def update_temperature(self, original):
        def update(*given, **settings):
            self.temperatures.append(original(*given, **settings))
            return self.temperatures[-1]

        return update

    def absld_step(self, original):
        def step(*given):
            loss, *risks = original(*given)
            self.losses.append(loss.item())
            return loss, *risks

        return step

    def trades_step(self, original):
        def step(*given):
            loss = original(*given)
            self.losses.append(loss.item())
            return loss

        return step

    def optimizer(self, original):
        rates = self.learning_rates

        class Noted(original):
            def step(self):
                rates.append(self.param_groups[0]["lr"])
                super().step()

        return Noted


def role_of(method):
    return "teacher" if method == "trades" else "student"


def frozen_teacher():
    return absld_min.build_model("convnet", C, "teacher").eval().requires_grad_(False)


def package(network="convnet", method="absld", **settings):
    """Model, reports, and the digest of the weights after each epoch, as reported."""
    config = resolve({"epochs": EPOCHS, "batch_size": 8, "epsilon": EPSILON} | settings)
    config = replace(config.training(), method=method)  # without its recipe: the file has none
    model = absld.build_model(network, C, config.seed, role_of(method))
    train, validation = (image_set(*part) for part in small_sets()[:2])
    teacher = None if method == "trades" else frozen_teacher()
    reports, digests = [], []
    for report in absld.fit(model, teacher, train, validation, config, role=role_of(method)):
        reports.append(report)
        digests.append(absld.digest(model.state_dict()))
    return model, reports, digests


TRAJECTORIES = [
    {"method": "absld"},
    {"method": "absld", "fidelity": "released", "seed": 3},
    {"method": "absld", "temperature_rate": 1.5, "dataset": "cifar10"},
    {"method": "trades"},
]


@pytest.mark.parametrize("settings", TRAJECTORIES, ids=["paper", "released", "views", "trades"])
def test_trajectories_are_equal(settings, tmp_path, monkeypatch):
    """Epoch by epoch: rates, losses, temperatures, accuracies, weights; then the best weights."""
    theirs = SingleFile(tmp_path, monkeypatch, **settings)
    ours, reports, weights = package(**settings)
    assert len(reports) == len(theirs.accuracies) == EPOCHS
    for number, report in enumerate(reports):
        steps = slice(3 * number, 3 * number + 3)
        assert set(theirs.learning_rates[steps]) == {report.learning_rate}
        # A sum of a few floats, which from Python 3.12 on `sum` takes more exactly than a loop.
        mean = sum(theirs.losses[steps]) / 3
        assert_close(report.loss, mean, scale=mean, terms=4)
        equal(torch.stack([*report.accuracies]), theirs.accuracies[number])
        assert weights[number] == theirs.weights[number], f"weights after epoch {number + 1}"
        if settings["method"] == "absld":
            equal(report.per_class["temperature_adv"], theirs.temperatures[number][0])
            equal(report.per_class["temperature_nat"], theirs.temperatures[number][1])
    if settings["method"] == "absld":
        assert (theirs.temperatures[-1] != 1).any() and len(set(weights)) == EPOCHS
    best = max(report.epoch for report in reports if report.is_best)
    equal_states(ours, theirs.model)
    assert absld.digest(ours.state_dict()) == absld.digest(theirs.saved) == weights[best - 1]


def test_rate_zero_and_plain_softmax_are_rslad(tmp_path, monkeypatch):
    """Rate 0 in both, the method of that name, and labels by a plain softmax: one student."""
    saved = SingleFile(tmp_path, monkeypatch, temperature_rate=0.0, epochs=3).saved
    by_rate, by_name = package(temperature_rate=0.0, epochs=3), package(method="rslad", epochs=3)
    for _, reports, _ in (by_rate, by_name):
        for report in reports:
            assert (report.per_class["temperature_adv"] == 1).all()
            assert (report.per_class["temperature_nat"] == 1).all()
    moved = package(epochs=3)
    monkeypatch.setattr(absld.temperature, "soften", lambda logits, *_: F.softmax(logits, dim=1))
    plain = package(epochs=3)
    weights = [digests for _, _, digests in (by_rate, by_name, plain)]
    assert weights[0] == weights[1] == weights[2] != moved[2]
    for model, _, _ in (by_rate, by_name, plain):
        assert absld.digest(model.state_dict()) == absld.digest(saved)


# --- Stage 7: the certificate ---


def states_of(program, flags, out, environment):
    """The state dicts of teacher and student after a run from the command line."""
    child = subprocess.run(
        [sys.executable, *program, *flags, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr
    if program == FILE:
        paths = [out / "teacher.pt", out / "student.pt"]
        return [torch.load(path, weights_only=True) for path in paths]
    paths = [next(out.glob(f"*-{kind}-*/best.pt")) for kind in ("teacher", "absld")]
    return [torch.load(path, weights_only=True)["model"] for path in paths]


FILE, PACKAGE = ["absld_min.py"], ["-m", "absld", "train"]


def certify(flags, tmp_path, environment):
    """Both programs end with the same state dicts of teacher and student, bit for bit."""
    theirs = states_of(FILE, flags, tmp_path / "file", environment)
    ours = states_of(PACKAGE, flags, tmp_path / "package", environment)
    for mine, other in zip(ours, theirs, strict=True):
        assert sorted(mine) == sorted(other)
        for name, tensor in mine.items():
            equal(tensor, other[name])
    assert any(not torch.equal(theirs[0][name], theirs[1][name]) for name in theirs[0])


def test_certificate(tmp_path, single_thread):
    """From the command line, data and teacher included; three epochs of the digits."""
    certify(["--epochs", "3", "--teacher-epochs", "3", "--device", "cpu"], tmp_path, single_thread)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fidelity", "teacher"), [("paper", []), ("released", ["--teacher-epochs", "3"])]
)
def test_certificate_of_the_whole_default_run(fidelity, teacher, tmp_path, single_thread):
    """The reading changes nothing of the teacher, which is certified whole once."""
    certify(["--device", "cpu", "--fidelity", fidelity, *teacher], tmp_path, single_thread)


@pytest.mark.slow
def test_certificate_on_cifar_with_the_networks_of_the_paper(
    tmp_path, monkeypatch, settings_of_torch
):
    """From CIFAR-10's archive, with its default networks and a teacher from a file: an epoch."""
    make_cifar(tmp_path, "cifar10", monkeypatch, train=4, test=1)
    teacher = str(tmp_path / "teacher.pt")
    torch.save(absld_min.build_model("wrn-34-10", 10, "some").state_dict(), teacher)
    flags = ["--dataset", "cifar10", "--data", str(tmp_path), "--teacher", teacher]
    flags += ["--epochs", "1", "--batch-size", "64", "--device", "cpu", "--out", str(tmp_path)]
    absld_min.main(flags)
    monkeypatch.setattr("sys.argv", ["absld", "train", *flags, "--allow-weak-teacher"])
    with pytest.raises(SystemExit) as end:
        absld.cli.app.main()
    assert not end.value.code
    theirs = torch.load(tmp_path / "student.pt", weights_only=True)
    (best,) = tmp_path.glob("cifar10-absld-*/best.pt")
    ours = torch.load(best, weights_only=True)["model"]
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        equal(tensor, theirs[name])


@pytest.mark.slow
def test_certificate_of_the_networks_of_the_paper(tmp_path):
    """A ResNet-18 and its teacher, a WideResNet-34-10 trained by TRADES: four steps of each, on
    small images; the student by both readings."""
    images = (draw.images(3, n=24) * 255).to(torch.uint8)
    labels = torch.arange(24) % C
    data = [(images[:16], labels[:16]), (images[16:], labels[16:]), ()]
    settings = {"dataset": "cifar10", "epochs": 2, "teacher_epochs": 2, "batch_size": 8}
    settings |= {"device": "cpu"}
    config, whole = of_the_single_file(**settings, out=str(tmp_path)), resolve(settings)
    sets = [image_set(*part) for part in data[:2]]
    theirs, ours = (m.build_model("wrn-34-10", C, 0, "teacher") for m in (absld_min, absld))
    absld_min.train(config, theirs, None, data)
    theirs.eval().requires_grad_(False)
    list(absld.fit(ours, None, *sets, whole.teacher_training(), role="teacher"))
    equal_states(ours, theirs)
    for fidelity in ("paper", "released"):
        students = [m.build_model("resnet18", C, 0, "student") for m in (absld_min, absld)]
        absld_min.train(replace(config, fidelity=fidelity), students[0], theirs, data)
        list(absld.fit(students[1], ours, *sets, replace(whole.training(), fidelity=fidelity)))
        equal_states(*reversed(students))
