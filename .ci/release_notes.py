"""Print what CHANGELOG.md says of a release: python .ci/release_notes.py vX.Y.Z WHEEL

Fails if the tag is not the version of the wheel, or if the changelog has no date for it.
"""

import re
import sys
from pathlib import Path

tag, wheel = sys.argv[1:]
version = Path(wheel).name.split("-")[1]
if tag != f"v{version}":
    sys.exit(f"the tag is {tag}, the package {version}: set __version__ in absld/__init__.py")
changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", changelog, re.DOTALL | re.MULTILINE))
dated = [
    text
    for head, text in sections.items()
    if re.fullmatch(rf"{re.escape(version)}, \d{{4}}-\d\d-\d\d", head)
]
if len(dated) != 1 or not dated[0].strip():
    sys.exit(f'CHANGELOG.md needs one section "## {version}, YYYY-MM-DD"')
print(dated[0].strip())
