"""Head patterns of the attention benchmark."""

from __future__ import annotations

import torch

from blade.attention.config import BladeConfig
from blade.attention.pattern_plan import PatternPlan
from blade.attention.pattern_table import mixed_table
from blade.attention.patterns import HeadPattern, PatternKind, pattern_density
from blade.profiling.candidates import natural_order, pattern_of_density
from blade.token_grid import TokenGrid

PATTERN_KINDS: tuple[PatternKind, ...] = ("diagonal", "multi-diagonal", "vertical", "window")
"""Kinds of pattern that the heads take in turn, each in its best token order; the model's order is raster."""


def benchmark_patterns(
    grid: TokenGrid, heads: int, density: float, block_size: int, device: torch.device
) -> PatternPlan:
    """Make the plan of one layer whose heads take `PATTERN_KINDS` in turn, each at a density.

    Args:
        grid: the tokens.
        heads: number of heads.
        density: largest share of all pairs that each pattern keeps.
        block_size: tokens in a block.
        device: the device of the masks.
    """

    def blocks(pattern: HeadPattern) -> float:
        return pattern_density(pattern, grid, block_size, "raster", device)

    patterns = []
    for kind in PATTERN_KINDS:
        best_order = "raster" if kind == "vertical" else natural_order(kind, block_size)
        own_order = None if best_order == "raster" else best_order
        patterns.append(pattern_of_density(kind, density, blocks, grid, own_order))
    table = mixed_table(patterns, 1, heads, block_size=block_size)
    return PatternPlan.of(BladeConfig(attention="patterns", patterns=table), grid, device)
