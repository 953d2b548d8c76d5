"""The documents are true where that can be tried: names exist, code runs, figures come out."""

import ast
import doctest
import pkgutil
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import absld
import absld.config.settings
import absld_min

ROOT = Path(absld_min.__file__).parent
DOCS, TESTS = ROOT / "docs", ROOT / "tests"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def read(path):
    return path.read_text(encoding="utf-8")


def flags_of(config):
    return {"--" + field.name.replace("_", "-") for field in fields(config)} | {"--help"}


FLAGS = {
    "absld_min.py": flags_of(absld_min.Config),
    "absld train": flags_of(absld.config.settings.Config)
    | {"--recipe", "--resume", "--json", "--debug"},
    "absld evaluate": flags_of(absld.config.settings.EvaluationConfig)
    | {
        "--eps",
        "--each",
        "--no-checks",
        "--against",
        "--against-model",
        "--strict",
        "--json",
        "--debug",
    },
    "absld report": {"--out", "--debug", "--help"},
    "absld bench": {"--student", "--teacher-model", "--batch-size", "--image-size", "--rounds"}
    | {"--no-compile", "--device", "--json", "--debug"},
    "torchrun": {"--nproc-per-node"},
    "absld compare": flags_of(absld.config.settings.Config) - {"--method", "--seed"}
    | {"--methods", "--seeds", "--baseline", "--attacks", "--examples", "--no-checks"}
    | {"--recipe", "--json", "--debug"},
    "absld recipe": {"--method", "--help"},
    "absld teacher": flags_of(absld.config.settings.EvaluationConfig)
    - {"--attacks", "--split", "--restarts", "--each", "--checks", "--out"}
    | {"--eps", "--json", "--debug", "--teacher", "--bank-gib"},
}


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


# --- Every page ---


@page
def test_flags_exist(path):
    assert flags_in(read(path)) <= set.union(*FLAGS.values())


@page
def test_commands_have_the_flags_they_are_given(path):
    text = re.sub(r"torchrun .*? -m absld", "absld", read(path).replace("\\\n", " "))
    for program, rest in re.findall(
        r"(absld_min\.py|absld (?:train|evaluate|report|compare|bench|recipe|teacher))\b([^`\n]*)",
        text,
    ):
        assert flags_in(rest) <= FLAGS[program], f"{program}{rest}"


@page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", read(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@page
def test_tests_that_are_named_exist(path):
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", read(path)):
        assert name in functions_of(file), f"{file}::{name}"


def functions_of(file):
    """The test functions in a file of the tests."""
    tree = ast.parse(read(TESTS / file))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_index_has_every_page():
    linked = {
        (DOCS / target).resolve()
        for target in re.findall(r"\]\(([^)]+)\)", read(DOCS / "index.md"))
    }
    assert {path.resolve() for path in PAGES if path.name != "index.md"} <= linked


def test_readme_names_every_part_of_the_file():
    rows = re.findall(r"^\| (`.*`) \|", read(ROOT / "README.md"), re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(names) > 15
    assert all(hasattr(absld_min, name) for name in names)


# --- docs/using-it-in-your-loop.md ---


def run_python(path, namespace):
    """The python blocks of a page in order, in one namespace; errors have the page's lines."""
    text = read(path)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for block in blocks:
        above = text[: block.start(1)].count("\n") * "\n"
        exec(compile(above + block[1], str(path), "exec"), namespace)
        yield block[1]


def test_the_loop_runs(tmp_path, monkeypatch, capsys):
    """What the page leaves to the reader is here: networks, an optimiser, a loader, epochs."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        student, teacher = (absld.build_model("convnet", 10, role) for role in ("ours", "theirs"))
        images, labels = torch.rand(32, 3, 8, 8), torch.arange(32) % 10
        given = {
            "student": student,
            "teacher": teacher,
            "optimizer": torch.optim.SGD(student.parameters(), lr=0.1),
            "loader": list(zip(images.split(16), labels.split(16), strict=True)),
            "epochs": 2,
        }
        before = absld.digest(student.state_dict()), absld.digest(teacher.state_dict())
        blocks = run_python(DOCS / "using-it-in-your-loop.md", given)
        next(blocks)
        assert absld.digest(student.state_dict()) != before[0]
        assert absld.digest(teacher.state_dict()) == before[1] and not teacher.training
        assert student.training and student.get_submodule("1").num_batches_tracked == 8
        assert (given["temperature"].adv != 1).any() and (given["temperature"].nat != 1).any()
        assert len(list(blocks)) >= 6  # runs the rest
    said = capsys.readouterr().out
    assert "logits must be (N,10), not (16, 9)\n" in said
    assert "Fairness(average=" in said
    assert len((tmp_path / "my-run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_readme_s_calls_run():
    given = {
        "teacher": absld.build_model("convnet", 10, "teacher").eval(),
        "x_nat": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "labels": torch.arange(4),
        "adv_logits": torch.eye(4, 10),
        "nat_logits": torch.zeros(4, 10),
    }
    assert len(list(run_python(ROOT / "README.md", given))) == 1
    assert given["loss"] > 0 and (given["temperature"].nat == 1).all()


# --- docs/reading.md ---


def test_the_page_has_the_whole_file_in_its_order():
    """Every block is as `python docs/take_code.py` writes it."""
    take_code = runpy.run_path(str(DOCS / "take_code.py"))
    source, text = read(ROOT / "absld_min.py"), read(DOCS / "reading.md")
    assert take_code["with_code"](text, source) == text
    shown = [title for title, _ in take_code["BLOCK"].findall(text)]
    assert shown == list(take_code["definitions"](source))
    assert len(shown) == text.count("```python")


def test_every_step_has_its_equation_right_above_its_lines():
    above, seen = "", set()
    for part in re.split(
        r"^(```python title=.*?^```)$", read(DOCS / "reading.md"), flags=re.M | re.S
    ):
        if steps := set(re.findall(r"# (D\d)$", part, re.MULTILINE)):
            assert above.count("$$") >= 2 and above.count("$$") % 2 == 0, steps
            assert steps <= set(re.findall(r"D\d", above)), steps
            seen |= steps
        above = part
    assert seen == set(STEPS)


# --- docs/steps.md ---


def table():
    """Step, symbol of the single file, symbol of the package, tests, of every row."""
    rows = []
    for line in read(DOCS / "steps.md").splitlines():
        if re.match(r"\| D\d ", line):
            step, _, single, package, tests = (
                cell.strip() for cell in line.strip("|").split(" | ")
            )
            named = re.findall(r"`(\S+)::(\w+)`", tests)
            rows.append((step, single.strip("`"), package.strip("`"), named))
    return rows


ROWS = table()
STEPS = [f"D{number}" for number in range(1, 8)]


def test_the_table_has_every_step_in_order():
    assert list(dict.fromkeys(row[0] for row in ROWS)) == STEPS
    assert [row[0] for row in ROWS] == sorted(row[0] for row in ROWS)


@pytest.mark.parametrize(
    ("step", "single", "package", "tests"), ROWS, ids=[f"{row[0]} {row[2]}" for row in ROWS]
)
def test_a_row_leads_to_both_symbols_and_to_its_tests(step, single, package, tests):
    assert callable(getattr(absld_min, single))
    assert callable(pkgutil.resolve_name(f"absld.{package}"))
    assert tests
    for file, name in tests:
        assert name in functions_of(file), f"{file}::{name}"


def tags(path):
    """(step, the innermost function or class around it, as a dotted name) of each `# Dn`."""
    text = read(path)
    spans = []

    def walk(node, name):
        for child in ast.iter_child_nodes(node):
            inside = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{name}.{child.name}".strip(".")
                spans.append((child.lineno, child.end_lineno, inside))
            walk(child, inside)

    walk(ast.parse(text), "")
    for number, line in enumerate(text.splitlines(), 1):
        for step in re.findall(r"# (D\d)\b", line):
            around = [name for start, end, name in spans if start <= number <= end]
            yield step, around[-1] if around else ""


def test_every_tag_lies_inside_a_symbol_of_its_step():
    single = list(tags(ROOT / "absld_min.py"))
    package = [
        (step, f"{module}.{name}")
        for path in sorted((ROOT / "absld").rglob("*.py"))
        for module in [".".join(path.relative_to(ROOT / "absld").with_suffix("").parts)]
        for step, name in tags(path)
    ]
    for column, found in ((1, single), (2, package)):
        assert sorted({step for step, _ in found}) == STEPS
        for step, name in found:
            named = [row[column] for row in ROWS if row[0] == step]
            assert any(f"{name}.".startswith(f"{symbol}.") for symbol in named), (step, name)


# --- docs/deviations.md ---


def test_deviations_are_numbered_and_whole():
    entries = re.split(r"^## ", read(DOCS / "deviations.md"), flags=re.MULTILINE)[1:]
    assert [entry.split(".")[0] for entry in entries] == [
        str(number) for number in range(1, len(entries) + 1)
    ]
    for entry in entries:
        parts = re.findall(r"^\*\*(\w+)\.\*\* (\S+)", entry, re.MULTILINE)
        assert [name for name, _ in parts] == ["Release", "Effect", "Here", "Setting"], entry[:40]
        setting = entry.split("**Setting.**")[1]
        assert flags_in(setting) or setting.startswith(" None"), entry[:40]


def test_the_release_on_our_code_is_what_its_flags_say():
    (command,) = re.findall(r"^    absld train (.*)$", read(DOCS / "deviations.md"), re.MULTILINE)
    names_and_values = re.findall(r"--(\S+) (\S+)", command)
    config = absld.config.resolve.resolve(
        {n.replace("-", "_"): value for n, value in names_and_values}
    )
    assert (config.fidelity, config.kl_scale, config.select_on) == ("released", 0.1, "test")


def test_the_figures_of_the_deviations_come_out(capsys):
    path = DOCS / "deviations.md"
    blocks = re.findall(r"^```pycon\n(.*?)^```$", read(path), re.DOTALL | re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, path.name, str(path), 0)
    runner = doctest.DocTestRunner()
    with torch.random.fork_rng(devices=[]):
        runner.run(examples)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries > 30
