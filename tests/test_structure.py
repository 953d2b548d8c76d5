"""The package as a house: who may import whom, and that importing it costs and changes nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import absld

FOLDER = Path(absld.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py"))

# Each module may import those of the rows above its own; leaves never import one another.
LAYERS = [
    {"errors"},
    {"config", "seeding", "summary", "class_mean", "importing", "ranks", "cuda_graph", "stopwatch"},
    {"attack", "temperature", "loss", "metrics", "models", "data", "checkpoint", "folding"}
    | {"reweighting", "comparison_tables", "calibration"}
    | {"svg", "plots"},
    {"autoattack", "validation", "methods", "loading", "sources", "comparison_plot", "runtime"},
    {"suite", "teacher", "ceilings"},
    {"evaluation", "bank"},
    {"trainer"},
    {"sanity", "document", "environment"},
    {"assessment", "job", "report", "bench"},
    {"view", "comparison", "teacher_check", "bench_view"},
    {"evaluation_view", "comparison_view"},
    {"teacher_view"},
    {"cli"},
    {"__main__"},
]
TERMINAL = {"typer": {"cli"}, "rich": {"view", "evaluation_view", "comparison_view"}}


def imported(module):
    """All modules that are imported somewhere in a file, inside functions, too."""
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "absld":
                yield from (f"absld.{name.name}" for name in node.names)
            else:
                yield node.module


def test_every_module_has_its_layer():
    assert sorted(set.union(*LAYERS) | {"__init__"}) == MODULES


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__"])
def test_a_module_imports_only_from_the_layers_below(module):
    own = next(number for number, layer in enumerate(LAYERS) if module in layer)
    allowed = set().union(*LAYERS[:own])
    for name in imported(module):
        first, _, rest = name.partition(".")
        # Neither artefact imports the other, but the bench measures both.
        assert first != "absld_min" or module == "bench"
        if first == "absld" and rest:
            assert rest.split(".")[0] in allowed, f"{module} imports {name}"
        for library, homes in TERMINAL.items():
            assert first != library or module in homes, f"{module} imports {library}"


def test_the_single_file_does_not_import_the_package():
    text = (FOLDER.parent / "absld_min.py").read_text(encoding="utf-8")
    assert "import absld" not in text and "from absld" not in text


def test_public_names_exist_and_say_what_they_are():
    for name in absld.__all__:
        value = getattr(absld, name)
        assert isinstance(value, str) or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = absld.nothing


def test_type_checkers_see_every_public_name():
    """The names are loaded lazily; those under TYPE_CHECKING are what an editor knows."""
    tree = ast.parse((FOLDER / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("absld.")
        for alias in node.names
    }
    assert seen | {"__version__"} == set(absld.__all__)
    assert (FOLDER / "py.typed").exists()


def test_importing_has_no_side_effect(tmp_path, single_thread):
    code = """
import random, signal, sys
import absld, absld.cli
assert "torch" not in sys.modules
import torch
state, handler = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
import absld.job, absld.view
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
