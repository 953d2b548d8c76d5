"""The package as a whole: imports, public names, size of modules, who reads files of objects.

Which folder may import which is held by import-linter's contracts in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import absld

FOLDER = Path(absld.__file__).parent
TREES = {
    path.relative_to(FOLDER).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(FOLDER.rglob("*.py"))
}
DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


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
    stub = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub == set(absld.__all__)
    assert (FOLDER / "py.typed").exists()


def test_importing_has_no_side_effect_and_imports_no_torch(tmp_path, single_thread):
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
assert not {"torchvision", "sklearn", "matplotlib", "jinja2"} & set(sys.modules)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=single_thread, capture_output=True
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == []


def test_messages_name_pages_of_the_site_that_exist():
    """Who installed the package has no folder docs."""
    texts, comments, pages = set(), set(), set()
    for node in (node for tree in TREES.values() for node in ast.walk(tree)):
        # A string that is a statement is a docstring: for those who have the repository.
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node)
        elif isinstance(node, ast.Expr):
            comments.add(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "page_of":
            pages.add(node.args[0].value)
    assert not [text.value for text in texts - comments if "docs/" in text.value]
    docs = FOLDER.parent / "docs"
    assert "tracking" in pages and not {
        page for page in pages if not (docs / f"{page}.md").exists()
    }


# --- Size and language ---


def test_no_module_is_longer_than_350_lines():
    lines = {
        path.relative_to(FOLDER).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in FOLDER.rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count > 350}


def test_no_function_is_longer_than_60_lines():
    lengths = {
        f"{module}: {node.name}": node.end_lineno - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: count for name, count in lengths.items() if count > 60}


def docstrings():
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, DEFINITIONS | ast.Module) and (text := ast.get_docstring(node)):
                yield f"{module}: {getattr(node, 'name', 'module')}", text


def test_docstrings_name_sources_that_users_have():
    private = re.compile(r"\bpeers\b|\b[Ss]ource: spec|\bspec[,.]")
    assert not {name for name, text in docstrings() if private.search(text)}


def test_docstrings_begin_with_a_name_or_a_verb():
    clauses = re.compile(r"(What|Those|How|Is|Are|Does|Do|Has|Whose|Who|That) ")
    assert not {name for name, text in docstrings() if clauses.match(text)}


# --- Files that could run code ---


def dotted(node):
    """`a.b.c` as text, or None."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return base and f"{base}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
READERS = re.compile(
    r"torch\.(load|jit\.load|hub\.load\w*|export\.load|package\..+|serialization\.(?!safe).+)"
    r"|(np|numpy)\.(load|loadtxt|genfromtxt|fromregex)|pd\..+|yaml\..*load\w*|eval|exec|compile"
)


def test_only_the_loading_function_reads_files_of_objects():
    """`torch.load` is called once, with weights_only; nothing else in the package unpickles."""
    calls, imported = [], set()
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and READERS.fullmatch(dotted(node.func) or ""):
                arguments = {key.arg: ast.unparse(key.value) for key in node.keywords}
                calls.append((module, dotted(node.func), arguments.get("weights_only")))
            elif isinstance(node, ast.Import):
                imported |= {(module, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((module, (node.module or "").split(".")[0]))
                assert not (
                    node.module == "torch"
                    and {alias.name for alias in node.names} & {"load", "jit"}
                ), module
    assert calls == [
        ("runs/export_formats.py", "torch.export.load", None),  # of bytes that it has just made
        ("storage/checkpoint.py", "torch.load", "True"),
    ]
    assert not {pair for pair in imported if pair[1] in UNPICKLERS}
    assert {module for module, name in imported if name == "safetensors"} == {
        "storage/safetensors_files.py"
    }


OPENERS = re.compile(
    r"(.+\.)?(open|fdopen|read_text|read_bytes|write_text|write_bytes|touch|symlink_to|hardlink_to)"
    r"|os\.(replace|rename|link|symlink|mkfifo)|shutil\.(copy\w*|move)|(torch|np)\.(from_file|fromfile)"
    r"|np\.memmap|.+\.imread"
)
OWN = ("read_bytes", "write_text")  # functions of storage, which other modules import


def test_only_the_functions_of_storage_open_files_of_a_run():
    """They open nothing but regular files, and write through no link."""
    calls = {
        (module, ast.unparse(node.func))
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and OPENERS.fullmatch(name := ast.unparse(node.func))
        and name not in OWN
        and module not in ("storage/files.py", "storage/opening.py")
    }
    assert calls == {
        # The package's own files, and the terminal.
        ("evaluation/results.py", "Path(__file__).with_name('evaluation.schema.json').read_bytes"),
        ("report/figures.py", "(FOLDER / 'templates/report.css').read_text"),
        ("cli/recipe_view.py", "RECIPE_FILES[name].read_text"),
        ("cli/output.py", "open"),
        ("cli/printing.py", "open"),
        ("cli/printing.py", "os.open"),
        ("runs/export_formats.py", "open"),  # os.devnull
        # Images, by an allow-list of formats, and the names of Tiny ImageNet's classes.
        ("data/image_files.py", "Image.open"),
        # An archive whose hash is the published one, from which `replacing` writes.
        ("data/archives.py", "tarfile.open"),
        ("data/archives.py", "shutil.copyfileobj"),
        # How much memory the system has.
        ("data/placement.py", "Path('/proc/meminfo').read_text"),
        ("data/placement.py", "Path(limit).read_text"),
        # A file that did not exist, and one that `open_regular` has looked at.
        ("engine/logit_cache.py", "path.open"),
        ("engine/logit_cache.py", "LogitCache.open"),
        ("engine/logit_cache.py", "torch.from_file"),
        ("data/mapped.py", "np.memmap"),
    }


def test_only_names_that_a_user_typed_are_imported():
    """`load_network` and `build_method` are given no name of a file: test_names_from_files.py."""
    calls = {
        (module, name)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.fullmatch(
            r"(importlib\.)?import_module|__import__|runpy\..+|import_object",
            name := dotted(node.func) or "",
        )
    }
    assert calls == {
        ("config/imports.py", "importlib.import_module"),
        ("methods/registry.py", "import_object"),
        ("models/loading.py", "import_object"),
    }
