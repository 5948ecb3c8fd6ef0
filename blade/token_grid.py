"""The grid of video tokens, where the text sits, and the orders in which tokens are cut into blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

TOKEN_ORDERS = ("raster", "token_major", "gilbert", "bricks(t,h,w)")
"""The token orders by name; in the last, `t`, `h` and `w` stand for a brick's size in tokens."""

_BRICKS = re.compile(r"bricks\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)")

# An axis-aligned integer vector: its signed length and the (positive) raster stride of its axis.
_Vector = tuple[int, int]


@dataclass(frozen=True)
class TokenGrid:
    """Video tokens in a frames x height x width box, with text tokens before or after them.

    Raster order, the order in which a patch embedding flattens a latent, is the one that every other order is
    expressed in: width runs fastest, frames slowest.
    """

    frames: int
    """Latent frames after patching."""
    height: int
    """Token rows in a frame."""
    width: int
    """Tokens in a row."""
    text_before: int = 0
    """Text tokens that the self-attention sees before the video tokens."""
    text_after: int = 0
    """Text tokens that the self-attention sees after the video tokens."""
    first_frame_apart: bool = False
    """Whether the first frame's tokens come first in every order, for models that treat them apart."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_before", 0), ("text_after", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")

    @property
    def video_tokens(self) -> int:
        """Number of video tokens."""
        return self.frames * self.height * self.width

    @property
    def text_tokens(self) -> int:
        """Number of text tokens, on both sides."""
        return self.text_before + self.text_after

    @property
    def sequence_length(self) -> int:
        """Number of tokens that the self-attention sees."""
        return self.video_tokens + self.text_tokens

    @property
    def video_start(self) -> int:
        """Index in the sequence of the first video token."""
        return self.text_before

    @property
    def video_stop(self) -> int:
        """Index in the sequence just past the last video token."""
        return self.text_before + self.video_tokens

    def text_blocks(self, block_size: int) -> list[bool]:
        """Return for each block of the sequence whether it holds a text token."""
        starts = range(0, self.sequence_length, block_size)
        return [
            start < self.video_start or min(start + block_size, self.sequence_length) > self.video_stop
            for start in starts
        ]

    def order(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the permutation that puts raster-ordered video tokens into a token order.

        Text tokens are no part of it: they stay where they are.

        Args:
            name: one of `raster`, `token_major` (all frames of a pixel together), `gilbert` (a generalised Hilbert
                curve through the box) and `bricks(t,h,w)` (bricks of t x h x w tokens, in raster order inside and
                among themselves; those at the far faces are cut off).
            device: where the permutation shall live.

        Returns:
            int64 tensor of `video_tokens` raster indices, so that `ordered = raster.index_select(dim, permutation)`.
            It is cached and shared: do not write to it.

        Raises:
            ValueError: if no order has this name.
        """
        check_token_order(name)
        return _permutation(self, name, torch.device(device), False)

    def inverse_order(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the permutation that puts tokens of order `name` back into raster order. See `order`."""
        check_token_order(name)
        return _permutation(self, name, torch.device(device), True)

    def positions(self, name: str) -> torch.Tensor:
        """Return the (frame, row, column) of every video token in the order `name`: int64 (video_tokens, 3)."""
        shape = (self.frames, self.height, self.width)
        return torch.stack(torch.unravel_index(self.order(name), shape), dim=-1)


def check_token_order(name: str) -> None:
    """Raise a `ValueError` if no token order has this name."""
    if not isinstance(name, str) or (name not in TOKEN_ORDERS[:3] and not _brick_shape(name)):
        raise ValueError(f"`token_order` must be one of {', '.join(TOKEN_ORDERS)}, got {name!r}.")


def _brick_shape(name: str) -> tuple[int, int, int] | None:
    match = _BRICKS.fullmatch(name)
    if match is None:
        return None
    frames, height, width = (int(size) for size in match.groups())
    return (frames, height, width) if min(frames, height, width) >= 1 else None


@lru_cache(maxsize=128)
def _permutation(grid: TokenGrid, name: str, device: torch.device, inverse: bool) -> torch.Tensor:
    if grid.first_frame_apart and grid.frames > 1:
        first = _raster_indices(1, grid.height, grid.width, name)
        rest = _raster_indices(grid.frames - 1, grid.height, grid.width, name)
        order = np.concatenate((first, len(first) + rest))
    else:
        order = _raster_indices(grid.frames, grid.height, grid.width, name)
    if inverse:
        # argsort of a permutation is its inverse
        order = np.argsort(order, kind="stable")
    # Not an inference tensor even if asked for in inference mode: it may be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.from_numpy(order).to(device)


@lru_cache(maxsize=32)
def _raster_indices(frames: int, height: int, width: int, name: str) -> np.ndarray:
    raster = np.arange(frames * height * width, dtype=np.int64)
    if name == "raster":
        return raster
    if name == "token_major":
        return np.ascontiguousarray(raster.reshape(frames, height * width).T).reshape(-1)
    if name == "gilbert":
        return gilbert_order(width, height, frames)
    brick = _brick_shape(name)
    assert brick is not None, name
    position = np.unravel_index(raster, (frames, height, width))
    numbers = [axis // size for axis, size in zip(position, brick)]
    # lexsort takes its last key first, and raster order breaks ties inside a brick
    return np.lexsort((raster, *reversed(numbers))).astype(np.int64)


def gilbert_order(width: int, height: int, depth: int) -> np.ndarray:
    """Return the generalised 3-D Hilbert ("Gilbert") curve through a box.

    Args:
        width: points along x, the fastest axis of the raster order.
        height: points along y.
        depth: points along z, the slowest axis.

    Returns:
        int64 (width * height * depth,): the raster index `x + width * (y + height * z)` of each point along the curve.

    Source: the curve of J. Cerveny (github.com/jakubcerveny/gilbert), with the tie rules of BLADE's release.
    """
    x, y, z = (width, 1), (height, width), (depth, width * height)
    if width >= height and width >= depth:
        return _curve(x, y, z)
    if height >= width and height >= depth:
        return _curve(y, x, z)
    return _curve(z, x, y)


def _unit(vector: _Vector) -> int:
    """One step along a vector, as a raster offset."""
    length, stride = vector
    return stride if length > 0 else -stride


def _offset(vector: _Vector) -> int:
    return vector[0] * vector[1]


def _negated(vector: _Vector) -> _Vector:
    return -vector[0], vector[1]


def _split(vector: _Vector) -> tuple[_Vector, _Vector]:
    """Cut a vector in half, the first half (rounded toward minus infinity) made even where it can be."""
    length, stride = vector
    half = length // 2
    if abs(half) % 2 == 1 and abs(length) > 2:
        half += 1 if length > 0 else -1
    return (half, stride), (length - half, stride)


@lru_cache(maxsize=8192)
def _curve(a: _Vector, b: _Vector, c: _Vector) -> np.ndarray:
    """Raster offsets, from its first corner, of the curve through the box that a, b and c span (a is its main axis).

    A large box repeats few small ones, so that remembering them makes the recursion cheap.
    """
    w, h, e = abs(a[0]), abs(b[0]), abs(c[0])
    if min(w, h, e) == 0:
        return np.empty(0, dtype=np.int64)
    for line, others in ((a, (h, e)), (b, (w, e)), (c, (w, h))):
        if others == (1, 1):
            return np.arange(abs(line[0]), dtype=np.int64) * _unit(line)

    a1, a2 = _split(a)
    b1, b2 = _split(b)
    c1, c2 = _split(c)
    last_a, turn_b, turn_c = _offset(a) - _unit(a), _offset(b1) - _unit(b), _offset(c1) - _unit(c)
    last_c = _offset(c) - _unit(c)
    if 2 * w > 3 * h and 2 * w > 3 * e:
        parts = [(0, (a1, b, c)), (_offset(a1), (a2, b, c))]
    elif 3 * h > 4 * e:
        parts = [
            (0, (b1, c, a1)),
            (_offset(b1), (a, b2, c)),
            (last_a + turn_b, (_negated(b1), c, _negated(a2))),
        ]
    elif 3 * e > 4 * h:
        parts = [
            (0, (c1, a1, b)),
            (_offset(c1), (a, b, c2)),
            (last_a + turn_c, (_negated(c1), _negated(a2), b)),
        ]
    else:
        parts = [
            (0, (b1, c1, a1)),
            (_offset(b1), (c, a1, b2)),
            (turn_b + last_c, (a, _negated(b1), _negated(c2))),
            (last_a + _offset(b1) + last_c, (_negated(c), _negated(a2), b2)),
            (last_a + turn_b, (_negated(b1), c1, _negated(a2))),
        ]
    return np.concatenate([start + _curve(*box) for start, box in parts])
