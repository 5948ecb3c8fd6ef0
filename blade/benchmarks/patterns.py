"""The head patterns that the attention benchmark times."""

from __future__ import annotations

import torch

from blade.attention.config import BladeConfig
from blade.attention.pattern_plan import PatternPlan
from blade.attention.pattern_table import mixed_table
from blade.attention.patterns import HeadPattern, pattern_density
from blade.profiling.candidates import natural_order, pattern_of_density
from blade.token_grid import TokenGrid

PATTERN_KINDS = ("diagonal", "multi-diagonal", "vertical", "window")
"""Patterns that the heads have in turn, in the token orders that suit them, the model's being raster."""


def benchmark_patterns(
    grid: TokenGrid, heads: int, density: float, block_size: int, device: torch.device
) -> PatternPlan:
    """One layer whose heads have `PATTERN_KINDS` in turn, each at a density.

    Args:
        grid: the tokens.
        heads: number of heads.
        density: share of all pairs that each pattern keeps at the most.
        block_size: tokens in a block.
        device: where the masks are made.
    """

    def blocks(pattern: HeadPattern) -> float:
        return pattern_density(pattern, grid, block_size, "raster", device)

    patterns = []
    for kind in PATTERN_KINDS:
        order = "raster" if kind == "vertical" else natural_order(kind, block_size)
        patterns.append(pattern_of_density(kind, density, blocks, grid, None if order == "raster" else order))
    table = mixed_table(patterns, 1, heads, block_size=block_size)
    return PatternPlan.of(BladeConfig(attention="patterns", patterns=table), grid, device)
