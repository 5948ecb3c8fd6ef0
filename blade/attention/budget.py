"""From the requested sparsity to the number of key blocks that a query block keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from blade.attention.config import BladeConfig
from blade.token_grid import TokenGrid


@dataclass(frozen=True)
class BlockBudget:
    """Budget of a layer: the pairs of tokens that a sparsity leaves, and their use.

    Density is (pairs of real tokens in kept blocks + pairs with pooled tokens) / all pairs. Blocks that hold text are
    kept as columns and as rows; they and the pooled tokens are paid first, the rest goes to blocks of video alone.
    """

    blocks: int
    """Blocks that the sequence is cut into, for queries and keys alike."""
    text_blocks: int
    """Blocks that hold a text token, and are kept by every row."""
    kept_blocks: int
    """Blocks of video alone that a row keeps, of `blocks - text_blocks`. At least one, if there is one."""
    extra_blocks: int
    """Rows that keep one more, spread evenly."""
    pooled_tokens: Literal["none", "all", "dropped"]
    """Pooled tokens in force: none where every block is kept."""
    density: float
    """Density that this comes to if the blocks kept are whole ones."""
    requested_density: float
    """1 - the requested sparsity."""

    @property
    def is_full(self) -> bool:
        """True if every block is kept, so that nothing is left out."""
        return self.kept_blocks == self.blocks - self.text_blocks

    @property
    def is_exceeded(self) -> bool:
        """True if text, pooled tokens and the one block that each row keeps alone exceed the request."""
        return self.density > self.requested_density + 1e-6


def plan_budget(
    grid: TokenGrid,
    sparsity: float,
    *,
    block_size: int,
    pooled_tokens: Literal["none", "all", "dropped"],
    pooled_window: int,
    rounding: Literal["floor", "spread"] = "floor",
) -> BlockBudget:
    """Spend what a sparsity leaves.

    Args:
        grid: the tokens that the layer sees.
        sparsity: share of all pairs to leave out, in [0, 1).
        block_size: tokens in a block.
        pooled_tokens: see `BladeConfig`.
        pooled_window: tokens averaged into a pooled one.
        rounding: see `AdaptiveConfig`.

    Returns:
        The budget with the most kept blocks whose density is not above `1 - sparsity`, but for what is forced.
    """
    tokens = grid.sequence_length
    text = grid.text_blocks(block_size)
    blocks, text_blocks = len(text), sum(text)
    sizes = [min(block_size, tokens - block * block_size) for block in range(blocks)]
    forced = sum(size for size, holds_text in zip(sizes, text) if holds_text)
    video_blocks = blocks - text_blocks

    if sparsity == 0:
        pooled_tokens = "none"
    pooled_everywhere = math.ceil(grid.video_tokens / pooled_window) if pooled_tokens == "all" else 0
    pooled_share = pooled_everywhere / tokens * (grid.block_queries / tokens)
    # in "dropped" mode a block that is not kept is replaced by its pooled tokens
    pooled_in_block = block_size / pooled_window if pooled_tokens == "dropped" else 0.0

    def density(kept: float) -> float:
        video_row = forced + min(kept * block_size, tokens - forced) + (video_blocks - kept) * pooled_in_block
        text_row = tokens
        return (forced * text_row + (tokens - forced) * video_row) / tokens**2 + pooled_share

    kept, extra = min(1, video_blocks), 0
    if video_blocks:
        pairs = (1 - sparsity - pooled_share) * tokens**2 - forced * tokens
        video_row = pairs / (tokens - forced) - forced - video_blocks * pooled_in_block
        whole = block_size - pooled_in_block
        wanted = min(video_row / whole + 1e-6, video_blocks) if whole > 0 else float(video_blocks)
        kept = max(1, math.floor(wanted))
        if rounding == "spread" and kept < wanted:
            extra = math.floor((wanted - kept) * blocks)
        # Every block kept is shorter in tokens than in blocks where the last one is cut.
        if density(video_blocks) <= 1 - sparsity + 1e-9:
            kept = video_blocks
    if kept == video_blocks:
        pooled_tokens, pooled_share, extra = "none", 0.0, 0
    planned = density(kept + extra / blocks)
    return BlockBudget(blocks, text_blocks, kept, extra, pooled_tokens, planned, 1 - sparsity)


def configured_budget(config: BladeConfig, grid: TokenGrid) -> BlockBudget:
    """Spend what a configuration's sparsity leaves of a grid. See `plan_budget`."""
    return plan_budget(
        grid,
        config.sparsity,
        block_size=config.asa.block_size,
        pooled_tokens=config.pooled_tokens,
        pooled_window=config.asa.pooled_window,
        rounding=config.asa.rounding,
    )
