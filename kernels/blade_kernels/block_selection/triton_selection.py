"""Kernel that selects a row's blocks without sorting, and what it shares with the budget of a layer."""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-126)  # smallest normal float32; Triton takes a smaller one for a float64
INFINITY_BITS = tl.constexpr(0x7F800000)  # non-negative float32 numbers sort as their bits do


@triton.jit
def select_kernel(
    importance, keep, counts, indices,
    forced_keys, forced_queries,
    H, query_blocks, key_blocks, capacity, limit, extra, least, mass,
    importance_batch, importance_head, importance_row, local_radius,
    BQ: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
    BY_MASS: tl.constexpr, FORCED_KEYS: tl.constexpr, FORCED_QUERIES: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Select the key blocks of one row, as specified by `select_blocks`.

    The threshold is found by bisection over the bits of the values; of the blocks at the threshold the first are kept.

    Args:
        importance: strided, non-negative.
        keep: (B, H, query blocks, key blocks) bool, contiguous; likewise `counts` and `indices`.
        limit: `max_blocks`; likewise `extra`, `extra_blocks`, and `least`, `min_blocks`.
        mass: `cumulative_mass`, if `BY_MASS`.
        WIDTH: `key_blocks` rounded up to a power of two.
    """
    row, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.arange(0, WIDTH)
    inside = blocks < key_blocks
    source = (
        item.to(tl.int64) * importance_batch + head.to(tl.int64) * importance_head + row.to(tl.int64) * importance_row
    )
    values = tl.load(importance + source + blocks, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(values > 0.0, values, 0.0)
    forced = blocks < 0
    if FORCED_KEYS:
        forced = forced | (tl.load(forced_keys + blocks, mask=inside, other=0) != 0)
    if LOCAL:
        forced = forced | (blocks >= row * BQ // BK - local_radius) & (
            blocks <= (row * BQ + BQ - 1) // BK + local_radius
        )
    forced = forced & inside
    bits = tl.where(forced, INFINITY_BITS, values.to(tl.int32, bitcast=True))
    bits = tl.where(inside, bits, -1)

    limit += (row + 1) * extra // query_blocks - row * extra // query_blocks
    target_count = limit
    if BY_MASS:
        target = tl.sum(values, 0) * mass
        # invariant: the values >= low have the target mass, those >= high do not
        low, high = 0, INFINITY_BITS + 1
        for _ in range(31):
            middle = low + (high - low) // 2
            reached = tl.sum(tl.where(bits >= middle, values, 0.0), 0) >= target
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        above = tl.sum((bits > low).to(tl.int32), 0)
        missing = target - tl.sum(tl.where(bits > low, values, 0.0), 0)
        threshold = tl.max(tl.where(bits == low, values, 0.0), 0)
        ties = tl.sum((bits == low).to(tl.int32), 0)
        more = tl.ceil(tl.div_rn(missing, tl.maximum(threshold, SMALLEST))).to(tl.int32)
        target_count = above + tl.minimum(tl.maximum(more, 1), tl.maximum(ties, 1))
        target_count = tl.minimum(tl.maximum(target_count, least), limit)
    target_count = tl.maximum(target_count, tl.sum(forced.to(tl.int32), 0))
    if FORCED_QUERIES:
        target_count = tl.where(tl.load(forced_queries + row) != 0, key_blocks, target_count)

    kept = leading(bits, target_count)
    mask_row = (item.to(tl.int64) * H + head) * query_blocks + row
    store_row(keep, counts, indices, mask_row, key_blocks, capacity, kept, blocks, WIDTH)


@triton.jit
def leading(bits, count):
    """Mark the `count` largest of a row, of equals the first; their bits are at least 0, and -1 outside the row."""
    low, high = 0, INFINITY_BITS + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum((bits >= middle).to(tl.int32), 0) >= count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tied = (bits == low).to(tl.int32)
    free = count - tl.sum((bits > low).to(tl.int32), 0)
    return (bits > low) | ((tied != 0) & (tl.cumsum(tied, 0) <= free))


@triton.jit
def store_row(keep, counts, indices, row, key_blocks, capacity, kept, blocks, WIDTH: tl.constexpr):
    """Write a row of a mask: its part of the bit map, its count and its list."""
    count = tl.sum(kept.to(tl.int32), 0)
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(keep + row * key_blocks + blocks, kept, mask=blocks < key_blocks)
    tl.store(counts + row, count)
    tl.store(indices + row * capacity + slots, blocks, mask=kept & (slots < capacity))
    padding = (blocks >= count) & (blocks < capacity)
    tl.store(indices + row * capacity + blocks, tl.zeros((WIDTH,), tl.int32), mask=padding)
