"""docs/contributing.md: its method, recipe and attack, as a user would put them into a folder."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.plain_methods import ATTACK, C, batch, linear, one_hot, parameters, softmax
from helpers.program import few_digits, main, use_few_digits

import absld_min
from absld.config.files import read_recipe
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.evaluation.evaluate import evaluate
from absld.methods import build_method
from absld.models.architectures import build_model

PAGE = Path(absld_min.__file__).parent / "docs" / "contributing.md"
TINY = ["--max-steps", "2", "--batch-size", "16", "--device", "cpu", "--allow-weak-teacher"]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """The files of the page, in the current folder."""
    text = PAGE.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    blocks = dict(re.findall(r'^```\w+ title="(.*?)"\n(.*?)^```$', text, re.DOTALL | re.MULTILINE))
    assert set(blocks) == {"mart.py", "mart.toml", "noise.py"}
    for name, block in blocks.items():
        Path(name).write_text(block)
    use_few_digits(monkeypatch)
    yield
    for name in ("mart", "noise"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def loss_by_hand(weight, bias, x_nat, x_adv, labels, beta=5.0):
    """The definition, image by image, in NumPy."""
    q, p = (softmax(x @ weight.T + bias) for x in (x_nat, x_adv))
    total = 0.0
    for clean, attacked, y in zip(q, p, labels, strict=True):
        strongest = max(attacked[k] for k in range(C) if k != y)
        kl = sum(clean * np.log(clean / attacked))
        total += -np.log(attacked[y]) - np.log(1 - strongest) + beta * kl * (1 - clean[y])
    return total / len(labels)


def test_the_class_is_the_definition():
    """The loss, and its gradient by differences; the attack climbs the cross-entropy."""
    given = batch(3)
    student, seen = linear(1), []
    student.register_forward_pre_hook(lambda module, x: seen.append(x[0].detach().clone()))
    step = build_method(TrainConfig(method="mart:Mart"), C).step(student, None, given, ATTACK)
    x_nat, x_adv = (x.flatten(1).numpy() for x in seen[-2:])
    labels = given.labels.numpy()
    weight, bias = parameters(student)
    expected = loss_by_hand(weight, bias, x_nat, x_adv, labels)
    assert step.loss.item() == pytest.approx(expected, rel=1e-10)
    boosted, weighted = step.parts.values()
    assert (boosted + 5 * weighted).item() == pytest.approx(expected, rel=1e-10)

    x = given.x_nat.flatten(1).numpy() + given.noise.flatten(1).numpy()
    clean = given.x_nat.flatten(1).numpy()
    for _ in range(ATTACK.steps):
        slope = (softmax(x @ weight.T + bias) - one_hot(labels)) @ weight
        x = x + ATTACK.step_size * np.sign(slope)
        x = np.clip(np.clip(x, clean - ATTACK.epsilon, clean + ATTACK.epsilon), 0, 1)
    np.testing.assert_allclose(x_adv, x, atol=1e-12)
    assert np.array_equal(x_nat, clean) and student.training

    step.loss.backward()
    for index in ((0, 0), (1, 5), (2, 11)):
        moved = []
        for change in (1e-6, -1e-6):
            other = weight.copy()
            other[index] += change
            moved.append(loss_by_hand(other, bias, x_nat, x_adv, labels))
        slope = (moved[0] - moved[1]) / 2e-6
        assert student[1].weight.grad[index].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_the_loss_is_finite_where_a_wrong_class_is_certain():
    student = linear(1)
    with torch.no_grad():
        student[1].weight.mul_(1e4)
    step = build_method(TrainConfig(method="mart:Mart"), C).step(student, None, batch(0), ATTACK)
    assert step.loss.isfinite()


def test_the_recipe_is_the_published_one():
    config = resolve(read_recipe("mart.toml") | {"dataset": "cifar10"})
    assert config.milestone_epochs() == [75, 90, 100] and config.epochs == 120
    assert (config.learning_rate, config.weight_decay) == (0.01, 3.5e-3)
    assert config.relative_step_size * 0.031 == pytest.approx(0.007)
    assert (config.student, config.start) == ("resnet18", "normal")


def test_it_trains_and_resumes_and_compares(capfd):
    recipe = ["--recipe", "mart.toml", "--epochs", "1", *TINY]
    assert main("train", *recipe, "--json") == 0
    first = json.loads(capfd.readouterr().out)
    assert first["config"]["method"] == "mart:Mart" and first["teacher_sha256"] is None
    (run,) = Path("runs").glob("digits-mart-Mart-seed0-*")
    record = json.loads((run / "metrics.jsonl").read_text())
    assert record["boosted"] > 0 and record["weighted_kl"] >= 0
    assert main("train", *recipe, "--json", "--resume") == 0
    assert json.loads(capfd.readouterr().out)["student_sha256"] == first["student_sha256"]
    given = ["--epochs", "1", *TINY, "--attacks", "fgsm", "--no-checks"]
    assert main("compare", "--methods", "sat,mart.toml", *given, "--json") == 0
    results = json.loads(capfd.readouterr().out)
    assert [method["name"] for method in results["methods"]] == ["sat", "mart:Mart"]
    assert results["notes"][0] == (
        "mart.toml: epochs, learning_rate, weight_decay, milestones left out, all methods train alike"
    )


def test_an_evaluation_takes_the_attack(monkeypatch):
    monkeypatch.syspath_prepend(".")
    attack = importlib.import_module("noise").UniformNoise()
    network, images = build_model("convnet", 10, "attacked"), few_digits().test
    evaluation = evaluate(network, images, epsilon=0.1, attacks=[attack])
    assert evaluation.attacks == ("clean", "noise")
    again = evaluate(network, images, epsilon=0.1, attacks=[attack], batch_size=7)
    assert evaluation.predictions.equal(again.predictions)
