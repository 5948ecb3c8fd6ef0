"""Kernels of one budget for the rows of all heads: the threshold digit by digit, then every row's blocks.

Rows are ranked by the bits of their scores, which sort as the scores do. Blocks that a row keeps in any case have the
bits of infinity, and rows that keep every block have -1, which is never counted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blade_kernels.block_selection.triton_selection import INFINITY_BITS, leading, store_row


@triton.jit
def rank_kernel(
    importance, bits, forced, forced_queries,
    H, query_blocks, key_blocks, least,
    importance_batch, importance_head, importance_row, forced_row,
    WIDTH: tl.constexpr, FORCED: tl.constexpr, FORCED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Write the bits of one row.

    Args:
        importance: strided, non-negative.
        bits: (B, H, query blocks, key blocks) int32, contiguous.
        forced: (1 or query blocks, key blocks) bool with a stride of `forced_row`, if `FORCED`.
        forced_queries: (query blocks,) bool, rows that keep every block, if `FORCED_QUERIES`.
        least: blocks that every row keeps.
        WIDTH: `key_blocks` rounded up to a power of two.
    """
    row, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks = tl.arange(0, WIDTH)
    inside = blocks < key_blocks
    source = (
        item.to(tl.int64) * importance_batch + head.to(tl.int64) * importance_head + row.to(tl.int64) * importance_row
    )
    values = tl.load(importance + source + blocks, mask=inside, other=0.0).to(tl.float32)
    ranked = tl.where(values > 0.0, values, 0.0).to(tl.int32, bitcast=True)
    if FORCED:
        is_forced = tl.load(forced + row.to(tl.int64) * forced_row + blocks, mask=inside, other=0) != 0
        ranked = tl.where(is_forced, INFINITY_BITS, ranked)
    ranked = tl.where(inside, ranked, -1)
    ranked = tl.where(leading(ranked, least), INFINITY_BITS, ranked)
    if FORCED_QUERIES:
        ranked = tl.where(tl.load(forced_queries + row) != 0, -1, ranked)
    mask_row = (item.to(tl.int64) * H + head) * query_blocks + row
    tl.store(bits + mask_row * key_blocks + blocks, ranked, mask=inside)


@triton.jit
def digit_histogram_kernel(
    bits, histogram, state, size,
    SHIFT: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Count the values of one digit, `(bits >> SHIFT) % BINS`, among the bits that begin with a prefix.

    Args:
        bits: (B, size) int32, contiguous; negative ones are not counted.
        histogram: (B, BINS) int32, zeros, to which the counts are added.
        state: of `next_digit_kernel`, whose prefix is that of all digits above; not read if `FIRST`.
    """
    chunk, item = tl.program_id(0), tl.program_id(1)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(bits + item.to(tl.int64) * size + places, mask=places < size, other=-1)
    prefix = 0 if FIRST else tl.load(state + item * 3)
    begins = (values >= 0) & ((values >> SHIFT) // BINS == prefix)
    digits = tl.where(begins, (values >> SHIFT) % BINS, 0)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(digits, BINS)
    counts -= tl.where(bins == 0, CHUNK - tl.sum(begins.to(tl.int32), 0), 0)  # those that do not count fell into 0
    tl.atomic_add(histogram + item * BINS + bins, counts, mask=counts > 0)


@triton.jit
def next_digit_kernel(
    histogram, state, forced_queries,
    H, query_blocks, limit, extra,
    BINS: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, FORCED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Find one digit of an item's threshold, the largest value that is not exceeded by as many as are to be kept.

    Args:
        histogram: (B, BINS) int32, of `digit_histogram_kernel`.
        state: (B, 3) int32: the digits so far; how many of those that begin like this are to be kept; and how many
            begin like this. Before the `FIRST` digit it is not read.
        forced_queries: (query blocks,) bool, rows that keep every block, if `FORCED_QUERIES`.
        limit: key blocks in a row on average; likewise `extra`, rows of a head with one more.
        ROWS: `query_blocks` rounded up to a power of two.
    """
    item = tl.program_id(0)
    state += item * 3
    if FIRST:
        prefix = 0
        missing = H * (limit * query_blocks + extra)
        if FORCED_QUERIES:
            row = tl.arange(0, ROWS)
            most = limit + (row + 1) * extra // query_blocks - row * extra // query_blocks
            is_forced = tl.load(forced_queries + row, mask=row < query_blocks, other=1) != 0
            missing = H * tl.sum(tl.where(is_forced, 0, most), 0)
    else:
        prefix = tl.load(state)
        missing = tl.load(state + 1)
    bins = tl.arange(0, BINS)
    counts = tl.load(histogram + item * BINS + bins)
    from_here = tl.cumsum(counts, 0, reverse=True)  # of this value and all larger ones
    digit = tl.maximum(tl.sum((from_here >= missing).to(tl.int32), 0) - 1, 0)
    is_digit = bins == digit
    tl.store(state, prefix * BINS + digit)
    tl.store(state + 1, missing - tl.sum(tl.where(is_digit, from_here - counts, 0), 0))
    tl.store(state + 2, tl.sum(tl.where(is_digit, counts, 0), 0))


@triton.jit
def count_ties_kernel(bits, state, ties, all_rows, key_blocks, WIDTH: tl.constexpr):
    """Count the blocks of one row at its item's threshold.

    Args:
        bits: (B, rows, key blocks) int32, contiguous.
        state: of `next_digit_kernel`.
        ties: (B, rows) int32, contiguous.
        all_rows: of all heads.
    """
    row, item = tl.program_id(0), tl.program_id(1)
    blocks = tl.arange(0, WIDTH)
    wide = item.to(tl.int64) * all_rows + row
    ranked = tl.load(bits + wide * key_blocks + blocks, mask=blocks < key_blocks, other=-1)
    tl.store(ties + wide, tl.sum((ranked == tl.load(state + item * 3)).to(tl.int32), 0))


@triton.jit
def keep_kernel(
    bits, state, ties, forced_queries, keep, counts, indices,
    all_rows, query_blocks, key_blocks,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, FORCED_QUERIES: tl.constexpr,
):  # fmt: skip
    """Write one row of the mask: what is above the threshold, and the first of all rows' blocks that are at it.

    Args:
        bits: (B, rows, key blocks) int32, contiguous; likewise `keep`, bool, and `indices`, int32.
        state: of `next_digit_kernel`.
        ties: of `count_ties_kernel`.
        forced_queries: (query blocks,) bool, rows that keep every block, if `FORCED_QUERIES`.
        counts: (B, rows) int32, contiguous.
        all_rows: of all heads.
        CHUNK: rows whose ties are added up at a time.
    """
    row, item = tl.program_id(0), tl.program_id(1)
    blocks = tl.arange(0, WIDTH)
    inside = blocks < key_blocks
    wide = item.to(tl.int64) * all_rows + row
    ranked = tl.load(bits + wide * key_blocks + blocks, mask=inside, other=-1)
    state += item * 3
    threshold, free = tl.load(state), tl.load(state + 1)
    if free < tl.load(state + 2):  # rare: the rows before use up some of what is free
        for start in range(0, row, CHUNK):
            earlier = start + tl.arange(0, CHUNK)
            free -= tl.sum(tl.load(ties + item.to(tl.int64) * all_rows + earlier, mask=earlier < row, other=0), 0)
    tied = ranked == threshold
    kept = (ranked > threshold) | tied & (tl.cumsum(tied.to(tl.int32), 0) <= free) | (ranked == INFINITY_BITS)
    if FORCED_QUERIES:
        kept = tl.where(tl.load(forced_queries + row % query_blocks) != 0, inside, kept)
    store_row(keep, counts, indices, wide, key_blocks, key_blocks, kept & inside, blocks, WIDTH)
