"""docs/contributing.md: its method, recipe and attack, as a user would put them into a folder."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.plain_methods import ATTACK, C, batch, linear, parameters, softmax
from helpers.program import few_digits, main, use_few_digits

import absld_min
from absld.config.files import read_recipe
from absld.config.resolve import resolve
from absld.config.settings import TrainConfig
from absld.engine.cuda_graph import partial_tensors
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
    assert set(blocks) == {"score.py", "score.toml", "noise.py"}
    for name, block in blocks.items():
        Path(name).write_text(block)
    use_few_digits(monkeypatch)
    yield
    for name in ("score", "noise"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def loss_by_hand(weight, bias, x_nat, x_adv, labels):
    """The definition, image by image, in NumPy."""
    q, p = (softmax(x @ weight.T + bias) for x in (x_nat, x_adv))
    noisy = np.full(C, 0.3 / (C - 1))
    noisy[0] = 0.7
    bound = sum((noisy - np.eye(C)[0]) ** 2)
    total = 0.0
    for clean, attacked, y in zip(q, p, labels, strict=True):
        distance = sum((clean - np.eye(C)[y]) ** 2) + 6 * sum((attacked - clean) ** 2)
        total += max(0.0, distance - bound)
    return total / len(labels)


def test_the_class_is_the_definition():
    """The loss, and its gradient by differences; the attack climbs the squared distance."""
    given = batch(3)
    student, seen = linear(1), []
    student.register_forward_pre_hook(lambda module, x: seen.append(x[0].detach().clone()))
    step = build_method(TrainConfig(method="score:Score"), C).step(student, None, given, ATTACK)
    x_adv, x_nat = (x.flatten(1).numpy() for x in seen[-2:])
    labels = given.labels.numpy()
    weight, bias = parameters(student)
    expected = loss_by_hand(weight, bias, x_nat, x_adv, labels)
    assert step.loss.item() == pytest.approx(expected, rel=1e-10)
    assert len(step.parts) == 2 and all(part > 0 for part in step.parts.values())

    x = given.x_nat.flatten(1).numpy() + given.noise.flatten(1).numpy()
    clean = given.x_nat.flatten(1).numpy()
    q = softmax(clean @ weight.T + bias)
    for _ in range(ATTACK.steps):
        p = softmax(x @ weight.T + bias)
        slope = p * (p - q - (p * (p - q)).sum(1, keepdims=True)) @ weight
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


def test_its_attack_can_be_a_cuda_graph():
    """As the page says of a plain function of the logits and tensors given by `partial`."""
    attack, objectives = ATTACK, []

    def noting(student, objective, *images):
        objectives.append(objective)
        return attack(student, objective, *images)

    build_method(TrainConfig(method="score:Score"), C).step(linear(1), None, batch(0), noting)
    assert partial_tensors(objectives[0]) is not None


def test_the_recipe_is_the_published_one():
    config = resolve(read_recipe("score.toml") | {"dataset": "cifar10"})
    assert config.milestone_epochs() == [100, 105] and config.epochs == 110
    assert (config.learning_rate, config.weight_decay) == (0.05, 5e-4)
    assert config.epsilon * config.relative_step_size * 255 == pytest.approx(2)
    assert (config.student, config.start) == ("resnet18", "normal")


def test_it_trains_and_resumes_and_compares(capfd):
    recipe = ["--recipe", "score.toml", "--epochs", "1", *TINY]
    assert main("train", *recipe, "--json") == 0
    first = json.loads(capfd.readouterr().out)
    assert first["config"]["method"] == "score:Score" and first["teacher_sha256"] is None
    (run,) = Path("runs").glob("digits-score-Score-seed0-*")
    record = json.loads((run / "metrics.jsonl").read_text())
    assert record["clean_distance"] > 0 and record["adv_distance"] >= 0
    assert main("train", *recipe, "--json", "--resume") == 0
    assert json.loads(capfd.readouterr().out)["student_sha256"] == first["student_sha256"]
    given = ["--epochs", "1", *TINY, "--attacks", "fgsm", "--no-checks"]
    assert main("compare", "--methods", "sat,score.toml", *given, "--json") == 0
    results = json.loads(capfd.readouterr().out)
    assert [method["name"] for method in results["methods"]] == ["sat", "score"]
    assert results["notes"][0] == (
        "score: score:Score; "
        "epochs, learning_rate, weight_decay, milestones left out, all methods train alike"
    )


def test_an_evaluation_takes_the_attack(monkeypatch):
    monkeypatch.syspath_prepend(".")
    attack = importlib.import_module("noise").UniformNoise()
    network, images = build_model("convnet", 10, "attacked"), few_digits().test
    evaluation = evaluate(network, images, epsilon=0.1, attacks=[attack])
    assert evaluation.attacks == ("clean", "noise")
    again = evaluate(network, images, epsilon=0.1, attacks=[attack], batch_size=7)
    assert evaluation.predictions.equal(again.predictions)
