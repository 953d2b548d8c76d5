"""The package as others get it: its version, its extras, the notes of a release.

.ci/package builds it, installs it and uses it.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import absld

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_citation_and_changelog_have_the_version_of_the_package():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    newest = re.search(r"^## ([\d.]+),", CHANGELOG, re.MULTILINE)
    assert cited and newest and cited[1] == newest[1] == absld.__version__
    assert PROJECT["dynamic"] == ["version"]


def test_the_extra_all_has_each_other_extra_of_a_user():
    (requirement,) = EXTRAS["all"]
    names = re.fullmatch(r"absld\[(.+)\]", requirement)
    assert names and set(names[1].split(",")) == set(EXTRAS) - {"all", "test"}


@pytest.mark.parametrize(
    ("head", "tag", "printed", "error"),
    [
        ("9.8.7, 2031-01-02", "v9.8.7", "* New.\n", ""),
        ("9.8.7, 2031-01-02", "v9.8.6", "", "the tag is v9.8.6, the package 9.8.7"),
        ("9.8.7, unreleased", "v9.8.7", "", 'needs one section "## 9.8.7, YYYY-MM-DD"'),
    ],
    ids=["a release", "another tag", "no date"],
)
def test_the_notes_of_a_release_are_its_dated_section(tmp_path, head, tag, printed, error):
    (tmp_path / ".ci").mkdir()
    script = tmp_path / ".ci/release_notes.py"
    script.write_bytes((ROOT / ".ci/release_notes.py").read_bytes())
    changelog = f"# Changelog\n\n## {head}\n\n* New.\n\n## 9.8.6, 2030-01-02\n\n* Old.\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    command = [sys.executable, str(script), tag, "dist/absld-9.8.7-py3-none-any.whl"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, bool(result.returncode)) == (printed, bool(error))
    assert error in result.stderr
