"""Selection with one budget for the rows of all heads, by sorting, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from blade_kernels.block_selection.ranking import largest

INFINITY_BITS = 0x7F800000
"""Bits of infinity, which no finite score reaches. Non-negative float32 numbers sort as their bits do."""


def keep_over_heads(
    importance: Tensor,
    limit: int,
    extra: int,
    least: int,
    forced: Tensor | None,
    forced_query_blocks: Tensor | None,
) -> Tensor:
    """Keep the most important key blocks of all rows of all heads of an item together.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks) float32, not negative.
        limit: key blocks in a row on average, less than there are.
        extra: rows with one more.
        least: best blocks that every row keeps.
        forced: bool that broadcasts to (query blocks, key blocks), or None.
        forced_query_blocks: (query blocks,) bool, or None.

    Returns:
        Bool of the shape of `importance`.
    """
    heads, query_blocks = importance.shape[1:3]
    ranked = importance.abs() if forced is None else importance.abs().masked_fill(forced, torch.inf)
    bits = ranked.contiguous().view(torch.int32)
    bits = bits.scatter(-1, largest(ranked, least), INFINITY_BITS)
    total: int | Tensor = heads * (limit * query_blocks + extra)
    if forced_query_blocks is not None:
        rows = torch.arange(query_blocks + 1, device=bits.device) * extra // query_blocks
        total = heads * ((limit + rows.diff()) * ~forced_query_blocks).sum()
        bits = bits.masked_fill(forced_query_blocks.unsqueeze(-1), -1)
    flat = bits.flatten(1)
    threshold, at_threshold = _threshold(flat, total)
    tied = flat == threshold
    keep = (flat > threshold) | (tied & (tied.cumsum(-1) <= at_threshold)) | (flat == INFINITY_BITS)
    keep = keep.view_as(bits)
    return keep if forced_query_blocks is None else keep | forced_query_blocks.unsqueeze(-1)


def _threshold(bits: Tensor, total: int | Tensor) -> tuple[Tensor, Tensor]:
    """Find the `total`-th largest of each row of (B, n), (B, 1), and how many equal to it are among them, (B, 1)."""
    size = bits.shape[1]
    if isinstance(total, int):
        threshold = bits.kthvalue(size - total + 1, keepdim=True).values
    else:
        place = (size - total).clamp(max=size - 1)  # 0 are kept where every row is forced
        threshold = bits.sort().values.index_select(1, place.view(1))
    return threshold, total - (bits > threshold).sum(-1, keepdim=True)
