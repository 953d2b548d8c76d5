"""What the documents name exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

import absld_min

ROOT = Path(absld_min.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


@page
def test_flags_exist(path):
    known = {"--" + field.name.replace("_", "-") for field in fields(absld_min.Config)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text(encoding="utf-8")))
    assert named <= known | {"--help"}


@page
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_readme_names_every_part_of_the_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*`) \|", text, re.MULTILINE)
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert len(names) > 15
    assert all(hasattr(absld_min, name) for name in names)
