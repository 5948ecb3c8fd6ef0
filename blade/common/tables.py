"""Tables of reports, for the console and as Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blade.common.files import check_writable, write_files
from blade.common.terminal import printable


@dataclass(frozen=True)
class Table:
    """Headings and rows, with a title."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def markdown_text(text: str) -> str:
    """Return a text of any origin as Markdown that shows it, on one line: no link, code, cell or HTML begins in it."""
    return re.sub(r"[\\`\[\]|]", r"\\\g<0>", printable(text)).replace("<", "&lt;")


def markdown_code(text: str) -> str:
    """Return a text of any origin as code within a line of Markdown."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def markdown_block(text: str) -> str:
    """Return a text of any origin as a block of code in Markdown, whose lines are indented."""
    return "    " + printable(text, kept="\n").replace("\n", "\n    ")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its first column to the left and the others to the right."""
    rule = ["---", *["---:"] * (len(headings) - 1)]
    cells = [[markdown_text(cell) for cell in row] for row in (headings, *rows)]
    return ["| " + " | ".join(row) + " |" for row in (cells[0], rule, *cells[1:])]


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
    text = "\n".join([f"# {title}", "", note, "", markdown_block(values["command"]), "", *lines, ""])
    write_files(
        {
            folder / f"{name}.json": (json.dumps(values, indent=2) + "\n").encode(),
            folder / f"{name}.md": text.encode(),
        }
    )
