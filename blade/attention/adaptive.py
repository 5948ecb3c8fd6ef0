"""Adaptive block-sparse attention (ASA): score key blocks, keep the best, attend to those and to pooled tokens.

Source: BLADE, arXiv 2508.10774. The probe's offsets are drawn once, keyed by seed, layer and step, so that the same
seed gives the same video whatever else draws random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import select_blocks, value_spread
from blade_kernels.block_sparse.api import block_sparse_attention, resolve_implementation
from blade_kernels.block_sparse.pooled import PooledTokens, pool_tokens

from blade.attention.budget import BlockBudget, configured_budget
from blade.attention.config import AdaptiveConfig, BladeConfig
from blade.attention.frame_keys import FrameKeys
from blade.attention.reuse import Kept
from blade.attention.selectors import Selector, SelectorContext, find_selector
from blade.attention.sequence_parallel import HeadShare
from blade.token_grid import TokenGrid

DRAWN_STEPS = 64
"""Steps with draws of their own; later steps begin again with the first's."""


@dataclass(frozen=True, eq=False)
class AdaptivePlan:
    """Plan that all layers share for one shape of latent, worked out once."""

    grid: TokenGrid
    """The tokens."""
    config: AdaptiveConfig
    """Details of the method."""
    budget: BlockBudget
    """Blocks to keep."""
    implementation: str
    """Implementation of the block-sparse attention."""
    precision: str
    """See `BladeConfig.precision`."""
    text_blocks: torch.Tensor | None
    """(blocks,) bool, which blocks hold text; None where none does."""
    selector: Selector
    """Scores the key blocks."""
    context: SelectorContext
    """The selector's view of this grid."""

    @classmethod
    def of(cls, config: BladeConfig, grid: TokenGrid, device: torch.device) -> AdaptivePlan:
        """Make the plan for a grid."""
        details = config.asa
        budget, selector = configured_budget(config, grid), find_selector(details.selector)
        with torch.inference_mode(False):
            text = torch.tensor(grid.text_blocks(details.block_size)) if budget.text_blocks else None
            return cls(
                grid=grid,
                config=details,
                budget=budget,
                implementation=config.implementation,
                precision=config.precision,
                text_blocks=None if text is None else text.to(device),
                selector=selector,
                context=selector.context(grid, details, device),
            )

    @property
    def token_order(self) -> str:
        """The token order."""
        return self.config.token_order

    @property
    def is_full(self) -> bool:
        """True if every block is kept."""
        return self.budget.is_full

    @property
    def moves_heads(self) -> bool:
        """No head has a token order of its own."""
        return False

    def head_places(self, rows: tuple[torch.Tensor, ...]) -> None:
        """All heads have the model's order."""

    def rows_of_heads(self, rows: tuple[torch.Tensor, ...], heads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what some heads read of `rows`."""
        return (self.selector.of_heads(rows[0], heads),)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: tuple[torch.Tensor, ...],
        key_lengths: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        kept: Kept | None = None,
        beside: FrameKeys | None = None,
        share: HeadShare | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, str]:
        """Attend; `rows` is this layer's and step's row of `draw_table`. See `adaptive_attention`."""
        return adaptive_attention(query, key, value, self, rows[0], key_lengths, kept, beside, share)

    @property
    def min_blocks(self) -> int:
        """Blocks, text included, that the rule of cumulative mass leaves in a row at least."""
        text, kept = self.budget.text_blocks, self.budget.kept_blocks
        share = math.floor(self.budget.blocks * self.config.min_fraction)
        return text + max(min(1, kept), min(share - text, kept))


def adaptive_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AdaptivePlan,
    draw: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    kept: Kept | None = None,
    beside: FrameKeys | None = None,
    share: HeadShare | None = None,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Attend to the key blocks that matter. Differentiable, but for the choice of blocks.

    Args:
        query: (B, S, H, D), in token order, after position embeddings.
        key: (B, S, H, D).
        value: (B, S, H, D).
        plan: the plan for this grid.
        draw: this layer's and step's row of `draw_table`.
        key_lengths: (B,) integers: the keys from there on, which are text, are absent. The density counts them.
        kept: returns the mask of an earlier step, or keeps the one that it calls for. None: choose.
        beside: keys for the queries of single frames, all of which are kept. The density does not count them.
        share: where these are the heads of one rank, the heads of each.

    Returns:
        (B, S, H, D) output, the realised density, a float32 tensor of no dimensions, and the implementation that
        computed the output.
    """
    with torch.no_grad():
        if kept is None:
            mask = select(query, key, value, plan, draw, key_lengths, share)
        else:
            mask = kept(lambda: select(query, key, value, plan, draw, key_lengths, share))
    if query.shape[2] == 0:  # a rank without heads, which had to take part in the selection
        return query, query.new_zeros((), dtype=torch.float32), plan.implementation
    return attend_to_blocks(
        query, key, value, mask, plan.grid, pooled=_pool(key, value, plan), key_lengths=key_lengths, beside=beside,
        implementation=plan.implementation, precision=plan.precision,
    )  # fmt: skip


def attend_to_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    grid: TokenGrid,
    *,
    pooled: PooledTokens | None = None,
    key_lengths: torch.Tensor | None = None,
    beside: FrameKeys | None = None,
    implementation: str,
    precision: str,
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Attend to the blocks of a mask; where a grid has `dense_text`, queries of text attend densely. Differentiable.

    Args:
        query: (B, S, H, D), in token order, after position embeddings.
        key: (B, S, H, D).
        value: (B, S, H, D).
        mask: the kept blocks of all S queries.
        grid: the tokens.
        pooled: pooled tokens that share the softmax with the kept keys.
        key_lengths: (B,) integers: the keys from there on, which are text, are absent. The density counts them.
        beside: see `adaptive_attention`; of a grid whose frames are apart and that has no text.
        implementation: see `BladeConfig`.
        precision: see `BladeConfig`; dense queries have the inputs' own.

    Returns:
        (B, S, H, D) output, the density over all S queries, a float32 tensor of no dimensions, and the implementation
        that computed the blocks.
    """
    tokens, rows, every = query.shape[1], query.shape[1], query
    if grid.dense_text and grid.text_after:
        rows = grid.block_queries
        query, mask = query[:, :rows], mask.first_rows(-(-rows // mask.block_size[0]))
    implementation = resolve_implementation(
        query, key, value, mask, pooled=pooled, key_lengths=key_lengths, return_lse=beside is not None,
        implementation=implementation, precision=precision,
    )  # fmt: skip
    if beside is None:
        output = block_sparse_attention(
            query, key, value, mask, pooled=pooled, key_lengths=key_lengths, implementation=implementation,
            precision=precision,
        )  # fmt: skip
    else:
        output, lse = block_sparse_attention(
            query, key, value, mask, pooled=pooled, key_lengths=key_lengths, return_lse=True,
            implementation=implementation, precision=precision,
        )  # fmt: skip
        output = beside.join(
            query, output, lse, grid.height * grid.width, block_size=mask.block_size, implementation=implementation
        )
    with torch.no_grad():
        pooled_pairs = 0 if pooled is None else pooled.pairs(mask, rows)
        density = mask.density(rows, tokens, pooled_pairs=pooled_pairs)
    if query is every:
        return output, density, implementation
    dense = _dense_attention(every[:, rows:], key, value, key_lengths)
    return torch.cat((output, dense), dim=1), (density * rows + (tokens - rows)) / tokens, implementation


def _dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_lengths: torch.Tensor | None
) -> torch.Tensor:
    """Attend from (B, Q, H, D) to all keys that are there."""
    there = None
    if key_lengths is not None:
        there = torch.arange(key.shape[1], device=key.device) < key_lengths[:, None]
        there = there[:, None, None]  # (B, 1, 1, S)
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=there).transpose(1, 2)


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AdaptivePlan,
    draw: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    share: HeadShare | None = None,
) -> BlockMask:
    """Choose the key blocks of every query block. See `adaptive_attention`.

    Of a budget that all heads of the layer share, every rank works out the whole from the scores of all.
    """
    return keep_own_heads(layer_importance(query, key, value, plan, draw, key_lengths, share), plan, share)


def layer_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AdaptivePlan,
    draw: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    share: HeadShare | None = None,
) -> torch.Tensor:
    """Score the key blocks, of all heads of the layer where they share a budget. See `block_importance`."""
    batch, _, heads, _ = query.shape
    if heads:
        importance = block_importance(query, key, value, plan, draw, key_lengths, share)
    else:
        importance = query.new_zeros(1, 1, plan.context.blocks, plan.context.blocks, dtype=torch.float32)
    if share is None or not _needs_all_heads(plan):
        return importance
    return share.gather_heads(importance.expand(batch, heads, -1, -1))


def keep_own_heads(importance: torch.Tensor, plan: AdaptivePlan, share: HeadShare | None) -> BlockMask:
    """Keep the blocks of the largest of `layer_importance`, and return this rank's heads."""
    mask = keep_most_important(importance, plan)
    if share is None or not _needs_all_heads(plan):
        return mask
    return BlockMask.from_dense(mask.keep.index_select(1, share.heads), mask.block_size, mask.capacity)


def _needs_all_heads(plan: AdaptivePlan) -> bool:
    """Return whether a head's blocks depend on the scores of the others."""
    return plan.config.budget != "row" and not plan.selector.scores_all_heads


def block_importance(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AdaptivePlan,
    draw: torch.Tensor,
    key_lengths: torch.Tensor | None = None,
    share: HeadShare | None = None,
) -> torch.Tensor:
    """Score the key blocks for every query block, (B or 1, H or 1, blocks, blocks). See `adaptive_attention`."""
    context = plan.context
    if share is not None:
        context = replace(context, heads=share.heads, head_count=sum(share.counts))
    scores = plan.selector.score(query, key, context, draw, key_lengths)
    if plan.config.value_weighting and not plan.selector.is_control:
        scores = scores * value_spread(value, plan.config.block_size, key_lengths=key_lengths).unsqueeze(2)
    return scores


def keep_most_important(importance: torch.Tensor, plan: AdaptivePlan) -> BlockMask:
    """Keep the blocks of the largest scores, as many as the plan's budget has. See `block_importance`."""
    config, budget = plan.config, plan.budget
    return select_blocks(
        importance,
        (config.block_size, config.block_size),
        max_blocks=budget.text_blocks + budget.kept_blocks,
        extra_blocks=budget.extra_blocks,
        min_blocks=plan.min_blocks,
        cumulative_mass=config.cumulative_mass,
        forced_key_blocks=plan.text_blocks,
        forced_query_blocks=plan.text_blocks,
        budget=config.budget,
    )


def _pool(key: torch.Tensor, value: torch.Tensor, plan: AdaptivePlan) -> PooledTokens | None:
    if plan.budget.pooled_tokens == "none":
        return None
    return pool_tokens(
        key,
        value,
        plan.config.pooled_window,
        start=plan.grid.video_start,
        stop=plan.grid.video_stop,
        block_size=plan.config.block_size if plan.budget.pooled_tokens == "dropped" else None,
    )


def draw_table(config: BladeConfig, layer: int, heads: int, steps: int = DRAWN_STEPS) -> torch.Tensor:
    """Draw the numbers of a layer's selector, for every step.

    Args:
        config: the configuration; its seed, with `layer` and the step, is the key.
        layer: number of the layer.
        heads: number of attention heads.
        steps: number of steps.

    Returns:
        A row for every step, as `Selector.draw` makes them; empty rows where nothing is drawn.
    """
    details = config.asa
    return find_selector(details.selector).table(details, seed=config.seed, layer=layer, heads=heads, steps=steps)
