"""Types of a dataclass's fields, checked as they are annotated: files that hold its values may hold anything.

Neither `huggingface_hub.dataclasses.strict` nor pydantic does this here: the first refuses a list for a tuple and an
integer for a float, and takes NaN; the second is brought by no package that is required; both report in several lines.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from blade.common.checks import is_integer, is_number, meant, shortened

WORDS = {
    int: "an integer of at most 64 bits",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    types.NoneType: "None",
}
"""Descriptions of types, for messages."""

CHECKS: dict[Any, Callable[[Any], bool]] = {Any: lambda value: True, int: is_integer, float: is_number}
"""Checks of types in place of `isinstance`."""

PLURALS = {int: "integers", float: "finite numbers", str: "strings"}
"""Descriptions of the items of a list."""


def check_types(item: Any, prefix: str = "") -> None:
    """Check that every field of a dataclass, and of those in it, has the type of its annotation.

    A list passes for a tuple, which JSON does not have.

    Args:
        item: the dataclass.
        prefix: what stands before the names of its fields in messages.

    Raises:
        ValueError: for the first field that has another type; numbers must be finite, and of at most 64 bits.
    """
    cls: Any = type(item)
    for name, hint in _field_types(cls).items():
        value = getattr(item, name)
        check_type(f"{prefix}{name}", value, hint)
        if is_dataclass(value):
            check_types(value, f"{prefix}{name}.")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise a `ValueError` that names a value unless it has a type."""
    if not has_type(value, hint):
        raise ValueError(f"`{name}` must be {_words(hint)}, got {shortened(value)}{meant(value, _choices(hint))}")


def has_type(value: Any, hint: Any) -> bool:
    """Return whether a value has a type, as far as annotations of fields need it."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in CHECKS:
        return CHECKS[kind](value)
    if kind in (Union, types.UnionType):
        return any(has_type(value, argument) for argument in arguments)
    if kind is Literal:
        return isinstance(value, str) and value in arguments
    if kind in (tuple, list):
        return isinstance(value, tuple | list) and _have_types(value, arguments)
    fits = isinstance(value, kind)
    if fits and isinstance(value, Mapping) and arguments:
        return all(has_type(key, arguments[0]) and has_type(item, arguments[1]) for key, item in value.items())
    return fits


def _have_types(values: tuple[Any, ...] | list[Any], arguments: tuple[Any, ...]) -> bool:
    """Return whether the items of a list have the types in the brackets of `list[...]` or `tuple[...]`."""
    if len(arguments) == 1 or arguments[1:] == (Ellipsis,):
        return all(has_type(value, arguments[0]) for value in values)
    return len(values) == len(arguments) and all(map(has_type, values, arguments))


def read_fields(cls: type, values: Any, name: str) -> dict[str, Any]:
    """Return the fields of a dataclass that a JSON object holds.

    Args:
        cls: the dataclass.
        values: the object.
        name: its own name, for messages.

    Raises:
        ValueError: if it is no object, or has an unknown field, or lacks one that has no default.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"`{name}` must be a JSON object, got {shortened(values)}.")
    known = {item.name: item for item in fields(cls)}
    for field in values:
        if field not in known:
            listed = ", ".join(known)
            raise ValueError(f"`{name}` must hold fields of {listed}, got {shortened(field)}{meant(field, known)}")
    for field, item in known.items():
        if field not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"`{field}` of `{name}` must be given, got {shortened(dict(values))}.")
    return dict(values)


@cache
def _field_types(cls: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in fields(cls)}


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the values that an annotation lists."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(choice for argument in get_args(hint) for choice in _choices(argument))


def _words(hint: Any) -> str:
    """Return what a type asks for, in words."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if kind is Literal:
        return "one of " + ", ".join(f'"{choice}"' for choice in arguments)
    if kind in (tuple, list) and (len(arguments) == 1 or arguments[1:] == (Ellipsis,)):
        return f"a list of {PLURALS.get(arguments[0]) or f'items that are each {_words(arguments[0])}'}"
    if kind in (tuple, list):
        return f"a list of {' and '.join(_words(argument) for argument in arguments)}"
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return "a JSON object" + (f" of {PLURALS[arguments[1]]}" if arguments and arguments[1] in PLURALS else "")
    name = getattr(kind, "__name__", str(kind))
    return WORDS.get(kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
