"""Tables of named things that are declared once, and picked up from there by options, reports and plots."""

from __future__ import annotations

from typing import Protocol, TypeVar


class Named(Protocol):
    """Anything with a name."""

    @property
    def name(self) -> str:
        """The name, under which a table has it."""
        ...


Item = TypeVar("Item", bound=Named)


def declare(table: dict[str, Item], item: Item) -> Item:
    """Add an item to a table under its name, and return it.

    Raises:
        ValueError: if the table has another item of this name.
    """
    if table.setdefault(item.name, item) is not item:
        raise ValueError(f"`name` must be new in the table, which has {', '.join(table)}, got {item.name!r}.")
    return item
