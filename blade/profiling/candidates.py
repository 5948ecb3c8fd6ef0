"""Candidate patterns for a search: of every kind several, by the density that they come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from blade.attention.patterns import HeadPattern, Window, pattern_blocks
from blade.token_grid import TokenGrid

DENSITIES = (0.06, 0.12, 0.25, 0.4, 0.6)
"""Densities at which patterns of every kind are tried."""

WORTH_MOVING = 0.9
"""A head is given a token order of its own if that leaves at most this share of the blocks of the model's order."""

USUAL_DENSITY = 0.25
"""At which that is looked at, and the kinds are compared."""

HALVINGS = 12
"""Of the range of a pattern's width until it has the density that is asked for."""


def default_candidates(
    grid: TokenGrid,
    block_size: int,
    order: str = "raster",
    *,
    densities: Sequence[float] = DENSITIES,
    own_orders: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[HeadPattern, ...]:
    """Full, skipped, and diagonals, multi-diagonals, local windows and vertical stripes of these densities.

    Args:
        grid: the tokens.
        block_size: tokens in a block.
        order: the model's token order.
        densities: shares of all pairs.
        own_orders: whether a head may have a token order of its own, where it pays.
        device: where masks are worked out.

    Returns:
        The candidates, without repetition, `full` first. Vertical stripes are evenly spaced: a search puts each head's
        where its attention goes.
    """
    blocks = share_of_blocks(grid, block_size, order, device)
    found = [HeadPattern(kind="full"), HeadPattern(kind="skip")]
    for kind in ("diagonal", "multi-diagonal", "window"):
        own = None
        if own_orders and natural_order(kind, block_size) != order:
            usual = pattern_of_density(kind, USUAL_DENSITY, blocks, grid, natural_order(kind, block_size))
            if blocks(usual) <= WORTH_MOVING * blocks(replace(usual, order=None)):
                own = usual.order
        found += [pattern_of_density(kind, density, blocks, grid, own) for density in densities]
    found += [HeadPattern(kind="vertical", share=density) for density in densities]
    return tuple(dict.fromkeys(found))


def share_of_blocks(
    grid: TokenGrid, block_size: int, order: str, device: torch.device | str
) -> Callable[[HeadPattern], float]:
    """Return what tells the share of blocks that a pattern keeps, text included."""

    def blocks(pattern: HeadPattern) -> float:
        return float(pattern_blocks(pattern, grid, block_size, order, device).float().mean())

    return blocks


def pattern_of_density(
    kind: str, density: float, blocks: Callable[[HeadPattern], float], grid: TokenGrid, order: str | None = None
) -> HeadPattern:
    """The widest pattern of a kind that keeps no more than a share of the blocks, or the narrowest there is.

    Args:
        kind: `diagonal`, `multi-diagonal`, `window` or `vertical`.
        density: the share.
        blocks: tells the share of blocks that a pattern keeps.
        grid: the tokens.
        order: a token order of the head's own; None: the model's.
    """
    if kind == "vertical":
        return HeadPattern(kind="vertical", share=density, order=order)

    def make(width: float) -> HeadPattern:
        if kind == "window":
            return replace(local_window(grid, width), order=order)
        frames = math.floor(1000 * width * grid.frames) / 1000
        return HeadPattern(kind=kind, frames=frames, order=order)  # type: ignore[arg-type]

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if blocks(make(middle)) <= density else (low, middle)
    return make(low)


def natural_order(kind: str, block_size: int) -> str:
    """The token order in which a kind of pattern keeps the fewest blocks."""
    if kind == "window":  # bricks of a block's tokens, wide before high before long
        edges, axis = [1, 1, 1], 2
        while math.prod(edges) * 2 <= block_size:
            edges[axis] *= 2
            axis = (axis - 1) % 3
        return "bricks({},{},{})".format(*edges)
    return {"diagonal": "raster", "multi-diagonal": "token-major"}[kind]


def local_window(grid: TokenGrid, width: float) -> HeadPattern:
    """Tokens within a share of the video's size along every axis."""
    sizes = {"frame": grid.frames, "row": grid.height, "column": grid.width}
    return HeadPattern(
        kind="window", windows={axis: Window(width=max(1, round(width * size))) for axis, size in sizes.items()}
    )
