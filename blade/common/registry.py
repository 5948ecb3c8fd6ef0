"""Declarations by name: the project's own, those registered at run time, and those of installed packages."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """Something declared under a name."""

    @property
    def name(self) -> str:
        """The name, which no other declaration of its kind has."""


Declared = TypeVar("Declared", bound=Named)


class Registry(Generic[Declared]):
    """The declarations of one kind, in order: the project's own first, then others as they are added.

    An installed package adds declarations by an entry point that names a sequence of them:

        [project.entry-points."blade.measures"]
        my-package = "my_package.my_module:MEASURES"
    """

    def __init__(self, kind: type[Declared], own: Iterable[Declared], *, group: str) -> None:
        """Make a registry.

        Args:
            kind: The declarations' class.
            own: The project's own declarations.
            group: Entry point group of installed packages' declarations, which are loaded at the first look.
        """
        self._kind, self._group = kind, group
        self._declared: dict[str, Declared] = {}
        self._pending = True
        for item in own:
            self.register(item)

    def register(self, item: Declared) -> Declared:
        """Add a declaration, and return it.

        Raises:
            TypeError: If it is of another class.
            ValueError: If another declaration has its name.
        """
        if not isinstance(item, self._kind):
            raise TypeError(f"`item` must be a {self._kind.__name__}, got {item!r}.")
        if self._declared.setdefault(item.name, item) != item:
            raise ValueError(
                f"`name` must be new among declarations of {self._kind.__name__}, got {item.name!r} again."
            )
        return item

    @property
    def declared(self) -> Mapping[str, Declared]:
        """All declarations by name."""
        if self._pending:
            self._pending = False
            for entry in entry_points(group=self._group):
                self._load(entry)
        return MappingProxyType(self._declared)

    def select(self, condition: Callable[[Declared], object]) -> tuple[Declared, ...]:
        """Return the declarations that meet a condition."""
        return tuple(item for item in self.declared.values() if condition(item))

    def _load(self, entry: EntryPoint) -> None:
        """Register an entry point's declarations; one that is broken stops no other, but is reported."""
        try:
            for item in entry.load():
                self.register(item)
        except Exception as error:  # whatever importing another project's package raises
            warnings.warn(
                f"The entry point `{entry.name}` ({entry.value}) of `{self._group}` cannot be loaded: "
                f"{type(error).__name__}: {error}",
                UserWarning,
                stacklevel=4,
            )
