"""Candidate patterns for a search: several of every kind, each of a given density."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from blade.attention.patterns import HeadPattern, PatternKind, Window, pattern_blocks
from blade.token_grid import TokenGrid

DENSITIES = (0.06, 0.12, 0.25, 0.4, 0.6)
"""Densities at which patterns of every kind are tried."""

WORTH_MOVING = 0.9
"""A head gets its own token order if it then keeps at most this share of the blocks kept in the model's order."""

USUAL_DENSITY = 0.25
"""Density at which token orders and kinds of pattern are compared."""

HALVINGS = 12
"""Bisection steps for the width of a pattern of a given density."""


def default_candidates(
    grid: TokenGrid,
    block_size: int,
    order: str = "raster",
    *,
    densities: Sequence[float] = DENSITIES,
    own_orders: bool = True,
    device: torch.device | str = "cpu",
) -> tuple[HeadPattern, ...]:
    """Return full, skip, and diagonals, multi-diagonals, local windows and vertical stripes of these densities.

    Args:
        grid: the tokens.
        block_size: tokens in a block.
        order: the model's token order.
        densities: shares of all pairs.
        own_orders: allow a head its own token order where it pays.
        device: the device on which masks are computed.

    Returns:
        The candidates, without duplicates, `full` first. Vertical stripes are evenly spaced; a search moves those of
        each head to where its attention goes.
    """
    blocks = share_of_blocks(grid, block_size, order, device)
    candidates = [HeadPattern(kind="full"), HeadPattern(kind="skip")]
    kinds: tuple[PatternKind, ...] = ("diagonal", "multi-diagonal", "window")
    for kind in kinds:
        own_order = None
        if own_orders and natural_order(kind, block_size) != order:
            usual = pattern_of_density(kind, USUAL_DENSITY, blocks, grid, natural_order(kind, block_size))
            if blocks(usual) <= WORTH_MOVING * blocks(replace(usual, order=None)):
                own_order = usual.order
        candidates += [pattern_of_density(kind, density, blocks, grid, own_order) for density in densities]
    candidates += [HeadPattern(kind="vertical", share=density) for density in densities]
    return tuple(dict.fromkeys(candidates))


def share_of_blocks(
    grid: TokenGrid, block_size: int, order: str, device: torch.device | str
) -> Callable[[HeadPattern], float]:
    """Return a function that gives the share of blocks that a pattern keeps, text included."""

    def blocks(pattern: HeadPattern) -> float:
        return float(pattern_blocks(pattern, grid, block_size, order, device).float().mean())

    return blocks


def pattern_of_density(
    kind: PatternKind,
    density: float,
    blocks: Callable[[HeadPattern], float],
    grid: TokenGrid,
    order: str | None = None,
) -> HeadPattern:
    """Return the widest pattern of a kind that keeps at most a share of the blocks, or else the narrowest one.

    Args:
        kind: `diagonal`, `multi-diagonal`, `window` or `vertical`.
        density: the share.
        blocks: gives the share of blocks that a pattern keeps.
        grid: the tokens.
        order: the head's own token order; None: the model's.
    """
    if kind == "vertical":
        return HeadPattern(kind="vertical", share=density, order=order)

    def make(width: float) -> HeadPattern:
        if kind == "window":
            return replace(local_window(grid, width), order=order)
        frames = math.floor(1000 * width * grid.frames) / 1000
        return HeadPattern(kind=kind, frames=frames, order=order)

    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if blocks(make(middle)) <= density else (low, middle)
    return make(low)


def natural_order(kind: str, block_size: int) -> str:
    """Return the token order in which a kind of pattern keeps the fewest blocks."""
    if kind == "window":  # bricks of a block's tokens, wide before high before long
        edges, axis = [1, 1, 1], 2
        while math.prod(edges) * 2 <= block_size:
            edges[axis] *= 2
            axis = (axis - 1) % 3
        return "bricks({},{},{})".format(*edges)
    return {"diagonal": "raster", "multi-diagonal": "token-major"}[kind]


def local_window(grid: TokenGrid, width: float) -> HeadPattern:
    """Return a window that spans a share of the video's size along every axis."""
    sizes = {"frame": grid.frames, "row": grid.height, "column": grid.width}
    return HeadPattern(
        kind="window", windows={axis: Window(width=max(1, round(width * size))) for axis, size in sizes.items()}
    )
