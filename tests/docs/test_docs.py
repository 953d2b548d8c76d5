"""The documents: names, links and flags exist, code runs, and figures are reproduced."""

import ast
import doctest
import pkgutil
import re
import runpy
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer

import absld
import absld.cli.app
import absld.config.resolve
import absld_min

ROOT = Path(absld_min.__file__).parent
DOCS, TESTS = ROOT / "docs", ROOT / "tests"
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted(DOCS.rglob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def read(path):
    return path.read_text(encoding="utf-8")


def flags_of_commands(command, name="absld"):
    """The flags of every command and group of the program, by its name."""
    options = [option for parameter in command.params for option in parameter.opts]
    options += [option for parameter in command.params for option in parameter.secondary_opts]
    flags = {name: {option for option in options if option.startswith("--")} | {"--help"}}
    for part, below in getattr(command, "commands", {}).items():
        flags |= flags_of_commands(below, f"{name} {part}")
    return flags


SBATCH = {"--job-name", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task"} | {
    *("--time", "--signal", "--requeue", "--open-mode")
}
FLAGS = flags_of_commands(typer.main.get_command(absld.cli.app.app)) | {
    "absld_min.py": {"--" + f.name.replace("_", "-") for f in fields(absld_min.Config)}
    | {"--help"},
    "torchrun": {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"},
    "sbatch": SBATCH,
    "#SBATCH": SBATCH,
    "scancel": {"--batch", "--signal"},
    "pip install": {"--upgrade", "--group", "--index-url"},
    "pip wheel": {"--no-deps"},
    "mkdocs build": {"--strict"},
    "tensorboard": {"--logdir"},
    "mypy": {"--strict"},
    "uv pip install": {"--python", "--resolution"},
    "uv venv": {"--python"},
    "device_step_times.py": {"--student", "--rounds", "--steps"},
}
PROGRAMS = "|".join(map(re.escape, sorted(FLAGS, key=len, reverse=True)))


def flags_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))


# --- Every page ---


@page
def test_flags_exist(path):
    assert flags_in(read(path)) <= set.union(*FLAGS.values())


@page
def test_commands_accept_the_flags_in_examples(path):
    text = re.sub(r"torchrun .*? -m absld", "absld", read(path).replace("\\\n", " "))
    _, *parts = re.split(rf"(?<![\w,-])({PROGRAMS})(?![\w,.-])", text)
    for program, rest in zip(parts[::2], parts[1::2], strict=True):
        arguments = re.split(r"[`\n]|&&", rest)[0]
        assert flags_in(arguments) <= FLAGS[program], f"{program}{arguments}"


@page
def test_links_have_a_target(path):
    for target in re.findall(r"\]\(([^)]+)\)", read(path)):
        file, _, heading = target.partition("#")
        if not target.startswith("https://"):
            assert (path.parent / file).exists(), target
            assert not heading or heading in anchors(path.parent / file), target


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", read(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_named_tests_exist(path):
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", read(path)):
        assert name in functions_of(file), f"{file}::{name}"


@page
def test_named_files_exist_and_define_the_names_given_with_them(path):
    for file in re.findall(r"`((?:absld|docs|tests)/[\w/.-]*)`", read(path)):
        assert (ROOT / file).exists(), file
    for name, file in re.findall(r"`(\w+)`\s+in\s+`((?:absld|tests)/[\w/]+\.py)`", read(path)):
        assert re.search(rf"^(class|def)?\s*{name}\b", read(ROOT / file), re.MULTILINE), (
            name,
            file,
        )


def functions_of(file):
    """The test functions in a file of the tests."""
    (path,) = TESTS.rglob(file)
    tree = ast.parse(read(path))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_public_name_has_an_entry_in_the_reference():
    text = "".join(read(path) for path in sorted((DOCS / "api").glob("*.md")))
    public = re.findall(
        r"^from \.\S+\.?\S* import (\w+) as", read(ROOT / "absld/__init__.pyi"), re.M
    )
    entries = re.findall(r"^::: absld\.(.+)$", text, re.MULTILINE)
    assert len(public) > 30 and set(public) <= set(entries)
    assert all(pkgutil.resolve_name(f"absld.{entry}") is not None for entry in entries)


def test_the_installation_names_every_extra():
    rows = re.findall(r"^\| (`.*?) \|", read(DOCS / "installation.md"), re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(rows))
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    assert sorted(named) == sorted(project["optional-dependencies"])


# --- README.md ---


def test_readme_is_short_and_its_links_work_outside_of_the_repository():
    """Each address is of a page of the site, or of a file of the repository, that is there."""
    text = read(ROOT / "README.md")
    assert len(text.splitlines()) < 100
    targets = re.findall(r"\]\(([^)]+)\)", text)
    files = "https://(?:github.com/absld/absld/blob|raw.githubusercontent.com/absld/absld)/main/"
    assert len(targets) > 20
    for target in targets:
        if name := re.fullmatch(r"https://absld\.github\.io/absld/(.+)/", target):
            assert (DOCS / f"{name[1]}.md").exists(), target
        elif name := re.fullmatch(f"{files}(.+)", target):
            assert (ROOT / name[1]).exists(), target
        else:
            assert target.startswith("https://arxiv.org/"), target


@pytest.mark.parametrize("picture", sorted(DOCS.rglob("*.svg")), ids=lambda path: path.name)
def test_pictures_load_nothing(picture):
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", read(picture))
    assert "http" not in text and "@import" not in text and "<script" not in text


# --- The site ---


@pytest.mark.parametrize(
    "fault",
    [
        "<a href='a/#none'>",
        "<a href='b/'>",
        "<a href='/a/'>",
        "<script src='none.js'>",
        "<img src='//else.org/a.png'>",
        "<img srcset='https://else.org/a.png 2x'>",
        "<iframe src='https://else.org'>",
        "<link rel='preconnect' href='https://else.org'>",
        "<p style='background: url(https://else.org/a.png)'>",
        "<style>@import 'https://else.org/a.css'</style>",
        "<script>fetch('https://else.org')</script>",
    ],
)
def test_the_check_of_the_site_finds(fault, tmp_path):
    pytest.importorskip("mkdocs", reason="pip install --group docs")
    faults_of_pages = runpy.run_path(str(DOCS / "hooks" / "checks.py"))["faults_of_pages"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "index.html").write_text("<h1 id='x'></h1><a href='mailto:a@b.org'></a>")
    good = "<a href='a/#x'></a><a href='/absld/a/'></a><a href='https://else.org'></a>"
    (tmp_path / "index.html").write_text(good)
    assert not list(faults_of_pages(tmp_path, "/absld/"))
    (tmp_path / "index.html").write_text(good + fault)
    assert len(list(faults_of_pages(tmp_path, "/absld/"))) == 1


# --- docs/contributing.md ---


@pytest.mark.parametrize(("head", "folder"), [("path in `absld/`", "absld"), ("folder", "tests")])
def test_the_tables_of_the_code_have_every_folder_and_module(head, folder):
    text = read(DOCS / "contributing.md").split(f"| {head} |")[1].split("\n\n")[0]
    rows = " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    parts = {f"{path.parent.name}/" for path in (ROOT / folder).glob("*/*.py")}
    if folder == "absld":
        parts |= {path.name for path in (ROOT / folder).glob("[!_]*.py")}
    assert sorted(re.findall(r"`(.*?)`", rows)) == sorted(parts)


# --- docs/your-own-loop.md ---


def run_python(path, namespace):
    """The python blocks of a page in order, in one namespace; errors have the page's lines."""
    text = read(path)
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for block in blocks:
        above = text[: block.start(1)].count("\n") * "\n"
        exec(compile(above + block[1], str(path), "exec"), namespace)
        yield block[1]


def test_code_of_your_own_loop_runs(tmp_path, monkeypatch, capsys):
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
        blocks = run_python(DOCS / "your-own-loop.md", given)
        next(blocks)
        assert absld.digest(student.state_dict()) != before[0]
        assert absld.digest(teacher.state_dict()) == before[1] and not teacher.training
        assert student.training and student.get_submodule("1").num_batches_tracked == 8
        assert (given["temperature"].adv != 1).any() and (given["temperature"].nat != 1).any()
        assert len(list(blocks)) >= 6  # runs the rest
    output = capsys.readouterr().out
    assert "logits must be (N,10), not (16, 9)\n" in output
    assert "Fairness(average=" in output
    assert len((tmp_path / "my-run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_code_of_the_readme_runs():
    given = {
        "teacher": absld.build_model("convnet", 10, "teacher").eval(),
        "x_nat": torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
        "labels": torch.arange(4),
        "adv_logits": torch.eye(4, 10),
        "nat_logits": torch.zeros(4, 10),
    }
    assert len(list(run_python(ROOT / "README.md", given))) == 1
    assert given["loss"] > 0 and (given["temperature"].nat == 1).all()


# --- docs/gradient-masking.md ---


def test_the_list_of_sanity_checks_has_every_check_in_order():
    listed = re.findall(
        r"^\d+\. \*\*(.*?)\.\*\* ", read(DOCS / "gradient-masking.md"), re.MULTILINE
    )
    calls = [
        node
        for node in ast.walk(ast.parse(read(ROOT / "absld" / "evaluation" / "sanity_checks.py")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Check"
    ]
    assert calls
    assert listed == [call.args[0].value for call in sorted(calls, key=lambda call: call.lineno)]


@pytest.mark.slow
def test_the_networks_that_fool_an_attack_are_found_by_the_checks_that_the_page_names():
    given = {}
    with torch.random.fork_rng(devices=[]):
        assert len(list(run_python(DOCS / "gradient-masking.md", given))) == 1
    named = {
        "as it is": set(),
        "rounds its pixels": {
            "no input gradient is zero",
            "a search without gradients finds nothing more",
            "accuracy falls with epsilon, to about zero",
        },
        "large logits": {"no input gradient is zero", "accuracy falls with epsilon, to about zero"},
        "softmax at its end": {"the outputs are logits"},
    }
    assert {name: set(given["warnings"][name]) for name in named} == named
    assert {"repeated forwards agree", "an image's output is its own"} <= set(
        given["warnings"]["random"]
    )


# --- docs/reading.md ---


def test_reading_shows_the_whole_file_in_its_order():
    """Every block is as `python docs/take_code.py` writes it."""
    take_code = runpy.run_path(str(DOCS / "take_code.py"))
    source, text = read(ROOT / "absld_min.py"), read(DOCS / "reading.md")
    assert take_code["with_code"](text, source) == text
    shown = [title for title, _ in take_code["BLOCK"].findall(text)]
    assert shown == list(take_code["definitions"](source))
    assert len(shown) == text.count("```python")


def test_every_step_has_its_equation_above_its_code():
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
def test_a_row_names_existing_symbols_and_tests(step, single, package, tests):
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


def test_every_tag_is_inside_a_symbol_that_the_table_lists():
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


def test_deviations_are_numbered_and_have_all_parts():
    entries = re.split(r"^## ", read(DOCS / "deviations.md"), flags=re.MULTILINE)[1:]
    assert [entry.split(".")[0] for entry in entries] == [
        str(number) for number in range(1, len(entries) + 1)
    ]
    for entry in entries:
        parts = re.findall(r"^\*\*(\w+)\.\*\* (\S+)", entry, re.MULTILINE)
        assert [name for name, _ in parts] == ["Release", "Effect", "Here", "Setting"], entry[:40]
        setting = entry.split("**Setting.**")[1]
        assert flags_in(setting) or setting.startswith(" None"), entry[:40]


def test_the_command_for_the_release_sets_the_released_variant():
    (command,) = re.findall(r"^    absld train (.*)$", read(DOCS / "deviations.md"), re.MULTILINE)
    names_and_values = re.findall(r"--(\S+) (\S+)", command)
    config = absld.config.resolve.resolve(
        {n.replace("-", "_"): value for n, value in names_and_values}
    )
    assert (config.fidelity, config.kl_scale, config.select_on) == ("released", 0.1, "test")


# --- Pages that compute their figures ---

WITH_FIGURES = [path for path in PAGES if "```pycon" in read(path)]


@pytest.mark.parametrize("path", WITH_FIGURES, ids=lambda path: path.name)
def test_figures_of_a_page_are_reproduced(path, capsys):
    blocks = re.findall(r"^```pycon\n(.*?)^```$", read(path), re.DOTALL | re.MULTILINE)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, path.name, str(path), 0)
    runner = doctest.DocTestRunner()
    with torch.random.fork_rng(devices=[]):
        runner.run(examples)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries >= len(blocks) > 0
