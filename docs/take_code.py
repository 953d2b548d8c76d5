"""Put the code of absld_min.py into docs/reading.md: python docs/take_code.py

A block that begins with ```python title="NAME" holds what defines NAME in the file, line for line.
"""

import ast
import re
from pathlib import Path

PAGE = Path(__file__).with_name("reading.md")
FILE = Path(__file__).parents[1] / "absld_min.py"
BLOCK = re.compile(r'^```python title="(\w+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def definitions(source: str) -> dict[str, str]:
    """Return the source lines of every top-level class, function and variable, in their order."""
    lines, spans = source.splitlines(keepends=True), dict[str, tuple[int, int]]()
    for node in ast.parse(source).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
        if name:
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            assert node.end_lineno
            spans[name] = (spans.get(name, (first, 0))[0], node.end_lineno)
    return {name: "".join(lines[first - 1 : last]) for name, (first, last) in spans.items()}


def with_code(page: str, source: str) -> str:
    """Return the page with the code of every block taken from the source."""
    found = definitions(source)
    return BLOCK.sub(lambda m: f'```python title="{m[1]}"\n{found[m[1]]}```', page)


if __name__ == "__main__":
    PAGE.write_text(
        with_code(PAGE.read_text(encoding="utf-8"), FILE.read_text(encoding="utf-8")),
        encoding="utf-8",
    )
