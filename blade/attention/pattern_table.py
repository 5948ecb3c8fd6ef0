"""The table of a model's head patterns: which pattern every head of every layer has at every step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blade.attention.patterns import HeadPattern
from blade.common.checks import MOST_BLOCK_TOKENS, MOST_STEPS, check_integer, shortened
from blade.common.documented import documented
from blade.common.fields import check_type, check_types, read_fields
from blade.common.files import write_files
from blade.common.reading import read_json
from blade.token_grid import TokenGrid, canonical_order

TABLE_NAME = "pattern_table.json"
"""File name of a saved table, beside the configuration."""

FORMAT = 1
"""Version of the file's layout."""


@documented
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PatternTable:
    """A pattern for every head, found for one model, number of steps and size of video.

    Two tables are equal if they assign the same patterns.
    """

    patterns: tuple[HeadPattern, ...]
    """The patterns that heads can have."""
    assignment: np.ndarray
    """int (groups of steps, layers, heads), numbers of `patterns`."""
    block_size: int
    """Tokens in a query block and in a key block."""
    token_order: str = "raster"
    """Order in which the model's tokens are cut into blocks; see `TokenGrid.order`."""
    group_starts: tuple[int, ...] = (0,)
    """First step of each group."""
    steps: int | None = None
    """Steps of the runs that it was found for. None: it has one group, for runs of any length."""
    grid: TokenGrid | None = None
    """The tokens that it was found for. None: any."""
    model: str | None = None
    """The model that it was found for, in words."""

    def __repr__(self) -> str:
        """Return the table's size and the share of every kind of pattern."""
        groups, layers, heads = self.assignment.shape
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in self.shares().items())
        return f"<PatternTable of {layers} layers, {heads} heads, {groups} groups of steps: {shares}>"

    def __post_init__(self) -> None:
        try:
            assignment = np.asarray(self.assignment)
        except ValueError as problem:  # rows of different lengths
            raise ValueError(f"`assignment` must have the shape (groups, layers, heads): {problem}") from None
        if assignment.ndim != 3 or not np.issubdtype(assignment.dtype, np.integer) or not assignment.size:
            raise ValueError(
                "`assignment` must hold whole numbers of shape (groups, layers, heads), got "
                f"{assignment.dtype} of shape {assignment.shape}."
            )
        if assignment.min() < 0 or assignment.max() >= len(self.patterns):
            raise ValueError(
                f"`assignment` must be of the {len(self.patterns)} patterns, from 0, got {assignment.min()} to "
                f"{assignment.max()}."
            )
        object.__setattr__(self, "assignment", assignment.astype(np.int32))
        check_integer("block_size", self.block_size, least=1, most=MOST_BLOCK_TOKENS)
        if self.steps is not None:
            check_integer("steps", self.steps, least=1, most=MOST_STEPS)
        object.__setattr__(self, "patterns", tuple(self.patterns))
        check_types(self)
        object.__setattr__(self, "group_starts", tuple(self.group_starts))
        object.__setattr__(self, "token_order", canonical_order(self.token_order))
        starts, groups = self.group_starts, len(assignment)
        if len(starts) != groups or starts[0] != 0 or list(starts) != sorted(set(starts)):
            raise ValueError(f"`group_starts` must be {groups} rising steps from 0, got {starts}.")
        if self.steps is None and groups > 1:
            raise ValueError(f"`steps` must be given for more than one group of steps, got {groups} groups.")
        if self.steps is not None and starts[-1] >= self.steps:
            raise ValueError(f"`group_starts` must be below the {self.steps} `steps`, got {starts[-1]}.")
        if any(pattern.key_blocks is not None for pattern in self.patterns) and self.grid is None:
            raise ValueError("`grid` must be given where a pattern has `key_blocks`, which mean nothing without.")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatternTable) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.assignment.shape[1])

    @property
    def heads(self) -> int:
        """Heads of a layer."""
        return int(self.assignment.shape[2])

    def shares(self) -> dict[str, float]:
        """Share of all heads, layers and steps that each kind of pattern has, the largest first."""
        lengths = np.diff((*self.group_starts, self.steps or self.group_starts[-1] + 1))
        counts = np.zeros(len(self.patterns))
        for length, group in zip(lengths, self.assignment):
            counts += length * np.bincount(group.ravel(), minlength=len(self.patterns))
        found: dict[str, float] = {}
        for pattern, count in zip(self.patterns, counts / counts.sum()):
            found[pattern.kind] = found.get(pattern.kind, 0.0) + float(count)
        return dict(sorted(((kind, share) for kind, share in found.items() if share), key=lambda item: -item[1]))

    def sparse_layers(self) -> np.ndarray:
        """Return True for every layer with a head that leaves something out, bool (groups of steps, layers)."""
        full = np.array([pattern.kind == "full" for pattern in self.patterns])
        sparse: np.ndarray = ~full[self.assignment].all(-1)
        return sparse

    def by_step(self, steps: int) -> np.ndarray:
        """The group of every step of a run; steps of a run of another length are those at the same share of it."""
        own = np.arange(steps) if self.steps is None else ((np.arange(steps) + 0.5) * self.steps / steps).astype(int)
        return np.searchsorted(self.group_starts, own, side="right") - 1

    def differences(self, *, layers: int, heads: int, steps: int | None, grid: TokenGrid | None) -> list[str]:
        """Return the differences between a run and those that this table was found for, in words."""
        found = []
        if (layers, heads) != (self.layers, self.heads):
            found.append(f"{layers} layers of {heads} heads, not {self.layers} of {self.heads}")
        if steps is not None and self.steps is not None and steps != self.steps:
            found.append(f"{steps} steps, not {self.steps}")
        if grid is not None and self.grid is not None and grid != self.grid:
            found.append(f"{_size(grid)}, not {_size(self.grid)}")
        return found

    def on_grid(self, grid: TokenGrid) -> PatternTable:
        """The table for another size of video: key blocks move to the same share of the sequence."""
        if self.grid is None or self.grid == grid:
            return self
        before, after = (-(-one.sequence_length // self.block_size) for one in (self.grid, grid))
        patterns = tuple(
            pattern
            if pattern.key_blocks is None
            else replace(
                pattern, key_blocks=tuple(int((block + 0.5) * after / before) for block in pattern.key_blocks)
            )
            for pattern in self.patterns
        )
        return replace(self, patterns=patterns, grid=grid)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        return {
            "format": FORMAT,
            "model": self.model,
            "block_size": self.block_size,
            "token_order": self.token_order,
            "steps": self.steps,
            "group_starts": list(self.group_starts),
            "grid": None if self.grid is None else self.grid.to_dict(),
            "patterns": [pattern.to_dict() for pattern in self.patterns],
            "assignment": self.assignment.tolist(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PatternTable:
        """Make a table from `to_dict`'s values.

        Raises:
            ValueError: if they are none.
        """
        version = values.get("format") if isinstance(values, Mapping) else FORMAT
        if version is True or version != FORMAT:
            wrong = f"`format` must be {FORMAT}, got {shortened(version)}"
            raise ValueError(f"{wrong}: another version of BLADE made this table.")
        if isinstance(values, Mapping):
            values = {name: value for name, value in values.items() if name != "format"}
        known = read_fields(cls, values, "patterns")
        check_type("patterns", known["patterns"], list[Any])
        known["patterns"] = tuple(HeadPattern.from_dict(pattern) for pattern in known["patterns"])
        if known.get("grid") is not None:
            known["grid"] = TokenGrid(**read_fields(TokenGrid, known["grid"], "grid"))
        return cls(**known)

    def to_bytes(self) -> bytes:
        """Return the content of the file that `load` reads."""
        return (json.dumps(self.to_dict()) + "\n").encode()

    def save(self, path: Path) -> None:
        """Write the table to a file; a file that was there is replaced as a whole."""
        write_files({path: self.to_bytes()})

    @classmethod
    def load(cls, path: Path) -> PatternTable:
        """Read a file that `save` wrote.

        Raises:
            ValueError: if it is not there, or not such a file.
        """
        if not path.exists():
            raise ValueError(f"`{path}` is not there: a configuration with head patterns has its table beside it.")
        values = read_json(path, f"`{path}`")
        try:
            return cls.from_dict(values)
        except ValueError as problem:
            raise ValueError(f"`{path}` holds no table of patterns: {problem}") from None


def uniform_table(
    pattern: HeadPattern, layers: int, heads: int, *, block_size: int, token_order: str = "raster"
) -> PatternTable:
    """A table that gives all heads one pattern, for runs of any length and size."""
    return mixed_table([pattern], layers, heads, block_size=block_size, token_order=token_order)


def mixed_table(
    patterns: Sequence[HeadPattern], layers: int, heads: int, *, block_size: int, token_order: str = "raster"
) -> PatternTable:
    """A table that gives the heads of every layer these patterns in turn, for runs of any length and size."""
    assignment = np.broadcast_to(np.arange(heads) % len(patterns), (1, layers, heads))
    return PatternTable(
        patterns=tuple(patterns), assignment=assignment, block_size=block_size, token_order=token_order
    )


def _size(grid: TokenGrid) -> str:
    text = f" and {grid.text_tokens} of text" if grid.text_tokens else ""
    return f"{grid.frames} x {grid.height} x {grid.width} tokens{text}"
