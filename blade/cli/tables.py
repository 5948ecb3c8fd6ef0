"""Tables of a command, on the terminal."""

from __future__ import annotations

from collections.abc import Iterable

from blade.common.tables import Table


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables, each with its title above; cells that are too wide are folded."""
    from rich.console import Console
    from rich.table import Table as Shown

    for table in tables:
        shown = Shown(title=table.title, title_justify="left")
        for heading in table.headings:
            shown.add_column(heading, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        Console().print(shown)
