"""Reading JSON that anybody may have written: what is wrong is one line, and takes neither memory nor time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from blade.common.checks import shortened
from blade.common.errors import first_line

MOST_BYTES = 2**25
"""Bytes of the largest file that is read; records and tables of patterns take far less."""


def parse_json(text: str | bytes, what: str) -> Any:
    """Read JSON.

    Args:
        text: the JSON.
        what: where it is from, such as "`prompts` list.jsonl", which begins the message of an error.

    Raises:
        ValueError: if it is none: NaN and Infinity are not, nor is a key that an object has twice, half of a
            character, or what is nested too deeply for Python.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        values = json.loads(decoded, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if "\\ud" in decoded.lower():
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"{what} cannot be read as JSON: it is nested too deeply.") from None
    except ValueError as error:  # which those of JSON and of UTF-8 are
        raise ValueError(f"{what} cannot be read as JSON: {first_line(error).rstrip('.')}.") from None
    return values


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Read a file with a JSON object.

    Args:
        path: the file.
        what: see `parse_json`.

    Raises:
        ValueError: if it cannot be read, is larger than `MOST_BYTES`, or holds something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{what} cannot be read as JSON: {first_line(error)}.") from error
    if len(content) > MOST_BYTES:
        raise ValueError(f"{what} cannot be read as JSON: it has more than {MOST_BYTES / 2**20:.0f} MiB.")
    values = parse_json(content, what)
    if not isinstance(values, dict):
        raise ValueError(f"{what} must hold a JSON object, got {shortened(values)}.")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, in which each key may stand once."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"an object has the key {shortened(key)} twice")
        values[key] = value
    return values
