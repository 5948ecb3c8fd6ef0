"""The grid of video tokens, where the text sits, and the orders in which tokens are cut into blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
import torch

from blade.common.checks import check_flag, check_integer, kebab_case, meant, shortened
from blade.common.declared import declare
from blade.common.documented import documented

MOST_TOKENS = 2**24
"""Most tokens along an axis of a grid."""

# An axis-aligned integer vector: its signed length and the (positive) raster stride of its axis.
_Vector = tuple[int, int]


@documented
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
    """Put the first frame's tokens first in every order, for models that treat them apart."""
    dense_text: bool = False
    """Compute queries of text, which is all that is no video, in a dense call of their own: exact in every method."""
    frames_apart: bool = False
    """Keep the tokens of every frame together, and the frames in order: an order runs inside each frame. For models
    that treat the frames one by one."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("height", 1), ("width", 1), ("text_before", 0), ("text_after", 0)):
            check_integer(name, getattr(self, name), least, MOST_TOKENS)
        check_flag("first_frame_apart", self.first_frame_apart)
        check_flag("frames_apart", self.frames_apart)
        check_flag("dense_text", self.dense_text)
        if self.dense_text and self.text_before:
            raise ValueError(f"`dense_text` takes text after the video alone, got `text_before` {self.text_before}.")

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

    @property
    def block_queries(self) -> int:
        """Number of queries, from the first, that attend by blocks: all but those that `dense_text` sets apart."""
        return self.video_tokens if self.dense_text else self.sequence_length

    def to_dict(self) -> dict[str, int | bool]:
        """Return the fields as plain JSON values; newer flags only where they are set, for earlier versions' sake."""
        newer = ("dense_text", "frames_apart")
        return {name: value for name, value in asdict(self).items() if value or name not in newer}

    def text_blocks(self, block_size: int) -> list[bool]:
        """Return for each block of the sequence whether it holds a text token."""
        starts = range(0, self.sequence_length, block_size)
        return [
            start < self.video_start or min(start + block_size, self.sequence_length) > self.video_stop
            for start in starts
        ]

    def order(self, name: str, device: torch.device | str = "cpu", *, whole: bool = False) -> torch.Tensor:
        """Return the permutation that puts raster-ordered video tokens into a token order.

        Args:
            name: one of `TOKEN_ORDERS`, with numbers for its parameters if it has any.
            device: where the permutation shall live.
            whole: permute the whole sequence, in which text tokens stay where they are. By default they are no part
                of the permutation.

        Returns:
            int64 tensor of `video_tokens` raster indices, or `sequence_length` indices into the sequence, so that
            `ordered = raster.index_select(dim, permutation)`. It is cached and shared: do not write to it.

        Raises:
            ValueError: if no order has this name.
        """
        return _permutation(self, *_find_order(name), torch.device(device), False, whole)

    def inverse_order(self, name: str, device: torch.device | str = "cpu", *, whole: bool = False) -> torch.Tensor:
        """Return the permutation that puts tokens of order `name` back into raster order. See `order`."""
        return _permutation(self, *_find_order(name), torch.device(device), True, whole)

    def positions(self, name: str) -> torch.Tensor:
        """Return the (frame, row, column) of every video token in the order `name`: int64 (video_tokens, 3)."""
        shape = (self.frames, self.height, self.width)
        return torch.stack(torch.unravel_index(self.order(name), shape), dim=-1)


@dataclass(frozen=True)
class TokenOrder:
    """An order in which a grid's video tokens can be cut into blocks."""

    name: str
    """Its spelling in options and files, such as `gilbert`, or with parameters, which are whole numbers of at least 1,
    `bricks(t,h,w)`."""
    permutation: Callable[..., np.ndarray]
    """Of `(frames, height, width, *parameters)`: the int64 raster index of each token in this order."""

    def __post_init__(self) -> None:
        if self.name != kebab_case(self.name) or not re.fullmatch(r"[\w-]+(\(\w+(,\w+)*\))?", self.name):
            raise ValueError(f"`name` must be in kebab-case, such as bricks(t,h,w), got {self.name!r}.")

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        _, _, listed = self.name.rstrip(")").partition("(")
        return tuple(listed.split(",")) if listed else ()

    def parse(self, text: str) -> tuple[int, ...] | None:
        """Return the parameters that a spelling of this order gives; None if it is no spelling of it."""
        spelling = re.escape(self.name.partition("(")[0])
        if self.parameters:
            spelling += r"\(\s*" + r"\s*,\s*".join(r"(\d+)" for _ in self.parameters) + r"\s*\)"
        match = re.fullmatch(spelling, text)
        values = () if match is None else tuple(int(value) for value in match.groups())
        return None if match is None or 0 in values else values

    def spell(self, parameters: tuple[int, ...]) -> str:
        """Return the spelling of this order with parameters."""
        base = self.name.partition("(")[0]
        return f"{base}({','.join(map(str, parameters))})" if parameters else base


def canonical_order(name: str) -> str:
    """Return a token order's name as it is written: in kebab-case, though snake_case is read, and without blanks.

    Raises:
        ValueError: if no order has this name.
    """
    order, parameters = _find_order(name)
    return order.spell(parameters)


def plain_orders() -> tuple[str, ...]:
    """Return the names of the token orders that have no parameters."""
    return tuple(name for name, order in TOKEN_ORDERS.items() if not order.parameters)


def _find_order(name: str) -> tuple[TokenOrder, tuple[int, ...]]:
    if isinstance(name, str):
        for order in TOKEN_ORDERS.values():
            parameters = order.parse(kebab_case(name))
            if parameters is not None:
                return order, parameters
    listed = ", ".join(TOKEN_ORDERS)
    raise ValueError(f"`token_order` must be one of {listed}, got {shortened(name)}{meant(name, TOKEN_ORDERS)}")


@lru_cache(maxsize=128)
def _permutation(
    grid: TokenGrid, order: TokenOrder, parameters: tuple[int, ...], device: torch.device, inverse: bool, whole: bool
) -> torch.Tensor:
    if grid.frames_apart:
        frame = _raster_indices(1, grid.height, grid.width, order, parameters)
        starts = np.arange(grid.frames, dtype=np.int64)[:, None] * len(frame)
        indices = (starts + frame).reshape(-1)
    elif grid.first_frame_apart and grid.frames > 1:
        first = _raster_indices(1, grid.height, grid.width, order, parameters)
        rest = _raster_indices(grid.frames - 1, grid.height, grid.width, order, parameters)
        indices = np.concatenate((first, len(first) + rest))
    else:
        indices = _raster_indices(grid.frames, grid.height, grid.width, order, parameters)
    if inverse:
        # argsort of a permutation is its inverse
        indices = np.argsort(indices, kind="stable")
    if whole:
        sequence = np.arange(grid.sequence_length)
        sequence[grid.video_start : grid.video_stop] = grid.video_start + indices
        indices = sequence
    # Not an inference tensor even if asked for in inference mode: it may be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.from_numpy(indices).to(device)


@lru_cache(maxsize=32)
def _raster_indices(
    frames: int, height: int, width: int, order: TokenOrder, parameters: tuple[int, ...]
) -> np.ndarray:
    return order.permutation(frames, height, width, *parameters)


def raster_order(frames: int, height: int, width: int) -> np.ndarray:
    """Return the order of a flattened box: width runs fastest, frames slowest."""
    return np.arange(frames * height * width, dtype=np.int64)


def token_major_order(frames: int, height: int, width: int) -> np.ndarray:
    """Return the order with all frames of a pixel together."""
    raster = raster_order(frames, height, width)
    return np.ascontiguousarray(raster.reshape(frames, height * width).T).reshape(-1)


def brick_order(frames: int, height: int, width: int, t: int, h: int, w: int) -> np.ndarray:
    """Return the order by bricks of t x h x w tokens, in raster order inside and among themselves.

    Bricks at the far faces are cut off.
    """
    raster = raster_order(frames, height, width)
    position = np.unravel_index(raster, (frames, height, width))
    numbers = [axis // size for axis, size in zip(position, (t, h, w))]
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


TOKEN_ORDERS = {
    order.name: order
    for order in (
        TokenOrder("raster", raster_order),
        TokenOrder("token-major", token_major_order),
        TokenOrder("gilbert", lambda frames, height, width: gilbert_order(width, height, frames)),
        TokenOrder("bricks(t,h,w)", brick_order),
    )
}
"""The token orders by name, as options, files and reports have them."""


def register_token_order(order: TokenOrder) -> TokenOrder:
    """Declare a token order, and return it.

    Raises:
        ValueError: if there is an order of this name.
    """
    return declare(TOKEN_ORDERS, order)
