"""Head patterns: which pairs of tokens one attention head computes, fixed beforehand by where the tokens are.

Source: Sparse-vDiT, arXiv 2506.03065 (full, skipped, diagonal, multi-diagonal, vertical stripe), and for windows with
an offset and a stride Parameterized Stripe Attention, arXiv 2609.37001.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import torch
from blade_kernels.block_mask import BlockMask
from torch import Tensor
from torch.nn import functional

from blade.common.checks import check_integer, check_number, parse_choice
from blade.common.fields import check_type, check_types, read_fields
from blade.token_grid import TokenGrid, canonical_order

PatternKind = Literal["full", "skip", "diagonal", "multi-diagonal", "vertical", "window", "asa"]
KINDS: tuple[str, ...] = get_args(PatternKind)
"""The kinds of patterns."""

AXES = ("frame", "row", "column", "place")
"""Quantities that a window can bound; `place` is the number of a token in its frame, rows one after the other."""

ROWS_TOGETHER = 64
"""Query blocks whose reach is worked out at a time."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Distances along one axis that a pair of tokens may have: (|distance - offset| mod stride) < width.

    Source: Parameterized Stripe Attention, arXiv 2609.37001, for frames (T_w, T_o, T_s) and places (S_w, S_o, S_s).
    """

    width: int
    """Distances kept on either side of `offset`, itself counted; 1 is that distance alone."""
    offset: int = 0
    """Distance around which the window lies."""
    stride: int | None = None
    """Distance after which it repeats. None: it does not."""

    def __post_init__(self) -> None:
        check_integer("width", self.width, 1)
        check_integer("offset", self.offset, 0)
        if self.stride is not None:
            check_integer("stride", self.stride, 1)

    def pairs(self, size: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the pairs of coordinates that it keeps along an axis of `size` tokens, (size, size) bool."""
        coordinates = torch.arange(size, device=device)
        distance = ((coordinates[:, None] - coordinates).abs() - self.offset).abs()
        return (distance if self.stride is None else distance % self.stride) < self.width


@dataclass(frozen=True, kw_only=True)
class HeadPattern:
    """Pattern of one head: the pairs of video tokens that it computes.

    Pairs are named by where tokens are in the video, so that a pattern is the same in every token order. Attention is
    computed in blocks: a block is kept if it holds a pair of the pattern. Text is always kept, by queries and by keys.
    """

    kind: PatternKind
    """`full`: every pair. `skip`: none, the head gives zeros. `diagonal`: tokens near each other in raster order.
    `multi-diagonal`: near each other when all frames of a place are put together. `vertical`: some blocks of keys, the
    same for all queries. `window`: `windows`. `asa`: chosen anew at every step, as the configuration says."""
    frames: float | None = None
    """Of a `diagonal` and a `multi-diagonal`: half its width in tokens, as a number of frames' tokens, in whole
    blocks, rounded down."""
    share: float | None = None
    """Of a `vertical`: share of the key blocks of video that it keeps, evenly spaced, in (0, 1]."""
    key_blocks: tuple[int, ...] | None = None
    """Of a `vertical`, instead of `share`: the numbers of its key blocks in the order in force."""
    windows: Mapping[str, Window] = field(default_factory=dict)
    """Of a `window`: one for each axis of `AXES` that it restricts, `place` instead of `row` and `column`. A pair must
    be in all of them."""
    first_frame: bool = False
    """Let all queries keep the first frame's keys besides."""
    order: str | None = None
    """A token order of the head's own. None: the model's."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", parse_choice("kind", self.kind, KINDS))
        check_types(self)
        if (self.frames is not None) != (self.kind in ("diagonal", "multi-diagonal")):
            raise ValueError(f"`frames` belongs to diagonal and multi-diagonal, got {self.frames} with {self.kind}.")
        if self.frames is not None:
            check_number("frames", self.frames, "at least 0", lambda x: 0 <= x < math.inf)
        given = (self.share is not None) + (self.key_blocks is not None)
        if given != (self.kind == "vertical"):
            raise ValueError(
                f"`share` or `key_blocks`, one of them, belongs to vertical, got {given} of them with {self.kind}."
            )
        if self.share is not None:
            check_number("share", self.share, "in (0, 1]", lambda x: 0 < x <= 1)
        if self.key_blocks is not None:
            for block in self.key_blocks:
                check_integer("key_blocks", block, 0)
            object.__setattr__(self, "key_blocks", tuple(sorted(set(self.key_blocks))))
        if bool(self.windows) != (self.kind == "window") or not set(self.windows) <= set(AXES):
            raise ValueError(
                f"`windows` belongs to window, for some of {', '.join(AXES)}, got "
                f"{', '.join(map(str, self.windows)) or 'none'} with {self.kind}."
            )
        if "place" in self.windows and len(self.windows) > 1 + ("frame" in self.windows):
            raise ValueError(f"`windows` must have place, or row and column, got {', '.join(self.windows)}.")
        if self.first_frame and self.kind in ("full", "skip", "asa"):
            raise ValueError(f"`first_frame` must be False with {self.kind}, got True.")
        if self.order is not None:
            object.__setattr__(self, "order", canonical_order(self.order))
            if self.kind in ("full", "skip", "asa"):
                raise ValueError(f"`order` must be None with {self.kind}, got {self.order!r}.")

    def __hash__(self) -> int:
        return hash((self.kind, self.frames, self.share, self.key_blocks, *self.windows.items(), self.order))

    @property
    def name(self) -> str:
        """The pattern in a few words."""
        words: list[str] = [self.kind]
        if self.frames is not None:
            words.append(f"{self.frames:g} frames")
        if self.share is not None:
            words.append(f"{self.share:.0%}")
        if self.key_blocks is not None:
            words.append(f"{len(self.key_blocks)} blocks")
        for axis, window in self.windows.items():
            text = f"{axis} {window.width}"
            text += f"+{window.offset}" if window.offset else ""
            words.append(text + (f"/{window.stride}" if window.stride else ""))
        if self.first_frame:
            words.append("first frame")
        if self.order is not None:
            words.append(f"in {self.order} order")
        return ", ".join(words)

    def to_dict(self) -> dict[str, Any]:
        """The pattern as plain JSON values, without what is not set."""
        values = asdict(self)
        values["windows"] = {
            axis: {name: value for name, value in asdict(window).items() if value}  # a width is never 0
            for axis, window in self.windows.items()
        }
        if self.key_blocks is not None:
            values["key_blocks"] = list(self.key_blocks)
        return {name: value for name, value in values.items() if value not in (None, {}) and value is not False}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadPattern:
        """Make a pattern from `to_dict`'s values.

        Raises:
            ValueError: for an unknown key, or a value out of its range.
        """
        known = read_fields(cls, values, "pattern")
        windows = known.get("windows", {})
        check_type("windows", windows, Mapping[str, Any])
        known["windows"] = {
            axis: Window(**read_fields(Window, window, f"windows.{axis}")) for axis, window in windows.items()
        }
        return cls(**known)


def pattern_blocks(
    pattern: HeadPattern, grid: TokenGrid, block_size: int, order: str, device: torch.device | str = "cpu"
) -> Tensor:
    """Return the blocks that hold a pair of a pattern.

    Args:
        pattern: any but `asa`.
        grid: the tokens.
        block_size: tokens in a query block and in a key block.
        order: the token order in which they are cut into blocks; `pattern.order` comes before it.
        device: where to work it out.

    Returns:
        (blocks, blocks) bool, of queries and keys. Blocks that hold text are kept as rows and as columns, unless the
        head is skipped.

    Raises:
        ValueError: for `asa`, which depends on more than places, or a key block that there is not.
    """
    if pattern.kind == "asa":
        raise ValueError("`pattern` must be known beforehand, got asa.")
    order = pattern.order or order
    blocks = -(-grid.sequence_length // block_size)
    keep = torch.zeros(blocks, blocks, dtype=torch.bool, device=device)
    if pattern.kind == "skip":
        return keep
    if pattern.kind == "full":
        return ~keep
    permutation = grid.order(order, device)
    block_of = torch.empty_like(permutation)  # of every token in raster order
    places = torch.arange(grid.video_tokens, device=device) + grid.video_start
    block_of[permutation] = places // block_size
    if pattern.kind == "vertical":
        keep[:, _stripes(pattern, block_of, blocks)] = True
    else:
        for first in range(0, blocks, ROWS_TOGETHER):
            rows = torch.arange(first, min(first + ROWS_TOGETHER, blocks), device=device)
            reached = _reach(pattern, grid, block_size, block_of == rows[:, None])
            ordered = reached.index_select(1, permutation)
            padded = functional.pad(ordered, (grid.video_start, blocks * block_size - grid.video_stop))
            keep[rows] = padded.view(len(rows), blocks, block_size).any(-1)
    if pattern.first_frame:
        keep[:, block_of[: grid.height * grid.width]] = True
    text = torch.tensor(grid.text_blocks(block_size), device=device)
    return keep | text | text[:, None]


def pattern_density(
    pattern: HeadPattern, grid: TokenGrid, block_size: int, order: str, device: torch.device | str = "cpu"
) -> float:
    """Share of all pairs of tokens that a pattern computes, whole blocks, text included. See `pattern_blocks`."""
    mask = BlockMask.from_dense(
        pattern_blocks(pattern, grid, block_size, order, device)[None, None], (block_size, block_size)
    )
    return float(mask.density(grid.sequence_length, grid.sequence_length))


def half_width(pattern: HeadPattern, grid: TokenGrid, block_size: int) -> int:
    """Half the width of a band in tokens: whole blocks. Source: Sparse-vDiT; w = floor(frames * P / B)."""
    assert pattern.frames is not None
    return block_size * math.floor(pattern.frames * grid.height * grid.width / block_size)


def diagonal_density(grid: TokenGrid, frames: float, block_size: int) -> float:
    """Share of all pairs that a diagonal keeps in raster order, by the closed formula, text kept.

    With n blocks of video and a half-width of w of them it keeps n (2 w + 1) - w (w + 1) blocks.

    Source: Sparse-vDiT, arXiv 2506.03065.
    """
    blocks = -(-grid.video_tokens // block_size)
    width = min(half_width(HeadPattern(kind="diagonal", frames=frames), grid, block_size) // block_size, blocks - 1)
    band = (blocks * (2 * width + 1) - width * (width + 1)) / blocks**2
    video, text = grid.video_tokens, grid.text_tokens
    return (band * video**2 + 2 * text * video + text**2) / grid.sequence_length**2


def _reach(pattern: HeadPattern, grid: TokenGrid, block_size: int, marked: Tensor) -> Tensor:
    """The tokens that have a pair with a marked one; both (rows, video tokens) bool, in raster order."""
    if pattern.kind == "diagonal":
        return _spread(marked, half_width(pattern, grid, block_size))
    if pattern.kind == "multi-diagonal":
        whole = TokenGrid(grid.frames, grid.height, grid.width)  # pairs across frames, even of a model that parts them
        together = marked.index_select(1, whole.order("token-major", marked.device))
        spread = _spread(together, half_width(pattern, grid, block_size))
        return spread.index_select(1, whole.inverse_order("token-major", marked.device))
    if pattern.kind != "window":
        raise NotImplementedError(f"the pairs of a {pattern.kind} pattern must be worked out here")
    # a product of conditions on single axes: what a marked token reaches, one axis after the other
    rows, size = len(marked), (grid.frames, grid.height, grid.width)
    axes = ("frame", "place") if "place" in pattern.windows else ("frame", "row", "column")
    reached = marked.view(rows, grid.frames, -1) if len(axes) == 2 else marked.view(rows, *size)
    for number, axis in enumerate(axes, start=1):
        reached = _reach_along(pattern.windows.get(axis), reached.movedim(number, -1)).movedim(-1, number)
    return reached.reshape(rows, -1)


def _reach_along(window: Window | None, marked: Tensor) -> Tensor:
    """Return the coordinates that marked ones reach along the last dimension."""
    if window is None:
        return marked.any(-1, keepdim=True).expand_as(marked)
    if window.offset == 0 and window.stride is None:
        return _spread(marked, window.width - 1)
    pairs = window.pairs(marked.shape[-1], marked.device)
    return marked.to(torch.float32) @ pairs.to(torch.float32) > 0


def _spread(marked: Tensor, distance: int) -> Tensor:
    """Mark what is at most `distance` from a marked coordinate along the last dimension."""
    size = marked.shape[-1]
    sums = functional.pad(marked.cumsum(-1, dtype=torch.int32), (1, 0))
    places = torch.arange(size, device=marked.device)
    before = sums.index_select(-1, (places - distance).clamp(min=0))
    return sums.index_select(-1, (places + distance + 1).clamp(max=size)) > before


def _stripes(pattern: HeadPattern, block_of: Tensor, blocks: int) -> Tensor:
    """Numbers of the key blocks of a vertical pattern."""
    if pattern.key_blocks is not None:
        if pattern.key_blocks and pattern.key_blocks[-1] >= blocks:
            raise ValueError(f"`key_blocks` must be below {blocks} here, got {pattern.key_blocks[-1]}.")
        return torch.tensor(pattern.key_blocks, dtype=torch.int64, device=block_of.device)
    assert pattern.share is not None
    first, last = int(block_of.min()), int(block_of.max())
    video = last - first + 1
    count = max(1, round(pattern.share * video))
    return first + ((torch.arange(count, device=block_of.device) * 2 + 1) * video) // (2 * count)
