"""Check the built site: links lead somewhere, and a browser loads nothing from elsewhere.

MkDocs checks the links of the sources; these are those of the pages, with anchors, images and the
reference that is made from docstrings.
"""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

LOADED_BY_CSS = re.compile(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)")
NAMED_BY_SCRIPTS = re.compile(r"https?://[^\s\"'`);\\]+")
LOADING_LINKS = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest",
                 "preconnect", "dns-prefetch"}  # fmt: skip
# Addresses in the theme's scripts. Any other fails the build.
NEVER_LOADED = {
    # In comments.
    "https://clipboardjs.com/", "http://lunrjs.com", "https://bit.ly/2s3ChXG",
    "http://tartarus.org/~martin/PorterStemmer/js.txt",
    # Stars and forks of a repository: links.py takes out the element that asks for them.
    "https://api.github.com/repos/${e}/${t}", "https://api.github.com/users/${e}",
    "https://${e}/api/v4/projects/${encodeURIComponent(t",
    # Diagrams, of which there is none; a substitute for browsers of before 2020.
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js",
    "https://unpkg.com/resize-observer-polyfill",
}  # fmt: skip
OTHER_LANGUAGES = "assets/javascripts/lunr/"  # of the search, which the site does not load


class Links(HTMLParser):
    """The anchors of a page, the links in it, and what a browser loads with it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, list[str](), list[str]()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given.get("id", ""), given.get("name", "") if tag == "a" else ""}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and LOADING_LINKS & set(given.get("rel", "").split()):
            self.loaded.append(given["href"])
        self.loaded += [given[name] for name in ("src", "poster", "data") if name in given]
        self.loaded += [part.split()[0] for part in given.get("srcset", "").split(",") if part]
        self.loaded += LOADED_BY_CSS.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        """Take note of the text of a script or a style sheet in the page."""
        pattern = {"style": LOADED_BY_CSS, "script": NAMED_BY_SCRIPTS}.get(self.cdata_elem or "")
        self.loaded += pattern.findall(data) if pattern else []


def on_post_build(config: MkDocsConfig) -> None:
    """Fail the build with all faults that are found."""
    site = Path(config.site_dir)
    faults = [*faults_of_pages(site, urlsplit(config.site_url or "").path), *loaded_elsewhere(site)]
    if faults:
        raise PluginError("\n".join(["the site has faults:", *sorted(set(faults))]))


def faults_of_pages(site: Path, root: str) -> Iterator[str]:
    """Yield the links that lead nowhere, and what is loaded from elsewhere, of every page."""
    pages = {path: Links(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        name = path.relative_to(site).as_posix()
        base = urljoin(f"http://site{root}", name.removesuffix("index.html"))
        found = [(link, "links") for link in page.links] + [(url, "loads") for url in page.loaded]
        for link, verb in found:
            parts = urlsplit(urljoin(base, link))
            if parts.netloc != "site":
                if verb == "loads" and parts.scheme != "data":
                    yield f"{name} loads {link}"
                continue
            target = site / unquote(parts.path).removeprefix(root).lstrip("/")
            target = target / "index.html" if target.is_dir() else target
            if not parts.path.startswith(root) or not target.exists():
                yield f"{name} {verb} {link}, which does not exist"
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{name} links {link}, where there is no such anchor"


def loaded_elsewhere(site: Path) -> Iterator[str]:
    """Yield the addresses in style sheets and scripts that a browser may load."""
    for path in sorted([*site.rglob("*.css"), *site.rglob("*.js")]):
        name, text = path.relative_to(site).as_posix(), path.read_text(encoding="utf-8")
        pattern = LOADED_BY_CSS if path.suffix == ".css" else NAMED_BY_SCRIPTS
        if not name.startswith(OTHER_LANGUAGES):
            yield from (f"{name} names {url}" for url in set(pattern.findall(text)) - NEVER_LOADED)
