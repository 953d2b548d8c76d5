"""Make links that work on GitHub work on the site, too.

SECURITY.md and CHANGELOG.md become pages; any other file outside of docs/ is linked in the
repository. A link that shows the name of a page's file shows the page's title.
"""

import re
from pathlib import Path
from posixpath import dirname, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PAGES = {ROOT / "SECURITY.md": "security.md", ROOT / "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)#\s]+)((?:#[^)\s]*)?)\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside of docs/."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let each relative link lead to a page of the site, or to a file of the repository."""
    source = Path(page.file.abs_src_path or config.docs_dir)
    pages = PAGES | {Path(config.docs_dir, uri): uri for uri in files.src_uris}

    def adapted(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = Path(source.parent, link).resolve()
        if ":" in link or not path.exists():
            return match[0]  # elsewhere, or MkDocs reports it
        file = files.src_uris.get(pages.get(path, ""))
        if file is None or file.inclusion.is_excluded():
            url = f"{config.repo_url}/blob/main/{path.relative_to(ROOT).as_posix()}"
            return f"[{text}]({url}{anchor})"
        if text.endswith(path.name) and file.page and file.page.title:
            text = file.page.title
        return f"[{text}]({relpath(file.src_uri, dirname(page.file.src_uri) or '.')}{anchor})"

    return LINK.sub(adapted, markdown)


def on_post_page(output: str, **_: object) -> str:
    """Keep the theme's script from asking GitHub for stars and forks."""
    return output.replace(' data-md-component="source"', "")
