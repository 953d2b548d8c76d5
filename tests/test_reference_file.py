"""absld_min.py as a text: its budget, its imports, its tags, and that importing it does nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import absld_min

PATH = Path(absld_min.__file__)
TEXT = PATH.read_text(encoding="utf-8")
LINES = TEXT.splitlines()


def test_line_budget():
    assert len(LINES) <= 350
    assert max(map(len, LINES)) <= 100


def test_imports_are_the_standard_library_and_torch():
    roots = set()
    for node in ast.parse(TEXT).body:
        if isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    assert "torch" in roots
    assert roots - {"torch"} <= sys.stdlib_module_names


def test_importing_has_no_side_effect(tmp_path, single_thread):
    """Nothing printed or written, no generator touched, no heavy library loaded."""
    code = """
import random, signal, sys, torch
state, default, handler = torch.get_rng_state(), random.getstate(), signal.getsignal(signal.SIGTERM)
modules, dtype, threads = set(sys.modules), torch.get_default_dtype(), torch.get_num_threads()
import absld_min
assert torch.equal(torch.get_rng_state(), state) and random.getstate() == default
assert signal.getsignal(signal.SIGTERM) == handler
assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
loaded = {name.split(".")[0] for name in set(sys.modules) - modules}
assert not loaded & {"torchvision", "sklearn", "numpy", "PIL"}, loaded
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=single_thread, capture_output=True
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_every_step_is_tagged_where_it_is_computed():
    functions = {
        name: "".join(LINES[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(TEXT).body
        if (name := getattr(node, "name", None))
    }
    homes = {
        "D1": "soften", "D2": "pgd", "D3": "train_step", "D4": "absld_loss",
        "D5": "class_risk_sums", "D6": "update_temperature", "D7": "train",
    }  # fmt: skip
    tags = re.findall(r"# (D\d)\b", TEXT)
    assert sorted(tags) == sorted(homes)
    for tag, home in homes.items():
        assert f"# {tag}" in functions[home], tag


def test_order_of_the_parts():
    names = [
        "class Config", "def soften", "def soft_label_kl", "def absld_loss", "def project_linf",
        "def pgd", "def class_risk_sums", "def update_temperature", "def build_model",
        "def load_data", "def batches", "def evaluate", "def train(", "def main",
    ]  # fmt: skip
    places = [TEXT.index(f"\n{name}") for name in names]
    assert places == sorted(places)


def test_no_global_state_and_no_cuda_calls():
    assert ".cuda(" not in TEXT and "manual_seed_all" not in TEXT
    assert not re.search(r"^\s*global ", TEXT, re.MULTILINE)


def test_pairs_have_the_agreed_arguments():
    import inspect

    agreed = {
        "soften": "(teacher_logits, labels, temperature)",
        "soft_label_kl": "(student_logits, soft_labels)",
        "project_linf": "(x_adv, x_nat, epsilon)",
        "pgd": "(forward, objective, x_nat, noise, *, epsilon, step_size, steps)",
        "class_risk_sums": "(logits, labels, num_classes)",
        "update_temperature": "(temperature, class_risk, *, rate, lower, upper)",
        "fairness": "(class_accuracy, ddof=0)",
    }
    for name, signature in agreed.items():
        assert str(inspect.signature(getattr(absld_min, name))) == signature
    loss = inspect.signature(absld_min.absld_loss).parameters
    assert list(loss)[:4] == ["adv_logits", "nat_logits", "soft_adv", "soft_nat"]
    assert (loss["adv_weight"].default, loss["kl_scale"].default) == (5 / 6, 1.0)
