"""Evaluations, sanity checks and the check of a teacher on a CUDA device."""

import copy

import pytest
import torch
from helpers import strategies as draw
from helpers.small_networks import network

import absld
import absld.evaluation.evaluate
from absld.config.evaluation_settings import EvaluationConfig
from absld.data.dataset import InMemoryImages
from absld.evaluation import sanity_checks
from absld.evaluation.attacks import SquareSearch, parse_attack
from absld.evaluation.evaluate import evaluate
from absld.evaluation.teacher_check import inspect_teacher
from absld.progress import Observer
from absld.storage.checkpoint import save

C = 5
NET = network(dtype=torch.float32, classes=C)
IMAGES = draw.images(0, 12, dtype=torch.float32)
# Every image is correct when clean, so that every attack has some.
DATA = InMemoryImages(IMAGES, NET(IMAGES).argmax(1), tuple("abcde"))


@pytest.fixture(autouse=True)
def one_memory_format(monkeypatch):
    """Attack contiguous images on a CPU as on CUDA, where the fastest format is another."""
    monkeypatch.setattr(
        absld.evaluation.evaluate, "fastest_memory_format", lambda *_: torch.contiguous_format
    )


@pytest.fixture
def few_iterations(monkeypatch):
    """AutoAttack with few steps and queries."""
    pyautoattack = pytest.importorskip("pyautoattack")

    class Short(pyautoattack.AutoAttack):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            for part in (self.apgd, self.apgd_targeted, self.fab):
                part.n_iter = 2
            self.square.n_queries = 3

    monkeypatch.setattr(pyautoattack, "AutoAttack", Short)


@pytest.mark.parametrize("attacks", ["fgsm,pgd3,cw3", "autoattack"])
def test_an_evaluation_has_the_predictions_of_a_cpu(attacks, cuda, few_iterations):
    settings = {"epsilon": 0.02, "attacks": attacks, "restarts": 2, "batch_size": 6, "each": True}
    on_cpu = evaluate(NET, DATA, **settings)
    net = copy.deepcopy(NET).to(cuda.device)
    found = evaluate(net, DATA.to(cuda.device), **settings)
    assert found.predictions.device.type == "cpu" and (found.predictions >= 0).all()
    assert on_cpu.correct[0].all() and 0 < on_cpu.robust.sum() < len(DATA)
    if cuda.is_pretend:
        assert torch.equal(found.predictions, on_cpu.predictions)


def test_the_sanity_checks_have_the_result_of_a_cpu(cuda, monkeypatch):
    monkeypatch.setattr(sanity_checks, "PGD", {"linf": parse_attack("pgd3")})
    monkeypatch.setattr(sanity_checks, "LONGER", parse_attack("pgd5", restarts=2))
    monkeypatch.setattr(sanity_checks, "SEARCH", SquareSearch("square search", queries=10))

    def checks(device):
        net, data = copy.deepcopy(NET).to(device), DATA.to(device)
        evaluation = evaluate(net, data, epsilon=0.02, attacks="fgsm")
        return list(sanity_checks.run_checks(net, data, evaluation, examples=5))

    found, on_cpu = checks(cuda.device), checks("cpu")
    assert [check.name for check in found] == [check.name for check in on_cpu]
    if cuda.is_pretend:
        assert found == on_cpu


def test_a_teacher_is_checked(cuda, tmp_path, monkeypatch):
    data = absld.load_data("digits", "")
    images, labels = data.test.images[:40], data.test.labels[:40]
    few = absld.InMemoryImages(images, labels, data.test.classes)
    monkeypatch.setattr("absld.evaluation.images.load_split", lambda *_: few)
    path = tmp_path / "teacher.pt"
    save({"model": absld.build_model("convnet", 10, "teacher").state_dict()}, path)

    def results(device):
        config = EvaluationConfig(dataset="digits", device=device)
        found = inspect_teacher(str(path), config, Observer())
        return {name: found[name] for name in ("clean", "robust", "verdict", "reasons")}

    found, on_cpu = results(cuda.device), results("cpu")
    assert found == on_cpu if cuda.is_pretend else found["verdict"] == on_cpu["verdict"]
