"""Checks of single values: errors name the field, the value and what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise a `ValueError` unless it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    """Raise a `ValueError` unless it is a number for which `holds`, which `wanted` says in words."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless it is one of `choices`."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {value!r}.")


def kebab_case(value: str) -> str:
    """Return a value as it is spelled now, `multi-diagonal`, where earlier versions wrote `multi_diagonal`."""
    return value.replace("_", "-")


def parse_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return the choice that a value names, in whichever spelling. See `kebab_case`.

    Raises:
        ValueError: if it is none of `choices`.
    """
    spelled = kebab_case(value) if isinstance(value, str) else value
    if spelled not in choices:
        check_choice(name, value, choices)
    return spelled


def parse_ranges(text: str, problem: str) -> list[range]:
    """Read whole numbers and ranges of them, both ends included, such as "0-1,39".

    Args:
        text: what to read; a blank one holds no number.
        problem: message of the error.

    Raises:
        ValueError: if it does not read like that.
    """
    ranges = []
    for part in text.replace(" ", "").split(",") if text.strip() else []:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match:
            raise ValueError(problem)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(problem)
        ranges.append(range(first, last + 1))
    return ranges
