"""Offer the tutorial as a notebook, made from its page."""

from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add tutorial.ipynb to the site; a block of bash is a cell for the shell."""
    notebook = jupytext.read(Path(config.docs_dir, "tutorial.md"))
    notebook.metadata["kernelspec"] = KERNEL
    text = jupytext.writes(notebook, "ipynb")
    files.append(File.generated(config, "tutorial.ipynb", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Put the download below the title."""
    if page.file.src_uri != "tutorial.md":
        return markdown
    title, text = markdown.split("\n", 1)
    return f"{title}\n\n[As a notebook](tutorial.ipynb){{ .md-button .md-button--primary download }}\n{text}"
