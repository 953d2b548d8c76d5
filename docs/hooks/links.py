"""Make links of the pages work on the site, which work on GitHub: those that lead out of docs/.

SECURITY.md and CHANGELOG.md become pages; any other file of the repository is linked there.
"""

import re
from pathlib import Path
from posixpath import dirname, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {ROOT / "SECURITY.md": "security.md", ROOT / "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let each relative link lead to a page of the site, or to a file of the repository."""
    source = Path(page.file.abs_src_path or config.docs_dir)
    pages = PAGES | {Path(config.docs_dir, uri): uri for uri in files.src_uris}

    def target(link: str) -> str:
        path = Path(source.parent, link).resolve()
        if ":" in link or not path.exists():
            return link  # elsewhere, or MkDocs reports it
        if path in pages and not files.src_uris[pages[path]].inclusion.is_excluded():
            return relpath(pages[path], dirname(page.file.src_uri) or ".")
        return f"{config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}"

    return LINK.sub(lambda m: m[1] + target(m[2]) + m[3], markdown)


def on_post_page(output: str, **_: object) -> str:
    """Keep the theme's script from asking GitHub for stars and forks."""
    return output.replace(' data-md-component="source"', "")
