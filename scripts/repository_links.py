"""Relative links of Markdown files, for places where the repository's other files are not beside them.

The address of the repository stands in `pyproject.toml` alone, as `Repository` of `project.urls`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]

RELATIVE_LINK = re.compile(r"\]\((?![a-z]+:|//)([^)\s]+)")
"""The end of a link's text, or of a picture's, with what it leads to."""

FENCE = re.compile(r"^( *```.*?^ *```[^\n]*$)", re.MULTILINE | re.DOTALL)
"""A block of code, in which nothing is a link."""

PICTURES = (".png", ".svg", ".gif", ".webp", ".jpg")


def repository_address() -> str:
    """Return the address of the repository."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["Repository"])


def absolute_link(path: str) -> str:
    """Return the address of a file or folder of the repository.

    Args:
        path: relative to the repository's root, with an anchor behind it or without.
    """
    is_picture = PurePosixPath(path.partition("#")[0]).suffix in PICTURES
    return f"{repository_address()}/{'raw' if is_picture else 'blob'}/HEAD/{path}"


def rewrite_links(text: str, target: Callable[[str], str]) -> str:
    """Replace the relative links of a Markdown text, blocks of code aside.

    Args:
        text: the text.
        target: takes what a link leads to, and returns what it leads to instead.
    """
    parts = FENCE.split(text)
    parts[::2] = [RELATIVE_LINK.sub(lambda match: f"]({target(match[1])}", part) for part in parts[::2]]
    return "".join(parts)


def index_description(readme: Path = ROOT / "README.md") -> str:
    """Return the README as a package index shows it, with absolute links."""
    return rewrite_links(
        readme.read_text(encoding="utf-8"),
        lambda target: absolute_link(f"{readme.name}{target}" if target.startswith("#") else target),
    )
