"""Launches of the selection kernels, and their limits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.triton_support import interpreted, missing_triton, on_device

KEYS_TOGETHER = 64
"""Sampled keys in a tile, and the most samples of a block."""

QUERIES_TOGETHER = {2: 128, 4: 64}
"""Sampled queries in a tile, by the bytes of a number."""

COLUMNS = 32
"""Key blocks whose statistics a program reads back at a time."""

STATISTICS_BYTES = 2**28
"""Memory for the statistics of sampled queries; heads beyond it are scored by another launch."""

WIDEST = 16384
"""Key blocks in a row, all held by one program."""

DIGITS = ((20, 2048), (10, 1024), (0, 1024))
"""The 31 bits of a non-negative float32 number as digits, highest first: bits below each, and its values."""

CHUNK = 4096
"""Numbers that one program counts, and rows whose ties it adds up."""


def scoring_options(capability_major: int, element_bytes: int) -> tuple[int, int]:
    """Return warps and pipeline stages of the loop over sampled keys, by compute capability and bytes of a number.

    Groups of four warps multiply 64 queries each on sm_90 and sm_100; on sm_120, eight warps would spill.
    """
    half = element_bytes == 2
    return 8 if half and capability_major in (9, 10) else 4, 3 if half else 2


def heads_together(statistics: int, heads: int) -> int:
    """Return the heads that one launch scores, of so many `statistics` each."""
    return min(heads, max(1, STATISTICS_BYTES // (4 * statistics)))


def scoring_unsupported(q: Tensor, k: Tensor, query_samples: int, key_samples: int) -> str | None:
    """Return why the kernel cannot score sampled tokens, or None if it can."""
    if k.dtype != q.dtype:
        return f"the Triton kernels need queries and keys of one type, got {q.dtype} and {k.dtype}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute bfloat16, float16 and float32, not {q.dtype}"
    if q.shape[-1] not in (16, 32, 64, 128):
        return f"the Triton kernels need heads of 16, 32, 64 or 128, got {q.shape[-1]}"
    if any(samples & (samples - 1) or samples > KEYS_TOGETHER for samples in (query_samples, key_samples)):
        return (
            f"the Triton kernels need a power of two of at most {KEYS_TOGETHER} samples of a block, "
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
    from blade_kernels.block_selection.triton_scoring import gather_keys_kernel, sampled_importance_kernel

    batch, tokens, heads, size = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    by_block = key_offsets.ndim == 4
    query_offsets = query_offsets.expand(batch, heads, -1).contiguous()
    key_offsets = (key_offsets if by_block else key_offsets.expand(batch, heads, -1).sort(-1).values).contiguous()
    queries, keys = query_offsets.shape[-1], key_offsets.shape[-1]
    importance = _new_importance(q, k, block_size)
    query_blocks, key_blocks = importance.shape[2:]
    rows, blocks = QUERIES_TOGETHER[q.element_size()] // queries, KEYS_TOGETHER // keys
    row_tiles, padded_blocks = -(-query_blocks // rows), -(-key_blocks // blocks) * blocks
    samples = padded_blocks * keys
    gathered = k.new_empty(batch, heads, samples, size)
    drawn = k.new_empty(batch, heads, samples, dtype=torch.bool)
    per_head = (batch, row_tiles, rows * queries, padded_blocks)
    together = heads_together(math.prod(per_head), heads)
    statistics = q.new_empty(together * math.prod(per_head), dtype=torch.float32)
    warps, stages = scoring_options(
        torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else 0, q.element_size()
    )
    lengths = drawn if key_lengths is None else key_lengths.to(q.device).contiguous()
    with on_device(q):
        gather_keys_kernel[(samples // KEYS_TOGETHER, heads, batch)](
            k, key_offsets, lengths, gathered, drawn, k.shape[1], heads, key_blocks, samples, *k.stride()[:3],
            D=size, BK=block_size[1], KEYS=keys, TILE=KEYS_TOGETHER, BY_BLOCK=by_block,
            LENGTHS=key_lengths is not None,
        )  # fmt: skip
        for first in range(0, heads, together):
            sampled_importance_kernel[(row_tiles, min(together, heads - first), batch)](
                q, gathered, drawn, query_offsets, lengths, statistics, importance,
                tokens, k.shape[1], heads, scale, first, query_blocks, key_blocks, padded_blocks, *q.stride()[:3],
                D=size, BQ=block_size[0], BK=block_size[1], ROWS=rows, QUERIES=queries, BLOCKS=blocks, KEYS=keys,
                COLUMNS=COLUMNS, LENGTHS=key_lengths is not None, DENOMINATOR=softmax_denominator,
                STATISTIC=statistic, UPCAST=interpreted() and q.dtype == torch.bfloat16,
                num_warps=warps, num_stages=stages,
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


def select_over_heads(
    importance: Tensor,
    block_size: tuple[int, int],
    limit: int,
    extra: int,
    least: int,
    forced: Tensor | None,
    forced_query_blocks: Tensor | None,
) -> BlockMask:
    """Compute `block_selection.select_blocks` with one budget for the rows of all heads.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks).
        block_size: tokens in a (query block, key block).
        limit: key blocks in a row on average, less than there are.
        extra: rows of a head with one more.
        least: best blocks that every row keeps.
        forced: bool that broadcasts to (query blocks, key blocks), or None.
        forced_query_blocks: (query blocks,) bool, or None.
    """
    keep, counts, indices = _select_over_heads(importance, limit, extra, least, forced, forced_query_blocks)
    return BlockMask(keep, counts, indices, block_size)


@torch.library.custom_op("blade::select_over_heads", mutates_args=())
def _select_over_heads(
    importance: Tensor, limit: int, extra: int, least: int, forced: Tensor | None, forced_query_blocks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return bit map, counts and lists."""
    from blade_kernels.block_selection import triton_layer_budget as kernels

    if importance.stride(-1) != 1:
        importance = importance.contiguous()
    batch, heads, query_blocks, key_blocks = importance.shape
    rows, width = heads * query_blocks, 1 << (key_blocks - 1).bit_length()
    keep, counts, indices = _new_parts(importance, key_blocks)
    bits = torch.empty_like(indices)
    ties = torch.empty_like(counts)
    state = counts.new_empty(batch, 3)
    histograms = torch.zeros(batch * sum(values for _, values in DIGITS), dtype=torch.int32, device=importance.device)
    by_row = {"WIDTH": width, "num_warps": 1 if width <= 1024 else 4}
    flags = {"FORCED_QUERIES": forced_query_blocks is not None}
    forced_queries = keep if forced_query_blocks is None else forced_query_blocks.contiguous()
    forced = None if forced is None else forced.contiguous()
    with on_device(importance):
        kernels.rank_kernel[(query_blocks, heads, batch)](
            importance, bits, keep if forced is None else forced, forced_queries,
            heads, query_blocks, key_blocks, least, *importance.stride()[:3],
            key_blocks if forced is not None and forced.ndim == 2 else 0,
            FORCED=forced is not None, **flags, **by_row,
        )  # fmt: skip
        start = 0
        for shift, values in DIGITS:
            histogram = histograms[start : start + batch * values]
            kernels.digit_histogram_kernel[(-(-rows * key_blocks // CHUNK), batch)](
                bits, histogram, state, rows * key_blocks, SHIFT=shift, BINS=values, CHUNK=CHUNK, FIRST=not start
            )
            kernels.next_digit_kernel[(batch,)](
                histogram, state, forced_queries, heads, query_blocks, limit, extra,
                BINS=values, ROWS=1 << (query_blocks - 1).bit_length(), FIRST=not start, **flags,
            )  # fmt: skip
            start += batch * values
        kernels.count_ties_kernel[(rows, batch)](bits, state, ties, rows, key_blocks, **by_row)
        kernels.keep_kernel[(rows, batch)](
            bits, state, ties, forced_queries, keep, counts, indices, rows, query_blocks, key_blocks,
            CHUNK=CHUNK, **flags, **by_row,
        )  # fmt: skip
    return keep, counts, indices


@_select_over_heads.register_fake
def _(importance: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_parts(importance, importance.shape[-1])
