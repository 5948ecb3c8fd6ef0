"""Launches of the selection kernels, and their limits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.triton_support import interpreted, missing_triton, on_device

SCORED_TOGETHER = 64  # sampled queries, and sampled keys, in a tile
WIDEST = 16384  # key blocks in a row, all held by one program


def scoring_unsupported(q: Tensor, k: Tensor, query_samples: int, key_samples: int) -> str | None:
    """Return why the kernel cannot score sampled tokens, or None if it can."""
    if k.dtype != q.dtype:
        return f"the Triton kernels need queries and keys of one type, got {q.dtype} and {k.dtype}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute bfloat16, float16 and float32, not {q.dtype}"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"the Triton kernels need heads of 16, 32, 64 or 128, got {q.shape[-1]}"
    if any(samples & (samples - 1) or samples > SCORED_TOGETHER for samples in (query_samples, key_samples)):
        return (
            f"the Triton kernels need a power of two of at most {SCORED_TOGETHER} samples of a block, "
            f"got {query_samples} and {key_samples}"
        )
    return missing_triton(q.device)


def selection_unsupported(importance: Tensor) -> str | None:
    """Return why the kernel cannot select blocks, or None if it can."""
    if importance.shape[-1] > WIDEST:
        return f"the Triton kernels select from at most {WIDEST} blocks of keys, got {importance.shape[-1]}"
    return missing_triton(importance.device)


@torch.library.custom_op("blade::sampled_importance", mutates_args=())
def sampled_importance(
    q: Tensor,
    k: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    block_size: list[int],
    scale: float,
    key_lengths: Tensor | None,
    softmax_denominator: bool,
    statistic: str,
) -> Tensor:
    """Compute `block_selection.sampled_importance` with the kernel."""
    from blade_kernels.block_selection.triton_selection import sampled_importance_kernel

    batch, tokens, heads, size = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    by_block = key_offsets.ndim == 4
    query_offsets, key_offsets = (
        offsets.to(torch.int32).contiguous()
        if offsets.ndim == 4
        else offsets.to(torch.int32).expand(batch, heads, -1).sort(-1).values.contiguous()
        for offsets in (query_offsets, key_offsets)
    )
    queries, keys = query_offsets.shape[-1], key_offsets.shape[-1]
    importance = _new_importance(q, k, block_size)
    query_blocks, key_blocks = importance.shape[2:]
    rows = SCORED_TOGETHER // queries
    with on_device(q):
        sampled_importance_kernel[(-(-query_blocks // rows), heads, batch)](
            q, k, importance, query_offsets, key_offsets,
            query_offsets if key_lengths is None else key_lengths.to(q.device).contiguous(),
            tokens, k.shape[1], heads, scale, query_blocks, key_blocks, *q.stride()[:3], *k.stride()[:3],
            D=size, BQ=block_size[0], BK=block_size[1], ROWS=rows, QUERIES=queries,
            BLOCKS=SCORED_TOGETHER // keys, KEYS=keys, BY_BLOCK=by_block, LENGTHS=key_lengths is not None,
            DENOMINATOR=softmax_denominator, STATISTIC=statistic, UPCAST=interpreted() and q.dtype == torch.bfloat16,
        )  # fmt: skip
    return importance


@sampled_importance.register_fake
def _(q: Tensor, k: Tensor, query_offsets: Tensor, key_offsets: Tensor, block_size: list[int], *_: Any) -> Tensor:
    return _new_importance(q, k, block_size)


def _new_importance(q: Tensor, k: Tensor, block_size: list[int]) -> Tensor:
    blocks = (-(-q.shape[1] // block_size[0]), -(-k.shape[1] // block_size[1]))
    return q.new_empty(q.shape[0], q.shape[2], *blocks, dtype=torch.float32)


def select_blocks(
    importance: Tensor,
    block_size: tuple[int, int],
    limit: int,
    extra: int,
    least: int,
    cumulative_mass: float | None,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
    capacity: int,
) -> BlockMask:
    """Compute `block_selection.select_blocks` with the kernel.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks).
        block_size: tokens in a (query block, key block).
        limit: `max_blocks`, or the number of key blocks.
        extra: `extra_blocks`.
        least: `min_blocks`.
        cumulative_mass: see `select_blocks`.
        forced_key_blocks: (key blocks,) bool, or None.
        forced_query_blocks: (query blocks,) bool, or None.
        local_radius: in blocks, or None.
        capacity: width of the mask's lists.
    """
    keep, counts, indices = _select(
        importance, list(block_size), limit, extra, least, cumulative_mass, forced_key_blocks, forced_query_blocks,
        local_radius, capacity,
    )  # fmt: skip
    return BlockMask(keep, counts, indices, block_size)


@torch.library.custom_op("blade::select_blocks", mutates_args=())
def _select(
    importance: Tensor,
    block_size: list[int],
    limit: int,
    extra: int,
    least: int,
    cumulative_mass: float | None,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bit map, counts and lists."""
    from blade_kernels.block_selection.triton_selection import select_kernel

    if importance.stride(-1) != 1:
        importance = importance.contiguous()
    batch, heads, query_blocks, key_blocks = importance.shape
    keep, counts, indices = _new_parts(importance, capacity)
    width = 1 << (key_blocks - 1).bit_length()
    with on_device(importance):
        select_kernel[(query_blocks, heads, batch)](
            importance, keep, counts, indices,
            counts if forced_key_blocks is None else forced_key_blocks.contiguous(),
            counts if forced_query_blocks is None else forced_query_blocks.contiguous(),
            heads, query_blocks, key_blocks, capacity, limit, extra, least, cumulative_mass or 0.0,
            *importance.stride()[:3], local_radius or 0,
            BQ=block_size[0], BK=block_size[1], WIDTH=width, BY_MASS=cumulative_mass is not None,
            FORCED_KEYS=forced_key_blocks is not None, FORCED_QUERIES=forced_query_blocks is not None,
            LOCAL=local_radius is not None, num_warps=1 if width <= 1024 else 4,
        )  # fmt: skip
    return keep, counts, indices


@_select.register_fake
def _(importance: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_parts(importance, arguments[-1])


def _new_parts(importance: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = importance.shape[:3]
    return (
        importance.new_empty(importance.shape, dtype=torch.bool),
        importance.new_empty(rows, dtype=torch.int32),
        importance.new_empty((*rows, capacity), dtype=torch.int32),
    )
