"""Tables of named things that are declared once, and picked up from there by options, reports and plots."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Protocol, TypeVar

from blade.common.errors import first_line


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


def declare_installed(table: dict[str, Item], kind: type[Item], group: str) -> None:
    """Add the items of other packages to a table.

    A package has them by an entry point that names an item or several:

        [project.entry-points."blade.measures"]
        my-package = "my_package.my_module:MEASURES"

    One that is broken stops no other, but is warned of.

    Args:
        table: the items by name.
        kind: the items' class.
        group: the group of the entry points.
    """
    for entry in entry_points(group=group):
        try:
            loaded = entry.load()
            for item in loaded if isinstance(loaded, Iterable) else [loaded]:
                if not isinstance(item, kind):
                    raise TypeError(f"it must name a {kind.__name__} or several, got {item!r}")
                declare(table, item)
        except Exception as error:  # whatever importing another project's package raises
            warnings.warn(
                f"The entry point `{entry.name}` ({entry.value}) of `{group}` cannot be loaded: "
                f"{type(error).__name__}: {first_line(error)}",
                UserWarning,
                stacklevel=2,
            )
