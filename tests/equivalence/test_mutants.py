"""The tests are tested: faults that people make in this method, put into a copy of the project.

Each fault is made in the single file and in the package, where both have the line, and the tests
named beside it must fail, on both. In the copy without a fault they pass.
"""

import gc
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from helpers.processes import processes

ROOT = Path(__file__).parents[2]


class Mutant(NamedTuple):
    """A fault as (file, text, what stands there instead), in each artefact, and its killers."""

    single: tuple[str, str, str] | None
    package: tuple[str, str, str]
    killers: list[str]


def alike(module, text, instead, killers):
    """A fault that is the same edit in both artefacts."""
    return apart(module, (text, instead), (text, instead), killers)


def apart(module, single, package, killers):
    return Mutant(("absld_min.py", *single), (f"absld/{module}.py", *package), killers)


def of_package(module, text, instead, killers):
    """A fault of what the single file does not have."""
    return Mutant(None, (f"absld/{module}.py", text, instead), killers)


def on_both(test):
    """The two runs of a law, on the single file and on the package."""
    return [f"tests/laws/{test}[{impl}]" for impl in ("single file", "package")]


D3 = "adv_logits, nat_logits = student(x_adv), student(x_nat)  # D3"
STEP = "test_a_step_is_the_algorithm", "test_a_step_of_absld_is_the_algorithm"
PAPER = [
    f"tests/single_file/test_steps.py::{STEP[0]}[paper]",
    f"tests/equivalence/test_methods.py::{STEP[1]}[paper]",
]
RELEASED = [test.replace("paper", "released") for test in PAPER]
FORWARDS = [
    "tests/single_file/test_steps.py::test_a_step_forwards_the_adversarial_images_first_and_apart",
    "tests/equivalence/test_methods.py::test_a_step_forwards_the_adversarial_images_first_and_apart[absld]",
]

MUTANTS = {
    "labels are made in the teacher's buffer": alike(
        "temperature",
        "teacher_logits / temperature.gather(0, labels).unsqueeze(1)",
        "teacher_logits.div_(temperature.gather(0, labels).unsqueeze(1))",
        on_both("test_loss.py::test_two_soft_labels_share_nothing"),
    ),
    "mean over the classes, too": apart(
        "loss",
        ('reduction: str = "batchmean"', 'reduction: str = "mean"'),
        ('soft_labels, reduction="batchmean"', 'soft_labels, reduction="mean"'),
        on_both("test_loss.py::test_loss_is_the_formula"),
    ),
    "attack in train mode": apart(
        "attack",
        ("    model.eval()  # keeps", "    model.train()  # keeps"),
        ("        model.eval()\n", "        model.train()\n"),
        on_both("test_attack.py::test_training_attack_keeps_batch_norm_out_of_it"),
    ),
    "box before ball": alike(
        "attack",
        "x_adv.clamp(x_nat - epsilon, x_nat + epsilon).clamp(0, 1)",
        "x_adv.clamp(0, 1).clamp(x_nat - epsilon, x_nat + epsilon)",
        on_both("test_attack.py::test_projection_is_the_formula"),
    ),
    "epsilon in 0..255": alike(
        "attack",
        "x_nat - epsilon, x_nat + epsilon",
        "x_nat - 255 * epsilon, x_nat + 255 * epsilon",
        on_both("test_attack.py::test_projection_is_the_formula"),
    ),
    "descent": apart(
        "attack",
        ("step_size * gradient.sign()", "-step_size * gradient.sign()"),
        ("step_size * steepest(gradient)", "-step_size * steepest(gradient)"),
        on_both("test_attack.py::test_closed_form_of_a_linear_model"),
    ),
    "natural before adversarial": alike(
        "methods/absld", D3, "nat_logits, adv_logits = student(x_nat), student(x_adv)", FORWARDS
    ),
    "one forward of both": alike(
        "methods/absld",
        D3,
        "adv_logits, nat_logits = student(torch.cat([x_adv, x_nat])).chunk(2)",
        FORWARDS,
    ),
    "temperature on the student, too": apart(
        "methods/absld",
        (D3, D3.replace("(x_adv)", "(x_adv) / temperature[0][labels].unsqueeze(1)")),
        (D3, D3.replace("(x_adv)", "(x_adv) / self.temperature.adv[labels].unsqueeze(1)")),
        PAPER,
    ),
    "one temperature for both labels": apart(
        "temperature",
        ("for row in temperature)", "for row in temperature[[0, 0]])"),
        ("soften(logits, labels, nat)", "soften(logits, labels, adv)"),
        PAPER,
    ),
    "the release read as the paper": alike(
        "temperature", 'fidelity == "released"', 'fidelity == "read"', RELEASED
    ),
    "risks set, not added": apart(
        "metrics",
        (
            "torch.where(member, risk.unsqueeze(1), 0).sum(0)",
            "risk.new_zeros(num_classes).index_put((labels,), risk)",
        ),
        (
            "torch.where(member, values.unsqueeze(1), 0).sum(0)",
            "values.new_zeros(num_classes).index_put((labels,), values)",
        ),
        on_both("test_temperature.py::test_class_risk_is_the_formula"),
    ),
    "no bounds": alike(
        "temperature",
        ".clamp(lower, upper)  # D6",
        "  # D6",
        on_both("test_temperature.py::test_steps_from_one_to_the_bounds"),
    ),
    "hard classes get warmer": apart(
        "temperature",
        ("temperature - rate * gap", "temperature + rate * gap"),
        ("temperature - step if", "temperature + step if"),
        on_both("test_temperature.py::test_an_absent_class_stays_and_does_not_count"),
    ),
    "a relative step to first order": of_package(
        "temperature",
        "temperature * torch.exp(-step)",
        "temperature * (1 - step)",
        [
            "tests/laws/test_temperature.py::"
            "test_a_relative_update_moves_logarithms_as_an_absolute_one_moves_temperatures",
            "tests/laws/test_temperature.py::test_update_is_the_formula[relative]",
            "tests/equivalence/test_peers.py::test_two_epochs_of_two_steps_are_those_by_hand[start and move-absld]",
        ],
    ),
    "temperatures start at 1 whatever is set": of_package(
        "methods/absld",
        "            start=start,\n",
        "",
        [
            f"tests/equivalence/test_peers.py::test_two_epochs_of_two_steps_are_those_by_hand[start-{name}]"
            for name in ("absld", "absld-weights", "absld-margins")
        ],
    ),
    "an update in every batch": apart(
        "methods/absld",
        (
            "                risks, counts = risks + sums, counts + members\n",
            "                risks, counts = risks + sums, counts + members\n"
            "                temperature = update_temperature(\n"
            "                    temperature, sums / members, rate=0.1, lower=0.5, upper=5.0)\n",
        ),
        (
            "        self.temperature.observe(adv_logits, nat_logits, labels)\n",
            "        self.temperature.observe(adv_logits, nat_logits, labels)\n"
            "        self.temperature.step()\n",
        ),
        [
            "tests/single_file/test_steps.py::test_temperatures_move_once_an_epoch_by_the_mean_risk",
            "tests/equivalence/test_methods.py::test_absld_moves_its_temperatures_once_an_epoch",
        ],
    ),
    "uniform start": apart(
        "data/augmentation",
        ("0.001 * torch.randn(", "0.002 * torch.rand("),
        ("torch.randn if start", "torch.rand if start"),
        [
            "tests/laws/test_augmentation.py::test_images_stay_in_range_and_noise_is_small",
            "tests/equivalence/test_equivalence.py::test_batches_are_equal",
        ],
    ),
}
KILLERS = sorted({killer for mutant in MUTANTS.values() for killer in mutant.killers})


def outcome(folder, edits, tests):
    """(passed, failed) of some tests in a copy of the project with some edits."""
    for part in ("absld", "tests"):
        shutil.copytree(ROOT / part, folder / part)  # with the code that is compiled already
    for part in ("absld_min.py", "pyproject.toml"):
        shutil.copy(ROOT / part, folder)
    for file, text, instead in edits:
        before = (folder / file).read_text(encoding="utf-8")
        assert before.count(text) == 1, f"{file} has {text!r} {before.count(text)} times"
        (folder / file).write_text(before.replace(text, instead), encoding="utf-8")
    child = processes.Process(target=run_tests, args=(folder, tests))
    child.start()
    child.join(120)
    said = (folder / "said").read_text(encoding="utf-8")
    summary = said.splitlines()[-1]
    passed, failed = (re.search(rf"(\d+) {word}", summary) for word in ("passed", "failed"))
    assert passed or failed, said
    return tuple(int(count[1]) if count else 0 for count in (passed, failed))


def run_tests(folder, tests):
    """pytest in a child of the server, which has imported torch already: with the copy's modules
    in place of the project's."""
    gc.freeze()  # collecting what the server has imported takes longer than the tests
    os.chdir(folder)
    os.environ["HYPOTHESIS_PROFILE"] = "mutants"
    sys.path.insert(0, str(folder))
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT)):
            del sys.modules[name]
    output = os.open("said", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    pytest.main(["-n", "0", "--assert=plain", "-p", "no:cacheprovider", "--tb=no", *tests])
    sys.stdout.flush()


def test_the_killers_pass_without_a_fault(tmp_path):
    assert outcome(tmp_path, [], KILLERS) == (len(KILLERS), 0)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_killer_fails_on_its_fault(name, tmp_path):
    mutant = MUTANTS[name]
    edits = [edit for edit in (mutant.single, mutant.package) if edit]
    assert outcome(tmp_path, edits, mutant.killers) == (0, len(mutant.killers))
