"""Checks of single values: errors name the field, the value and what would be right."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

LARGEST_INTEGER = 2**63 - 1
"""Largest integer that tensors and other languages can hold."""

MOST_BLOCK_TOKENS = 2**16
"""Most tokens of a block: more would be no choice of blocks, and their scores would fill the memory."""

MOST_LAYERS = 10_000
"""Most layers that a model may have; more are taken for a mistake, and so in what follows."""

MOST_STEPS = 10_000
"""Most steps of a run; models know 1,000 times."""

MOST_FRAMES = 100_000
"""Most frames of a video."""

MOST_PIXELS = 2**16
"""Most pixels of a video's side."""


class _Shortened(reprlib.Repr):
    """Shows the start of what is long, with its length."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict = 4, 6
        self.maxstring, self.maxother = 100, 200

    def repr_int(self, x: int, level: int) -> str:
        """Return a number; Python itself refuses to write one of thousands of digits."""
        return repr(x) if x.bit_length() < 100 else f"an integer of {x.bit_length():,} bits"

    def repr_list(self, x: list[Any], level: int) -> str:
        """Return the first items of a list, and how many there are."""
        return self._counted(super().repr_list(x, level), len(x), self.maxlist)

    def repr_tuple(self, x: tuple[Any, ...], level: int) -> str:
        """Return the first items of a tuple, and how many there are."""
        return self._counted(super().repr_tuple(x, level), len(x), self.maxtuple)

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        """Return the first items of an object, and how many there are."""
        return self._counted(super().repr_dict(x, level), len(x), self.maxdict)

    @staticmethod
    def _counted(text: str, count: int, shown: int) -> str:
        return text if count <= shown else f"{text} ({count:,} items)"


_SHORTENED = _Shortened()


def shortened(value: Any) -> str:
    """Return a value for a message: in one line, and its beginning only where it is long."""
    return " ".join(_SHORTENED.repr(value).split())


def is_integer(value: Any) -> bool:
    """Return whether a value is an integer of at most 64 bits, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST_INTEGER


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no bool."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and -sys.float_info.max <= value <= sys.float_info.max


def check_integer(name: str, value: Any, least: int, most: int = LARGEST_INTEGER) -> None:
    """Raise a `ValueError` unless it is an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}, got {shortened(value)}.")
    if value > most:
        raise ValueError(f"`{name}` must be an integer of at most {most:,}, got {shortened(value)}.")


def check_flag(name: str, value: Any) -> None:
    """Raise a `ValueError` unless it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shortened(value)}.")


def check_number(name: str, value: Any, wanted: str, holds: Callable[[float], bool]) -> None:
    """Raise a `ValueError` unless it is a finite number for which `holds`, which `wanted` says in words."""
    if not is_number(value) or not holds(value):
        raise ValueError(f"`{name}` must be {wanted}, got {shortened(value)}.")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless it is one of `choices`."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be one of {listed}, got {shortened(value)}{meant(value, choices)}")


def meant(value: Any, choices: Iterable[str]) -> str:
    """Return the end of a message on a value that is none of `choices`: the one that it resembles, or a full stop."""
    near = get_close_matches(value, choices, n=1, cutoff=0.6) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else "."


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
        match = re.fullmatch(r"(\d{1,19})(?:-(\d{1,19}))?", part, re.ASCII)
        if not match:
            raise ValueError(problem)
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(problem)
        ranges.append(range(first, last + 1))
    return ranges
