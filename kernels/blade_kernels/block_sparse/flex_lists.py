"""The lists of blocks that FlexAttention's kernels read, in memory whose strides follow from their shapes.

Its kernels read lists with strides that they take from others: PyTorch 2.11 those of the full key blocks with the
strides of the partial ones, every version the backward's counts with the strides of contiguous ones. Where lists are
made inside a compiled graph, the compiler may pad their strides, each by its own size, and the kernels then read other
rows' lists, or past the end. So all of them are made by an operator, which the compiler does not look into.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask


class FlexLists(NamedTuple):
    """Lists of blocks with their lengths, int32 and contiguous: partial blocks, then full ones, by row and by column.

    Lengths have shape (B or 1, H or 1, blocks), lists (.., blocks, all blocks of the other side). The lists by column
    are there where gradients are needed.
    """

    key_counts: Tensor
    keys: Tensor
    full_key_counts: Tensor
    full_keys: Tensor
    query_counts: Tensor | None = None
    queries: Tensor | None = None
    full_query_counts: Tensor | None = None
    full_queries: Tensor | None = None


def flex_lists(mask: BlockMask, appended: int, by_column: bool) -> FlexLists:
    """Make the lists of a mask.

    Args:
        mask: the mask, whose blocks are full ones; the order of its rows is ignored.
        appended: key blocks behind those of the mask, which are partial ones of every row: a function chooses pairs.
        by_column: also list the query blocks of every key block.
    """
    return FlexLists(*_lists(mask.keep, mask.counts, mask.indices, appended, by_column))


@torch.library.custom_op("blade::flex_lists", mutates_args=())
def _lists(keep: Tensor, counts: Tensor, indices: Tensor, appended: int, by_column: bool) -> list[Tensor]:
    query_blocks, key_blocks = keep.shape[2:]
    partial_counts = torch.full_like(counts, appended, memory_format=torch.contiguous_format)
    partial_lists = indices.new_zeros((*counts.shape, key_blocks + appended))
    partial_lists[..., :appended] = torch.arange(key_blocks, key_blocks + appended, device=counts.device)
    full = indices.new_zeros((*counts.shape, key_blocks + appended))
    full[..., : indices.shape[-1]] = indices
    made = [partial_counts, partial_lists, counts.clone(memory_format=torch.contiguous_format), full]
    if by_column:
        columns = BlockMask.from_dense(torch.nn.functional.pad(keep, (0, appended)).transpose(2, 3).contiguous())
        partial_counts = torch.zeros_like(columns.counts)
        partial_counts[..., key_blocks:] = query_blocks
        rows = torch.arange(query_blocks, device=counts.device, dtype=torch.int32)
        partial_lists = torch.where(partial_counts.unsqueeze(-1) > 0, rows, 0)
        made += [partial_counts, partial_lists, columns.counts, columns.indices]
    return made


@_lists.register_fake
def _(keep: Tensor, counts: Tensor, indices: Tensor, appended: int, by_column: bool) -> list[Tensor]:
    (*outer, query_blocks), columns = counts.shape, keep.shape[3] + appended
    sizes = [(*outer, query_blocks), (*outer, query_blocks, columns)]
    sizes_by_column = [(*outer, columns), (*outer, columns, query_blocks)] if by_column else []
    return [counts.new_empty(size) for size in (*sizes, *sizes, *sizes_by_column, *sizes_by_column)]
