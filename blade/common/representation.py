"""Representations of configurations: what differs from the default."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any


def repr_changes(value: Any) -> str:
    """Return a dataclass as the call that makes it, without the fields that are at their defaults.

    Args:
        value: an instance of a dataclass whose fields are given by name.
    """
    changes = []
    for item in fields(value):
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if (current := getattr(value, item.name)) != default:
            changes.append(f"{item.name}={current!r}")
    return f"{type(value).__name__}({', '.join(changes)})"
