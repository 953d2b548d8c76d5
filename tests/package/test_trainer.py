"""`fit`: its reports, what it leaves unchanged, and that a resumed run ends as an uninterrupted one."""

import inspect
import json
import multiprocessing
import os
import random
import signal
import threading
import time
import warnings
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.processes import processes
from helpers.small_training import (
    CONFIG,
    TRAIN,
    VALIDATION,
    C,
    OnStep,
    bytes_of,
    image_set,
    network,
    train,
)
from helpers.weight_files import same
from torch import nn

import absld
from absld import trainer
from absld.attack import TrainingAttack
from absld.config.settings import Config
from absld.data.augmentation import Views, batches
from absld.data.dataset import InMemoryImages, Splits
from absld.engine.distributed import SINGLE_PROCESS
from absld.engine.logit_cache import LogitCacheSettings
from absld.engine.precision import float32_precision, legacy_settings, with_precision
from absld.errors import (
    CheckpointError,
    DataError,
    Interrupted,
    NonFiniteError,
    Stopped,
    UsageError,
)
from absld.evaluation.calibration import calibration
from absld.evaluation.validation import check_state
from absld.methods import build_method
from absld.metrics import ClassAccuracies
from absld.models.loading import Network
from absld.progress import Observer, StepReport
from absld.runs import planning, training_run
from absld.storage.checkpoint import load
from absld.storage.files import digest
from absld.storage.run_directory import RunDirectory
from absld.trainer import fit

# --- Reports ---


@pytest.mark.parametrize("method", ["absld", "rslad", "trades"])
def test_an_epoch_is_its_steps_and_their_means(method):
    """Each field of the report again, from the parts of the package, in a plain loop."""
    config = replace(CONFIG, method=method, epochs=2)
    start = time.perf_counter()
    student, reports = train(config)
    elapsed = time.perf_counter() - start

    by_hand, teacher = network("student"), network("teacher").eval()
    own = build_method(config, C)
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    attack = TrainingAttack(0.1, 0.1 * 0.25, 2)
    scores, states = [], []
    for epoch, report in enumerate(reports, 1):
        lr = 0.1 if epoch == 1 else 0.001  # both milestones, 0.34 * 2 and 0.67 * 2, are at 1
        sgd.param_groups[0]["lr"] = lr
        losses, parts = [], {}
        for batch in batches(
            Views(TRAIN, 1), 0, "student", epoch, batch_size=4, flip=0.5, radius=0.001, steps=3
        ):
            step = own.step(by_hand, teacher, batch, attack)
            sgd.zero_grad()
            step.loss.backward()
            sgd.step()
            losses.append(step.loss.item())
            for name, part in step.parts.items():
                parts.setdefault(name, []).append(part.item())
        rate = 0.1 * 0.1**2
        accuracies = absld.validate(by_hand, VALIDATION, epsilon=0.1)
        assert report.epoch == epoch
        assert report.learning_rate == pytest.approx(lr, rel=1e-12)
        assert report.temperature_rate == pytest.approx(rate, rel=1e-12)
        assert report.loss == pytest.approx(sum(losses) / 3, rel=1e-12)
        assert report.parts == pytest.approx({k: sum(v) / 3 for k, v in parts.items()}, rel=1e-12)
        assert same(tuple(report.accuracies), tuple(accuracies))
        assert same(report.per_class, own.end_epoch(report.temperature_rate))
        clean, robust = absld.fairness(accuracies.clean), absld.fairness(accuracies.robust)
        assert (report.clean, report.robust) == (clean, robust)
        assert report.score == robust.average + robust.worst
        assert report.is_best == (report.score > max(scores, default=-1))
        scores.append(report.score)
        states.append(digest(by_hand.state_dict()))
        assert report.images_per_second * report.seconds == pytest.approx(12)
    assert 0 < sum(report.seconds for report in reports) < elapsed
    assert digest(student.state_dict()) == states[scores.index(max(scores))]


def test_a_record_is_json_with_a_name_for_each_number(tmp_path):
    report = train()[1][0]
    record = json.loads(json.dumps(report.record(), allow_nan=False))
    assert list(record) == [
        "epoch", "learning_rate", "temperature_rate", "loss", "adv_kl", "nat_kl", "clean", "robust",
        "temperature_adv", "temperature_nat", "class_risk_adv", "class_risk_nat", "score",
        "is_best", "seconds", "images_per_second",
    ]  # fmt: skip
    assert record["robust"] == report.accuracies.robust.tolist()
    assert record["temperature_adv"] == report.per_class["temperature_adv"].tolist()


def test_every_batch_is_reported():
    heard = []
    train(replace(CONFIG, epochs=2), on_step=heard.append)
    assert heard == [
        StepReport(epoch, phase, done, total)
        for epoch in (1, 2)
        for phase, total in (("training", 3), ("validation", 3))
        for done in range(1, total + 1)
    ]


def test_the_loss_falls():
    reports = train(replace(CONFIG, epochs=15), teacher=trained_teacher())[1]
    assert reports[-1].loss < 0.5 * reports[0].loss


def trained_teacher():
    return train(replace(CONFIG, method="trades", epochs=15), network("teacher"))[0]


@pytest.mark.parametrize(
    ("scores", "best"), [([1, 3, 2], 2), ([2, 2, 1], 1), ([0, 0, 0], 1), ([1, 2, 3], 3)]
)
def test_the_best_epoch_is_kept(scores, best, monkeypatch, tmp_path):
    """Of equal ones the first. Average + worst decides: a worse class outweighs a better mean."""
    given = iter(scores)

    def evaluated(*_, **settings):
        robust = torch.full((C,), next(given) / 10)
        return ClassAccuracies(1 - robust, robust)

    monkeypatch.setattr(trainer, "validate", evaluated)
    student, states, marks, run = network("student"), [], [], RunDirectory(tmp_path)
    run.lock()
    for report in fit(student, network("teacher"), TRAIN, VALIDATION, CONFIG, run=run):
        states.append(digest(student.state_dict()))
        marks.append(report.is_best)
    assert len(set(states)) == 3
    assert digest(student.state_dict()) == states[best - 1]
    assert [i for i, mark in enumerate(marks, 1) if mark][-1] == best
    assert digest(load(run.best)["model"]) == states[best - 1]
    assert load(run.best)["record"]["epoch"] == best


def test_average_and_worst_class_decide_together(monkeypatch):
    given = iter([[0.5, 0.5, 0.5], [0.9, 0.9, 0.1], [0.4, 0.6, 0.55]])

    def evaluated(*_, **settings):
        robust = torch.tensor(next(given))
        return ClassAccuracies(robust, robust)

    monkeypatch.setattr(trainer, "validate", evaluated)
    assert [report.is_best for report in train()[1]] == [True, False, False]


# --- D7 ---


def test_the_schedule_is_lr_after_and_rate_before_the_milestone(tmp_path):
    config = replace(CONFIG, epochs=10, milestones=(0.3, 0.6), max_steps=1)
    student, teacher, run = network("student"), network("teacher"), RunDirectory(tmp_path)
    run.lock()
    before, reports = torch.ones(C), []
    for report in fit(student, teacher, TRAIN, VALIDATION, config, run=run):
        reports.append(report)
        used = load(run.last)["optimizer"]["param_groups"][0]
        assert used["lr"] == report.learning_rate
        assert (used["momentum"], used["weight_decay"]) == (0.9, 2e-4)
        moved = (report.per_class["temperature_adv"] - before).abs().max().item()
        assert moved == pytest.approx(report.temperature_rate, abs=1e-6)  # the law of D6
        before = report.per_class["temperature_adv"]
    rates = [round(report.learning_rate, 12) for report in reports]
    assert rates == [0.1] * 3 + [0.01] * 3 + [0.001] * 4
    rates = [round(report.temperature_rate, 12) for report in reports]
    assert rates == [0.1] * 2 + [0.01] * 3 + [0.001] * 5


# --- Networks and images of other people ---


class Odd(nn.Module):
    """A network with nothing in common with ours: one matrix, no batch norm."""

    def __init__(self, features, classes):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(features, classes))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


def image_bytes(n, **settings):
    return bytes_of(image_set(n, **settings))


@pytest.mark.parametrize(
    ("method", "data", "classes"),
    [("absld", image_set, 2), ("absld", image_bytes, 100), ("rslad", image_bytes, 2),
     ("trades", image_set, 100)],
)  # fmt: skip
def test_foreign_networks_train_on_grey_images(method, data, classes):
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    before = deepcopy(student.state_dict())
    sets = data(104, classes=classes, channels=1), data(100, classes=classes, channels=1, seed=1)
    config = replace(CONFIG, method=method, epochs=1, batch_size=26)
    student, (report,) = train(config, student, Odd(16, classes), sets)
    assert report.accuracies.robust.shape == (classes,)
    assert not same(dict(student.state_dict()), dict(before))
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_student_of_one_parameter_trains_in_batches_of_one():
    _, reports = train(replace(CONFIG, batch_size=1, epochs=1), Odd(48, C))
    assert np.isfinite(reports[0].loss)


def test_a_batch_of_one_with_batch_norm_trains():
    _, reports = train(replace(CONFIG, batch_size=1, epochs=1))
    assert np.isfinite(reports[0].loss)


def test_networks_and_images_in_double_precision_train(double_precision):
    sets = image_set(dtype=torch.float64), image_set(9, seed=1, dtype=torch.float64)
    student, reports = train(CONFIG, network("student").double(), network("teacher").double(), sets)
    assert all(p.dtype == torch.float64 for p in student.parameters())
    assert np.isfinite(reports[-1].loss)


def test_a_class_without_images_stays_as_it_is(tmp_path):
    """In training and validation: its temperature stays 1, and a record says null, not NaN."""
    some = [
        InMemoryImages(data.images, data.labels % 2, data.classes) for data in (TRAIN, VALIDATION)
    ]
    run = RunDirectory(tmp_path)
    _, reports = train(data=some, run=run)
    for report, record in zip(reports, run.records(), strict=True):
        assert report.per_class["temperature_adv"][2] == 1
        assert report.per_class["temperature_adv"][0] != 1
        assert record["class_risk_adv"][2] is record["robust"][2] is None
        assert record["score"] == report.score == report.score


def test_a_partly_frozen_student_trains():
    student = network("student")
    student[0].requires_grad_(False)
    before = digest(student[0].state_dict())
    train(student=student)
    assert digest(student[0].state_dict()) == before and student[4].weight.requires_grad


@pytest.mark.parametrize("wrong", ["student", "teacher"])
def test_networks_of_another_width_are_refused(wrong):
    nets = {"student": network("student"), "teacher": network("teacher")}
    nets[wrong] = network(classes=C + 2)
    with pytest.raises(ValueError, match=r"\(2, 5\) for 2 images, not logits \(2, 3\)"):
        train(**nets)


def test_networks_of_another_number_of_channels_are_refused():
    with pytest.raises(ValueError, match="channels"):
        train(student=network(channels=1))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(VALIDATION.labels, ("1", "0", "2")), (VALIDATION.labels % 2, ("0", "1"))],
)
def test_validation_images_of_other_classes_are_refused(labels, classes):
    validation = InMemoryImages(VALIDATION.images, labels, classes)
    with pytest.raises(DataError, match="classes of the training images") as caught:
        train(data=(TRAIN, validation))
    assert str(list(classes)) in str(caught.value) and caught.value.hint


def test_validation_images_that_the_student_does_not_take_are_refused_before_training():
    validation = InMemoryImages(VALIDATION.images[:, :1], VALIDATION.labels, VALIDATION.classes)
    steps = []
    with pytest.raises(CheckpointError, match="student does not take images"):
        train(data=(TRAIN, validation), on_step=steps.append)
    assert not steps


def test_a_run_directory_that_is_not_locked_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    reports = fit(network("student"), network("teacher"), TRAIN, VALIDATION, CONFIG, run=run)
    with pytest.raises(UsageError, match="is not locked") as caught:
        next(reports)
    assert "with RunDirectory" in caught.value.hint and not list(tmp_path.iterdir())


def test_a_run_directory_is_locked_for_all_threads(tmp_path):
    run, heard = RunDirectory(tmp_path), []
    student, teacher = network("student"), network("teacher")
    with run:
        reports = fit(student, teacher, TRAIN, VALIDATION, CONFIG, run=run)
        thread = threading.Thread(target=lambda: heard.extend(reports))
        thread.start()
        thread.join()
    assert len(heard) == CONFIG.epochs and not run.is_locked


def test_images_that_do_not_fill_a_batch_are_refused():
    with pytest.raises(DataError, match="12 training images do not fill a batch of 13"):
        train(replace(CONFIG, batch_size=13))


def test_a_run_directory_is_made_where_there_is_none(tmp_path):
    run = RunDirectory(tmp_path / "new" / "run")
    train(run=run)
    assert run.best.exists() and len(run.records()) == CONFIG.epochs


def test_a_method_that_needs_a_teacher_says_so():
    with pytest.raises(UsageError, match="needs a teacher"):
        list(fit(network("student"), None, TRAIN, VALIDATION, CONFIG))


# --- Networks and modes that cannot be trained ---


def linked(share):
    """A student and a teacher, of which `share` links a part."""
    student, teacher = network("student"), network("teacher")
    return student, share(student, teacher) or teacher


def share_module(student, teacher):
    teacher[0] = student[0]


def share_memory(student, teacher):
    teacher[4].weight.data = student[4].weight.data


def share_rows(student, teacher):
    """Weights that overlap, at other addresses."""
    rows = torch.rand(C + 1, 64)
    student[4].weight, teacher[4].weight = nn.Parameter(rows[:-1]), nn.Parameter(rows[1:])


def share_with_a_buffer(student, teacher):
    teacher[4].register_buffer("copy", student[4].weight.detach())


def share_statistics(student, teacher):
    teacher[1].running_var = student[1].running_var


def share_counters(student, teacher):
    teacher[1].num_batches_tracked = student[1].num_batches_tracked


def assign(student, teacher):
    teacher.load_state_dict(student.state_dict(), assign=True)


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (lambda student, teacher: student, "are the same network"),
        (lambda student, teacher: nn.Sequential(nn.Identity(), student), "share 0.weight and 5"),
        (share_module, "share 0.weight and 1 more"),
        (share_memory, "share 4.weight"),
        (share_rows, "share 4.weight"),
        (share_with_a_buffer, "share 4.weight"),
        (share_statistics, "share 1.running_var"),
        (share_counters, "share 1.num_batches_tracked"),
        (assign, "share 0.weight and 5 more"),
    ],
)
def test_a_student_that_shares_what_it_trains_with_its_teacher_is_refused(share, message):
    student, teacher = linked(share)
    with pytest.raises(UsageError, match=f"student and teacher {message}") as caught:
        train(student=student, teacher=teacher)
    assert caught.value.hint == "copy.deepcopy one of them"
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_networks_may_share_what_training_does_not_change():
    """A normalisation of pixels, an activation."""

    class Normalise(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.full((3, 1, 1), 0.5))

        def forward(self, x):
            return x - self.mean

    normalise = Normalise()
    student, teacher = (nn.Sequential(normalise, network(role)) for role in ("student", "teacher"))
    _, reports = train(replace(CONFIG, epochs=1), student, teacher)
    assert np.isfinite(reports[0].loss)


class Fixed(nn.Module):
    """Without parameters."""

    def forward(self, x):
        return 10 * x.flatten(1)[:, :C]


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (lambda: Fixed(), "it has no parameters"),
        (lambda: network("student").requires_grad_(False), "its parameters are all frozen"),
    ],
)
def test_a_student_with_nothing_to_train_is_refused(student, message):
    with pytest.raises(UsageError, match=message) as caught:
        train(student=student())
    assert caught.value.hint


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_without_parameters_teaches(cached, tmp_path):
    cache = LogitCacheSettings(tmp_path, 1.0) if cached else None
    _, reports = train(replace(CONFIG, epochs=1), teacher=Fixed(), logit_cache=cache)
    assert np.isfinite(reports[0].loss) and any(tmp_path.iterdir()) == cached


class Wrapped(nn.Module):
    def __init__(self, forward, role="student"):
        super().__init__()
        self.net, self.wrapped = network(role), forward

    def forward(self, x):
        return self.wrapped(self, x)


def constant_in_training(self, x):
    logits = self.net(x)
    return logits.detach() if self.training else logits


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda self, x: self.net(x.detach()), "no gradient reaches the images"),
        (torch.no_grad()(lambda self, x: self.net(x)), "no gradient reaches the images"),
        (constant_in_training, "the loss does not depend on the student's parameters"),
    ],
)
def test_a_student_without_a_gradient_is_refused(forward, message):
    with pytest.raises(UsageError, match=message):
        train(student=Wrapped(forward))


FLOATS = image_set(), image_set(9, seed=1)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("data", [(TRAIN, VALIDATION), FLOATS], ids=["bytes", "floats"])
def test_a_network_that_writes_into_its_input_is_refused(role, data):
    before = [part.images.clone() for part in data]
    writer = Wrapped(lambda self, x: self.net(x.mul_(2).sub_(1)), role)
    with pytest.raises(CheckpointError, match=f"{role} writes into its input"):
        train(data=data, **{role: writer})
    assert all(torch.equal(part.images, was) for part, was in zip(data, before, strict=True))


def test_a_student_that_writes_into_its_input_in_training_only_is_refused():
    writer = Wrapped(lambda self, x: self.net(x.add_(0.1) if self.training else x))
    with pytest.raises(CheckpointError, match="the student or the teacher writes into its input"):
        train(student=writer)


# --- Networks that are unlike ordinary modules ---


class NormFrozen(nn.Module):
    """With the usual idiom for a batch norm that stays as it is, whose `train` returns None."""

    def __init__(self, role):
        super().__init__()
        self.net = network(role)

    def train(self, mode=True):
        super().train(mode)
        self.net[1].eval()

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("method", ["absld", "adaad", "ard", "trades", "sat"])
def test_networks_whose_train_returns_nothing_train_as_others_do(method):
    config = replace(CONFIG, method=method, epochs=1)
    student, (report,) = train(config, NormFrozen("student"), NormFrozen("teacher"))
    assert np.isfinite(report.loss) and not student.net[1].num_batches_tracked
    expected = train(config, NormFrozen("student"), network("teacher"))[1]
    assert report.loss == expected[0].loss


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_a_teacher_in_torchscript_teaches_as_it_does_in_python():
    config = replace(CONFIG, epochs=1)
    student, _ = train(config, teacher=torch.jit.script(network("teacher")))
    assert digest(student.state_dict()) == digest(train(config)[0].state_dict())


class ExtraState(nn.Sequential):
    def get_extra_state(self):
        return {"scale": 1}


class OwnState(nn.Sequential):
    def state_dict(self, *given, **named):
        return {"weights": 1}


def with_sparse_buffer():
    net = network("student")
    net.register_buffer("graph", torch.eye(3).to_sparse())
    return net


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves it to another package
        return torch.ao.quantization.quantize_dynamic(network("student"), {nn.Linear})


NOT_DENSE = {
    "1.weight in its state dict is UninitializedParameter": lambda: nn.Sequential(
        nn.Flatten(), nn.LazyLinear(C)
    ),
    "graph in its state dict is Tensor (torch.sparse_coo, cpu)": with_sparse_buffer,
    "_extra_state in its state dict is dict": lambda: ExtraState(nn.Flatten(), nn.Linear(48, C)),
    "weights in its state dict is int": lambda: OwnState(nn.Flatten(), nn.Linear(48, C)),
    "4._packed_params.dtype in its state dict is dtype": quantised,
    "0.weight in its state dict is Tensor (torch.strided, meta)": lambda: network("student").to(
        "meta"
    ),
}


@pytest.mark.parametrize("message", NOT_DENSE)
def test_networks_without_a_state_dict_of_dense_tensors_are_refused(message):
    """As student and teacher, and by whatever evaluates one."""
    net = NOT_DENSE[message]()
    for use in (
        lambda: train(student=net),
        lambda: train(teacher=net),
        lambda: absld.validate(net, VALIDATION, epsilon=0.1),
        lambda: absld.evaluate(net, VALIDATION, epsilon=0.1),
    ):
        with pytest.raises(CheckpointError) as caught:
            use()
        assert message in str(caught.value) and caught.value.hint


def test_a_teacher_to_train_is_checked_before_anything_is_computed_of_it(monkeypatch, tmp_path):
    """Its digest and its device."""
    given = Network(network("teacher").to("meta"), "mine")
    monkeypatch.setattr(planning, "load_network", lambda *described, **more: given)
    config = Config(teacher_model="mine:make", out=str(tmp_path), device="cpu")
    splits = Splits(TRAIN, VALIDATION, VALIDATION)
    with pytest.raises(CheckpointError, match=r"mine:make: .* in its state dict is Tensor"):
        training_run.train_teacher(config, splits, Observer(), SINGLE_PROCESS)


def test_a_function_is_refused_as_a_network():
    with pytest.raises(CheckpointError, match="student is a builtin_function_or_method"):
        inspect.unwrap(check_state)(torch.abs, "student")


def leave(self, x):
    raise SystemExit(0)


def stop(self, x):
    raise Stopped(143)


def test_a_network_that_ends_the_process_is_refused_and_a_signal_is_not():
    with pytest.raises(CheckpointError, match=r"student does not take images .*SystemExit\(0\)"):
        train(student=Wrapped(leave))
    with pytest.raises(Stopped):
        train(student=Wrapped(stop))


# --- Modes of torch ---


def test_it_trains_under_no_grad():
    with torch.no_grad():
        student, _ = train()
    assert digest(student.state_dict()) == digest(train()[0].state_dict())


MODES = {
    "inference_mode is on": torch.inference_mode,
    "autocast is on": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_under_which_nothing_is_trained_as_set_are_refused(mode):
    """At the start, and at the epoch at which somebody turns them on."""
    with MODES[mode](), pytest.raises(UsageError, match=mode):
        train()
    reports = fit(network("student"), network("teacher"), TRAIN, VALIDATION, CONFIG)
    next(reports)
    with MODES[mode](), pytest.raises(UsageError, match=mode):
        next(reports)


def test_images_made_under_inference_mode_are_validated():
    with torch.inference_mode():
        validation = image_set(9, seed=1)
    _, reports = train(data=(FLOATS[0], validation))
    expected = train(data=FLOATS)[1]
    assert same(tuple(reports[-1].accuracies), tuple(expected[-1].accuracies))


# --- What it leaves unchanged ---


def test_the_teacher_is_frozen_even_if_handed_over_otherwise():
    teacher = network("teacher").train().requires_grad_(True)
    before = digest(teacher.state_dict())
    student, _ = train(teacher=teacher)
    assert digest(teacher.state_dict()) == before
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert digest(student.state_dict()) != digest(network("student").state_dict())


def all_random_states():
    """All but Python's own, which the type checks of these tests draw from."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()


def test_it_neither_draws_from_nor_changes_global_random_state():
    results = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = all_random_states()
        results.add(digest(train()[0].state_dict()))
        assert all_random_states() == before
    assert len(results) == 1


@pytest.mark.parametrize("settings", [{"seed": 1}, {"start_noise": 0.1}, {"flip": 1.0}])
def test_the_seed_decides_all_random_numbers(settings):
    other = train(replace(CONFIG, **settings))[0]
    assert digest(other.state_dict()) != digest(train()[0].state_dict())
    again = train(replace(CONFIG, **settings))[0]
    assert digest(other.state_dict()) == digest(again.state_dict())


def test_teacher_and_student_have_different_random_numbers():
    first, second = (train(role=role)[0] for role in ("student", "teacher"))
    assert digest(first.state_dict()) != digest(second.state_dict())


# --- Precision ---

KNOBS = torch.backends.cuda.matmul, torch.backends.cudnn.conv


@pytest.fixture
def own_settings():
    """The user's settings: neither fp32 nor tf32 would find both as they are."""
    matmul, conv = KNOBS
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
    yield
    matmul.fp32_precision, conv.fp32_precision = before


def found_settings():
    return [knob.fp32_precision for knob in KNOBS] + [torch.backends.cudnn.deterministic]


@pytest.mark.parametrize(
    ("precision", "inside"), [("fp32", "ieee"), ("bf16", "ieee"), ("tf32", "tf32")]
)
def test_float32_precision_is_set_inside_and_restored_outside(precision, inside, own_settings):
    before = found_settings()
    with pytest.raises(KeyError), float32_precision(precision):
        assert found_settings() == [inside, inside, True]
        raise KeyError
    assert found_settings() == before


def test_between_two_epochs_torch_has_the_settings_of_the_user(own_settings):
    before, inside = found_settings(), []
    for _ in fit(
        network("student"),
        network("teacher"),
        TRAIN,
        VALIDATION,
        replace(CONFIG, precision="tf32"),
        observer=OnStep(lambda step: inside.append(found_settings())),
    ):
        assert found_settings() == before
    assert inside.count(["tf32", "tf32", True]) == len(inside) == 18


def set_nothing():
    """Leave torch's own defaults."""


def set_new():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"


@pytest.mark.parametrize(
    "user",
    [
        set_nothing,
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
        lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        set_new,
    ],
    ids=["nothing", "high", "medium", "no cuDNN", "generic", "new"],
)
def test_legacy_readers_of_tf32_work_inside_and_find_the_users_values_outside(user):
    """Networks and max-autotune read torch's legacy settings. In a process of its own: those of
    the tests stay."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=read_legacy_settings, args=(user,))
    process.start()
    process.join()
    assert process.exitcode == 0


def read_legacy_settings(user):
    def read():
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    def everything():
        backends = torch.backends
        parts = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
        parts = *parts, backends.mkldnn.matmul, backends.mkldnn.conv
        return [part.fp32_precision for part in parts], legacy_settings()

    user()
    before = everything()
    with float32_precision("tf32"):
        assert read() == (True, True, "high")
        with float32_precision("fp32"):
            assert read() == (False, False, "highest")
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert read() == (True, True, "high")
    if before[1] is None:  # the user mixed new and legacy settings: only the new ones count
        assert everything()[0] == before[0]
    else:
        assert everything() == before


def test_bf16_runs_and_gives_finite_float32_logits():
    student, reports = train(replace(CONFIG, precision="bf16"))
    assert all(np.isfinite(report.loss) for report in reports)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in student.parameters())
    seen = []
    student[4].register_forward_hook(lambda module, x, logits: seen.append(logits.dtype))
    logits = with_precision(student, "bf16")(TRAIN.images / 255)
    assert logits.dtype == torch.float32 and logits.isfinite().all() and seen == [torch.bfloat16]
    assert digest(student.state_dict()) != digest(train()[0].state_dict())
    assert with_precision(student, "fp32") is with_precision(student, "tf32") is student
    assert with_precision(student, "tf32", caller_precision="fp32") is not student


# --- A loss that is not finite ---


class Poisoned(nn.Module):
    """Gives NaN from its nth training forward on."""

    def __init__(self, model, n):
        super().__init__()
        self.model, self.left = model, n

    def forward(self, x):
        self.left -= self.training
        return self.model(x) * (float("nan") if self.left <= 0 else 1)


def test_nan_stops_before_the_optimisers_step(tmp_path):
    """Two forwards a step and three steps an epoch: the tenth is in the second step of epoch 2."""
    student, seen, run = Poisoned(network("student"), 10), [], RunDirectory(tmp_path)
    with pytest.raises(NonFiniteError) as caught:
        train(
            student=student,
            run=run,
            on_step=lambda step: seen.append(digest(student.state_dict())),
        )
    said = str(caught.value)
    assert said.startswith("epoch 2, step 2: ") and "\n" not in said
    assert "loss nan" in said and "adv_kl 0." in said and "nat_kl nan" in said
    assert caught.value.exit_code == 5 and caught.value.hint
    assert len(seen) == 3 + 3 + 1 and all(p.isfinite().all() for p in student.parameters())
    good = load(run.last)
    assert good["progress"]["epoch"] == 2 and good["progress"]["step"] == 0
    assert digest(good["model"]) == seen[3]


def test_a_student_that_its_last_step_broke_is_not_saved(tmp_path):
    """The loss of the step was finite; the logits of the student that it made are not."""
    run = RunDirectory(tmp_path)
    with pytest.raises(NonFiniteError):
        train(replace(CONFIG, learning_rate=1e38, epochs=1, max_steps=1), run=run)
    assert not run.best.exists() and not run.records()


# --- Going on after an interruption ---


def without_times(records):
    times = {"seconds", "images_per_second"}
    return [{k: v for k, v in record.items() if k not in times} for record in records]


def outcome(student, run):
    """Everything that a run leaves except times."""
    best = load(run.best)
    best["record"] = without_times([best["record"]])
    return {
        "student": dict(student.state_dict()),
        "last": load(run.last),
        "best": best,
        "records": without_times(run.records()),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The outcome of a training that nothing interrupts."""
    run = RunDirectory(tmp_path_factory.mktemp("whole"))
    student, reports = train(run=run, about=ABOUT)
    assert len(reports) == CONFIG.epochs
    return outcome(student, run)


ABOUT = {"architecture": "tiny", "classes": ["a", "b", "c"]}
AN_EPOCH = 6  # three batches of training, three of validation
STEPS = CONFIG.epochs * AN_EPOCH


def stopping(at):
    """Return an on_step that asks to stop at its nth call."""
    left = iter(range(at - 1, -1, -1))

    def on_step(report):
        if next(left) == 0:
            raise Interrupted(15)

    return on_step


@pytest.mark.parametrize("at", range(1, STEPS + 1))
def test_a_training_interrupted_at_any_step_ends_as_if_it_were_not(at, whole, tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(Interrupted):
        train(run=run, about=ABOUT, on_step=stopping(at))
    heard = []
    student, reports = train(run=run, about=ABOUT, on_step=heard.append)
    done, step = divmod(at - 1, AN_EPOCH)
    assert len(heard) == STEPS - done * AN_EPOCH - min(step + 1, 3)  # a validation is done again
    assert same(outcome(student, run), whole)
    assert [report.epoch for report in reports] == list(range(done + 1, 4))


def test_a_training_interrupted_after_each_of_its_steps_ends_as_if_it_were_not(whole, tmp_path):
    run, sessions = RunDirectory(tmp_path), 0

    def on_step(report):
        if report.phase == "training":
            raise Interrupted(2)

    while True:
        try:
            student, _ = train(run=run, about=ABOUT, on_step=on_step)
            break
        except Interrupted:
            sessions += 1
    assert sessions == 9 and same(outcome(student, run), whole)


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_training_abandoned_after_an_epoch_resumes_to_the_same_result(epochs, whole, tmp_path):
    run = RunDirectory(tmp_path)
    run.lock()
    reports = fit(
        network("student"), network("teacher"), TRAIN, VALIDATION, CONFIG, run=run, about=ABOUT
    )
    for _ in range(epochs):
        next(reports)
    reports.close()
    student, rest = train(run=run, about=ABOUT)
    assert len(rest) == 3 - epochs and same(outcome(student, run), whole)


def test_a_finished_training_has_its_best_weights_again(whole, tmp_path):
    run = RunDirectory(tmp_path)
    train(run=run, about=ABOUT)
    student, reports = train(run=run, about=ABOUT)
    assert reports == [] and same(outcome(student, run), whole)


class Crash(BaseException):
    pass


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.slow
def test_a_run_that_crashed_at_any_write_resumes_to_the_same_result(
    name, whole, tmp_path, monkeypatch
):
    """Before each of the operations that put a file on the disk, best, metrics and last."""
    write, crashes = getattr(os, name), 0
    for at in range(1, 100):
        run, left = RunDirectory(tmp_path / str(at)), iter(range(at - 1, -100, -1))
        run.path.mkdir()

        def crash(*given, left=left):
            if next(left) == 0:
                raise Crash
            return write(*given)

        with monkeypatch.context() as patched:
            patched.setattr(os, name, crash)
            try:
                train(run=run, about=ABOUT)
                break
            except Crash:
                crashes += 1
        student, _ = train(run=run, about=ABOUT)
        assert same(outcome(student, run), whole), at
    best = sum(record["is_best"] for record in whole["records"])
    names = 1 + CONFIG.epochs + best  # the first metrics.jsonl, then last.pt and best.pt
    assert crashes == (names if name == "replace" else 2 * names + CONFIG.epochs)


def train_in(path, begun):
    """Train in this child process, which waits in the last epoch; set `begun` after a batch."""
    torch.set_num_threads(1)

    def on_step(report):
        begun.set()
        if report.epoch == LONG.epochs:
            time.sleep(60)

    train(LONG, run=RunDirectory(path), about=ABOUT, on_step=on_step)


LONG = replace(CONFIG, epochs=12)


@pytest.mark.slow
def test_a_training_killed_at_random_moments_resumes_to_the_same_result(tmp_path):
    delays = random.Random(7)
    run, other = RunDirectory(tmp_path / "killed"), RunDirectory(tmp_path / "whole")
    for path in (run.path, other.path):
        path.mkdir()
    for _ in range(5):
        begun = processes.Event()
        child = processes.Process(target=train_in, args=(run.path, begun))
        child.start()
        assert begun.wait(60)
        child.join(delays.uniform(0, 0.15))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    student, _ = train(LONG, run=run, about=ABOUT)
    expected, _ = train(LONG, run=other, about=ABOUT)
    assert same(outcome(student, run), outcome(expected, other))


class Forgetful(nn.Module):
    """With dropout, which draws random numbers of its own."""

    def __init__(self):
        super().__init__()
        self.network, self.drop = network("student"), nn.Dropout(0.5)

    def forward(self, x):
        return self.network(self.drop(x))


def test_a_student_with_dropout_goes_on_with_the_numbers_it_would_have_had(tmp_path):
    results = []
    for name, stop in (("whole", None), ("interrupted", 5)):
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        if stop:
            with pytest.raises(Interrupted):
                train(student=Forgetful(), run=run, on_step=stopping(stop))
        results.append(outcome(train(student=Forgetful(), run=run)[0], run))
    assert same(*results)


# --- Where class temperatures start ---

CALIBRATED = replace(
    CONFIG, temperature_start="calibrated", temperature_lower=0.01, temperature_upper=100.0
)


class Notes(Observer):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def calibrated_temperature():
    """The temperature of the test's teacher, as of a check of it."""
    teacher = network("teacher").eval()
    with torch.no_grad():
        logits = teacher(VALIDATION.images / 255)
    return calibration(logits, VALIDATION.labels).temperature


def test_temperatures_start_where_the_teacher_is_calibrated():
    observer = Notes()
    start = calibrated_temperature()
    assert 0.1 < start < 19, "not an end of the search"
    _, reports = train(replace(CALIBRATED, temperature_rate=0.0), observer=observer)
    for name in ("temperature_adv", "temperature_nat"):
        assert reports[0].per_class[name].tolist() == pytest.approx([start] * C, rel=1e-5)
    assert observer.notes == [
        f"class temperatures start at {start:.4g}, the teacher's temperature of least "
        "cross-entropy on the validation images"
    ]


@pytest.mark.parametrize("end", ["lower", "upper"])
def test_a_calibrated_start_outside_the_bounds_is_clipped_and_both_numbers_are_told(end):
    observer, best = Notes(), calibrated_temperature()
    bound = 1.5 * best if end == "lower" else best / 1.5
    config = replace(CALIBRATED, temperature_rate=0.0, **{f"temperature_{end}": bound})
    _, reports = train(config, observer=observer)
    assert reports[0].per_class["temperature_adv"].tolist() == pytest.approx([bound] * C)
    (note,) = observer.notes
    assert f"start at {bound:.4g}: " in note and f", {best:.4g}, " in note
    assert note.endswith(f"(--temperature-{end})")


def test_the_checkpoint_decides_where_temperatures_started(tmp_path, monkeypatch):
    """In the first epoch, too, and a resumed training calibrates nothing."""
    config = replace(CALIBRATED, temperature_move="relative")
    whole, stopped = RunDirectory(tmp_path / "whole"), RunDirectory(tmp_path / "stopped")
    expected = outcome(train(config, run=whole)[0], whole)
    with pytest.raises(Interrupted):
        train(config, run=stopped, on_step=stopping(2))
    monkeypatch.setattr(trainer, "calibration", None)
    observer = Notes()
    assert same(outcome(train(config, run=stopped, observer=observer)[0], stopped), expected)
    assert observer.notes == []


def test_a_teacher_without_finite_logits_is_not_calibrated():
    teacher = network("teacher")
    teacher[-1].bias.data[0] = torch.nan
    with pytest.raises(CheckpointError, match="the teacher gives NaN or infinity"):
        train(CALIBRATED, teacher=teacher)


def changed_pixel():
    images = TRAIN.images.clone()
    images[3, 0, 1, 1] ^= 1
    return InMemoryImages(images, TRAIN.labels, TRAIN.classes)


OTHERS = {
    "epsilon is 0.1 in the run, 0.2 now": {"config": replace(CONFIG, epsilon=0.2)},
    "seed is 0 in the run, 1 now": {"config": replace(CONFIG, seed=1)},
    "fidelity is 'paper' in the run, 'released' now": {
        "config": replace(CONFIG, fidelity="released")
    },
    "method is 'absld' in the run, 'rslad' now": {"config": replace(CONFIG, method="rslad")},
    "epochs is 3 in the run, 4 now": {"config": replace(CONFIG, epochs=4)},
    "role is 'student' in the run, 'teacher' now": {"role": "teacher"},
    "training_images is": {"data": (changed_pixel(), VALIDATION)},
    "validation_images is": {"data": (TRAIN, TRAIN)},
    "teacher is": {"teacher": network("another teacher")},
    "initial_weights is": {"student": network("another student")},
}
RENAMED = [InMemoryImages(d.images, d.labels, ("0", "1", "eel")) for d in (TRAIN, VALIDATION)]
OTHERS["training_images is '"] = {"data": RENAMED}


@pytest.mark.parametrize("difference", OTHERS)
def test_resuming_with_other_settings_data_or_networks_is_refused(difference, tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(Interrupted):
        train(run=run, on_step=stopping(6))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError) as caught:
        train(**{"run": run, **OTHERS[difference]})
    assert difference in str(caught.value) and str(tmp_path) in str(caught.value)
    assert "another --out" in caught.value.hint
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_changed_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    train(run=run)
    raw = bytearray(run.last.read_bytes())
    raw[raw.index(load(run.last)["model"]["0.weight"].numpy().tobytes()) + 3] ^= 1
    run.last.write_bytes(raw)
    with pytest.raises(CheckpointError, match="SHA-256"):
        train(run=run)


def test_checkpoints_are_tensors_and_plain_values_for_anyone(tmp_path):
    run = RunDirectory(tmp_path)
    train(run=run, about=ABOUT)
    best = torch.load(run.best, weights_only=True)
    assert best["architecture"] == "tiny" and best["classes"] == ["a", "b", "c"]
    network("another").load_state_dict(best["model"])
    assert best["record"] == run.records()[best["record"]["epoch"] - 1]
    last = torch.load(run.last, weights_only=True)
    assert {"identity", "progress", "model", "optimizer", "method"} <= last.keys()


def test_a_disk_that_is_full_surfaces_at_once_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path)
    run.lock()
    reports = fit(network("student"), network("teacher"), TRAIN, VALIDATION, CONFIG, run=run)
    next(reports)
    before = run.last.read_bytes()

    def fail(*given):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space"):
            next(reports)
    assert run.last.read_bytes() == before
    student, rest = train(run=run)
    assert len(rest) == 2
    assert digest(student.state_dict()) == digest(train()[0].state_dict())


def test_a_state_of_another_version_is_refused(tmp_path):
    """Its method carries tensors of other names."""
    run = RunDirectory(tmp_path)
    with run:
        train(replace(CONFIG, epochs=1), run=run)
    state = load(run.last)
    state["method"] = {"adv": torch.ones(C)}
    run.write_checkpoint(state, run.last)
    with pytest.raises(CheckpointError, match="not one of this training") as caught, run:
        train(replace(CONFIG, epochs=1), run=run)
    assert "--out" in caught.value.hint
