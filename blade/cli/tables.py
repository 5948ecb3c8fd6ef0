"""Tables of a command, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from blade.common.tables import Table
from blade.common.terminal import printable


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables, each with its title above; cells that are too wide are folded."""
    from rich.console import Console
    from rich.table import Table as Shown
    from rich.text import Text

    for table in tables:
        # texts and not strings, in which rich would obey what stands in brackets
        shown = Shown(title=Text(printable(table.title)), title_justify="left")
        for heading in table.headings:
            shown.add_column(Text(printable(heading)), overflow="fold")
        for row in table.rows:
            shown.add_row(*(Text(printable(cell)) for cell in row))
        Console().print(shown)
