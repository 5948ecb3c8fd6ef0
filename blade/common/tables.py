"""Tables of reports, for the console and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blade.common.files import check_writable, write_files


@dataclass(frozen=True)
class Table:
    """Headings and rows, with a title."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def check_table(folder: Path, name: str) -> None:
    """Check, before anything is measured, that `write_table` will be able to write; see there for the arguments.

    Raises:
        OutputError: a file cannot be written.
    """
    check_writable(folder / f"{name}.json", folder / f"{name}.md")


def write_table(
    folder: Path, name: str, *, title: str, note: str, lines: Sequence[str], values: Mapping[str, Any]
) -> None:
    """Write a table as Markdown and what it was made of as JSON, both or none.

    Args:
        folder: where; made if missing.
        name: of both files, without their endings.
        title: heading of the Markdown.
        note: what stands below it.
        lines: the table.
        values: plain JSON values, among them the `command`.

    Raises:
        OutputError: a file cannot be written.
    """
    text = "\n".join([f"# {title}", "", note, "", f"    {values['command']}", "", *lines, ""])
    write_files(
        {
            folder / f"{name}.json": (json.dumps(values, indent=2) + "\n").encode(),
            folder / f"{name}.md": text.encode(),
        }
    )
