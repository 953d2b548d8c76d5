"""Set the formulas of the pages by KaTeX when the site is built, so that reading needs no script.

Sources have $...$ and $$...$$, which GitHub shows, too. KaTeX comes from npm, in the version that
package-lock.json pins; a formula that it cannot read fails the build.
"""

import html
import json
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

HERE = Path(__file__).parent
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# Reads a list of [TeX, whether it is a paragraph of its own]; writes the list of their HTML.
SET_ALL = """
const katex = require(process.argv[1])
const formulas = JSON.parse(require("fs").readFileSync(0))
const set = ([tex, displayMode]) => katex.renderToString(tex, { displayMode, strict: "error" })
try {
  console.log(JSON.stringify(formulas.map(set)))
} catch (error) {
  console.error(error.message)
  process.exitCode = 1
}
"""


@cache
def install_katex() -> Path:
    """Install KaTeX into a temporary folder, once in a process; return the folder of its files."""
    if not shutil.which("npm"):
        raise PluginError("the site's formulas need KaTeX: install Node.js, which has npm")
    folder = Path(tempfile.mkdtemp(prefix="absld-katex-"))
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return folder / "node_modules" / "katex" / "dist"


def on_shutdown() -> None:
    """Remove the temporary folder."""
    if install_katex.cache_info().currsize:
        shutil.rmtree(install_katex().parents[2])


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add KaTeX's style sheet and fonts to the site."""
    katex = install_katex()
    for path in [katex / "katex.min.css", *sorted((katex / "fonts").iterdir())]:
        name = f"assets/katex/{path.relative_to(katex).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Set the formulas of a page, and load the style sheet if there are any."""
    formulas = [(html.unescape(m[3]), m[2] == "[") for m in FORMULA.finditer(content)]
    if not formulas:
        return content
    katex = install_katex() / "katex.min.js"
    done = subprocess.run(
        ["node", "-e", SET_ALL, str(katex)],
        input=json.dumps(formulas),
        capture_output=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise PluginError(f"{page.file.src_uri}: {done.stderr}")
    texts = iter(json.loads(done.stdout))
    # The search would index a formula three times: as HTML, MathML and TeX.
    content = FORMULA.sub(lambda m: f"<{m[1]} data-search-exclude>{next(texts)}</{m[1]}>", content)
    style = get_relative_url("assets/katex/katex.min.css", page.url)
    return f'<link rel="stylesheet" href="{style}">\n{content}'
