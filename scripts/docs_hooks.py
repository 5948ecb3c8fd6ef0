"""MkDocs hooks: pages made of files outside of `docs/`, and links that lead out of it."""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

from repository_links import ROOT, absolute_link, rewrite_links

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the repository's root that are pages, by the page's path in `docs/`."""

SOURCES = {page: source for source, page in PAGES.items()}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made of files at the repository's root."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Let links lead where their targets are in the site, or in the repository where the site lacks them."""
    path = page.file.src_uri
    return rewrite_links(markdown, lambda target: page_link(target, path))


def page_link(target: str, page: str) -> str:
    """Return what a link leads to in the site; what exists nowhere stays as it is, and MkDocs complains of it.

    Args:
        target: what it leads to in the repository.
        page: path of the page in `docs/`.
    """
    path, mark, anchor = target.partition("#")
    if not path:
        return target
    source = SOURCES.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if path in PAGES or (path.startswith("docs/") and not (ROOT / path).is_dir()):
        inside = PAGES.get(path, path.removeprefix("docs/"))
        return posixpath.relpath(inside, posixpath.dirname(page) or ".") + mark + anchor
    return absolute_link(path + mark + anchor) if (ROOT / path).exists() else target
