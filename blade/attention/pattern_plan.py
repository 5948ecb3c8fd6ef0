"""Attention by a table of head patterns: masks made once for a shape, and put together by head in every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from blade_kernels.block_mask import BlockMask
from torch import Tensor

from blade.attention.adaptive import DRAWN_STEPS, AdaptivePlan, attend_to_blocks, draw_table, select
from blade.attention.config import BladeConfig
from blade.attention.frame_keys import FrameKeys
from blade.attention.pattern_table import PatternTable
from blade.attention.patterns import pattern_blocks
from blade.attention.reuse import Kept
from blade.attention.sequence_parallel import HeadShare
from blade.token_grid import TokenGrid


@dataclass(frozen=True, eq=False)
class PatternPlan:
    """Plan that all layers share for one shape of latent, worked out once, independent of queries and keys."""

    grid: TokenGrid
    """The tokens."""
    table: PatternTable
    """The table, for this grid."""
    implementation: str
    """Implementation of the block-sparse attention."""
    precision: str
    """See `BladeConfig.precision`."""
    masks: Tensor
    """(masks, blocks, blocks) bool, of the patterns that are no columns alone, and what columns have beside them."""
    mask_of: Tensor
    """(patterns,) int64, which of `masks`."""
    columns: Tensor
    """(patterns, blocks) bool, key blocks that all queries keep."""
    capacity: int
    """The most key blocks that a row of any pattern keeps."""
    densities: tuple[float | None, ...]
    """Share of all pairs that each pattern computes; None for `asa`."""
    adaptive: AdaptivePlan | None
    """For heads that choose anew; None if there are none."""
    is_adaptive: Tensor | None
    """(patterns,) bool, which patterns do."""
    order_of: Tensor | None
    """(patterns,) int64, number of the token order of each; None if all have the model's."""
    places: Tensor | None
    """(orders, S) int64, where each token stands in an order, from its place in the model's."""
    tokens: Tensor | None
    """(orders, S) int64, the inverse."""

    @classmethod
    def of(cls, config: BladeConfig, grid: TokenGrid, device: torch.device) -> PatternPlan:
        """Make the plan for a grid."""
        assert config.patterns is not None
        with torch.inference_mode(False):
            return cls._of(config, config.patterns.on_grid(grid), grid, device)

    @classmethod
    def _of(cls, config: BladeConfig, table: PatternTable, grid: TokenGrid, device: torch.device) -> PatternPlan:
        size, order, tokens = table.block_size, table.token_order, grid.sequence_length
        blocks = -(-tokens // size)
        text = torch.tensor(grid.text_blocks(size), device=device)
        masks, mask_of, densities = [text | text[:, None]], [], list[float | None]()
        columns = torch.zeros(len(table.patterns), blocks, dtype=torch.bool, device=device)
        capacity = int(text.sum())
        for number, pattern in enumerate(table.patterns):
            if pattern.kind == "asa":
                mask_of.append(0)
                densities.append(None)
                continue
            keep = pattern_blocks(pattern, grid, size, order, device)
            mask = BlockMask.from_dense(keep[None, None], (size, size))
            densities.append(float(mask.density(tokens, tokens)))
            capacity = max(capacity, int(mask.counts.max()))
            if pattern.kind == "vertical" and not bool(text.all()):
                columns[number] = keep[int(text.logical_not().nonzero()[0])]
                mask_of.append(0)
            else:
                mask_of.append(len(masks))
                masks.append(keep)
        adaptive = is_adaptive = None
        if None in densities:
            # a budget for the layer would be shared with heads that do not choose
            by_row = replace(config, asa=replace(config.asa, budget="row"))
            adaptive = AdaptivePlan.of(by_row, grid, device)
            is_adaptive = torch.tensor([density is None for density in densities], device=device)
        orders = list(dict.fromkeys(pattern.order or order for pattern in table.patterns))
        order_of = places = None
        if orders != [order]:
            order_of = torch.tensor(
                [orders.index(pattern.order or order) for pattern in table.patterns], device=device
            )
            places = torch.stack([order_places(grid, order, other, device) for other in orders])
        return cls(
            grid=grid,
            table=table,
            implementation=config.implementation,
            precision=config.precision,
            masks=torch.stack(masks),
            mask_of=torch.tensor(mask_of, device=device),
            columns=columns,
            capacity=max(1, capacity),
            densities=tuple(densities),
            adaptive=adaptive,
            is_adaptive=is_adaptive,
            order_of=order_of,
            places=places,
            tokens=None if places is None else places.argsort(-1),
        )

    @property
    def token_order(self) -> str:
        """The model's token order."""
        return self.table.token_order

    @property
    def is_full(self) -> bool:
        """True if no head ever leaves anything out."""
        return not self.table.sparse_layers().any()

    def mask(self, ids: Tensor, chosen: BlockMask | None = None) -> BlockMask:
        """Put the masks of a layer's heads together.

        Args:
            ids: (H,) int64, the heads' patterns.
            chosen: for the heads whose pattern is `asa`.
        """
        keep = self.masks.index_select(0, self.mask_of.index_select(0, ids))
        keep = (keep | self.columns.index_select(0, ids).unsqueeze(1)).unsqueeze(0)
        capacity = self.capacity
        if chosen is not None:
            assert self.is_adaptive is not None
            keep = torch.where(self.is_adaptive.index_select(0, ids)[:, None, None], chosen.keep, keep)
            capacity = max(capacity, chosen.capacity)
        size = self.table.block_size
        return BlockMask.from_dense(keep, (size, size), capacity).longest_rows_first()

    @property
    def moves_heads(self) -> bool:
        """True if a pattern has a token order of its own."""
        return self.places is not None

    def head_places(self, rows: tuple[Tensor, ...]) -> Tensor | None:
        """Return the place of each token of each head, (H, S) int64; None where all have the model's order."""
        if self.places is None or self.order_of is None:
            return None
        return self.places.index_select(0, self.order_of.index_select(0, rows[0].long()))

    def rows_of_heads(self, rows: tuple[Tensor, ...], heads: Tensor) -> tuple[Tensor, ...]:
        """Return what some heads read of `rows`."""
        ids, *draws = rows
        selected = () if self.adaptive is None else self.adaptive.rows_of_heads(tuple(draws), heads)
        return (ids.index_select(0, heads), *selected)

    def pattern_costs(self) -> tuple[float, ...]:
        """Return the relative cost of a head of each pattern: the share of pairs that it computes, and one key block.

        The block stands for what every head costs, one that computes nothing too: its output is written.
        """
        block = 1 / self.masks.shape[-1]
        adaptive = 0.0 if self.adaptive is None else self.adaptive.budget.density
        return tuple(block + (adaptive if density is None else density) for density in self.densities)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: tuple[Tensor, ...],
        key_lengths: Tensor | None = None,
        places: Tensor | None = None,
        kept: Kept | None = None,
        beside: FrameKeys | None = None,
        share: HeadShare | None = None,
    ) -> tuple[Tensor, Tensor, str]:
        """Attend by the heads' patterns. Differentiable.

        Args:
            query: (B, S, H, D), in the model's token order, after position embeddings.
            key: (B, S, H, D).
            value: (B, S, H, D).
            rows: this layer's and step's rows of `pattern_tables`.
            key_lengths: (B,) integers: the keys from there on, which are text, are absent. The density counts them.
            places: `head_places`, if queries and keys are there already.
            kept: not used: heads may change their patterns from step to step.
            beside: see `adaptive_attention`.
            share: see `adaptive_attention`.

        Returns:
            (B, S, H, D) output, the realised density, a float32 tensor of no dimensions, and the implementation that
            computed the output.

        Raises:
            ValueError: if heads have token orders of their own, and frames have keys beside the sequence.
        """
        if self.tokens is not None and beside is not None:
            raise ValueError(
                "`order` of a head pattern must be the model's token order here: frames attend to keys of their own."
            )
        if query.shape[2] == 0:  # a rank without heads
            return query, query.new_zeros((), dtype=torch.float32), self.implementation
        ids = rows[0].long()
        if self.tokens is not None:
            assert self.order_of is not None
            tokens = self.tokens.index_select(0, self.order_of.index_select(0, ids))
            value = _by_head(value, tokens)
            if places is None:
                query, key, places = _by_head(query, tokens), _by_head(key, tokens), self.head_places(rows)
        with torch.no_grad():
            chosen = None
            if self.adaptive is not None:
                chosen = select(query, key, value, self.adaptive, rows[1], key_lengths, share)
            mask = self.mask(ids, chosen)
        output, density, implementation = attend_to_blocks(
            query, key, value, mask, self.grid, key_lengths=key_lengths, beside=beside,
            implementation=self.implementation, precision=self.precision,
        )  # fmt: skip
        if places is not None:
            output = _by_head(output, places)
        return output, density, implementation


def pattern_tables(config: BladeConfig, layer: int, heads: int, steps: int) -> tuple[Tensor, ...]:
    """Return the tables that a layer reads at every step of a run.

    Args:
        config: the configuration.
        layer: number of the layer.
        heads: number of its heads.
        steps: steps of the run.

    Returns:
        int16 (steps, heads), the heads' patterns; and, where a pattern is `asa`, `draw_table`'s rows.
    """
    table = config.patterns
    assert table is not None
    ids = torch.from_numpy(table.assignment[table.by_step(steps), layer]).to(torch.int16)
    if all(pattern.kind != "asa" for pattern in table.patterns):
        return (ids,)
    return ids, draw_table(config, layer, heads, min(steps, DRAWN_STEPS))[torch.arange(steps) % DRAWN_STEPS]


def order_places(grid: TokenGrid, model: str, own: str, device: torch.device) -> Tensor:
    """Place in the order `own` of each token of a sequence in the order `model`, (S,) int64; text stays."""
    places = torch.arange(grid.sequence_length, device=device)
    video = grid.inverse_order(own, device).index_select(0, grid.order(model, device))
    places[grid.video_start : grid.video_stop] = video + grid.video_start
    return places


def _by_head(x: Tensor, tokens: Tensor) -> Tensor:
    """Take (B, S, H, D) in an order of every head's own, (H, S)."""
    return x.gather(1, tokens.T[None, :, :, None].expand(len(x), -1, -1, x.shape[-1]))
