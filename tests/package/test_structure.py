"""The package as a house: who may import whom, and that importing it costs and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import absld

FOLDER = Path(absld.__file__).parent


def test_the_single_file_does_not_import_the_package():
    text = (FOLDER.parent / "absld_min.py").read_text(encoding="utf-8")
    assert "import absld" not in text and "from absld" not in text


def test_public_names_exist_and_are_documented():
    for name in absld.__all__:
        assert getattr(absld, name).__doc__, name
    with pytest.raises(AttributeError, match="No absld attribute nothing"):
        _ = absld.nothing


def test_type_checkers_see_every_public_name():
    """The names are loaded lazily; the stub beside them is what an editor knows."""
    tree = ast.parse((FOLDER / "__init__.pyi").read_text(encoding="utf-8"))
    seen = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == set(absld.__all__)
    assert (FOLDER / "py.typed").exists()


def test_importing_has_no_side_effect(tmp_path, single_thread):
    code = """
import random, signal, sys
import absld, absld.cli.app
assert "torch" not in sys.modules
import torch
state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
import absld.runs.training_run, absld.cli.training_view
assert torch.equal(torch.get_rng_state(), state)
assert signal.getsignal(signal.SIGTERM) == handler
assert (torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision) == (threads, matmul)
assert not {"torchvision", "sklearn"} & set(sys.modules)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=single_thread, capture_output=True
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []
