"""Kernels of block selection: importance of sampled tokens, and selection of a row's blocks without sorting."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)  # smallest normal float32; Triton takes a smaller one for a float64
INFINITY_BITS = tl.constexpr(0x7F800000)  # non-negative float32 numbers sort as their bits do


@triton.jit
def sampled_importance_kernel(
    q, k, importance,
    query_offsets, key_offsets, key_lengths,
    S, T, H, scale,
    query_blocks, key_blocks,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr, BY_BLOCK: tl.constexpr, LENGTHS: tl.constexpr,
    DENOMINATOR: tl.constexpr, STATISTIC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the importance of all key blocks for `ROWS` query blocks, in two passes over the sampled keys.

    Args:
        importance: (B, H, query blocks, key blocks) float32, contiguous.
        query_offsets: (B, H, QUERIES) int32, sorted; likewise `key_offsets`, (B, H, KEYS), or with `BY_BLOCK`
            (B, H, key blocks, KEYS), places below the block's length.
        BLOCKS: key blocks in a tile.
        STATISTIC: "max", "mean", "rms" or "residual".
    """
    first, head, item = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    wide_head, wide_item = head.to(tl.int64), item.to(tl.int64)
    present = T
    if LENGTHS:
        present = tl.minimum(tl.maximum(tl.load(key_lengths + item), 0), T).to(tl.int32)
    dims = tl.arange(0, D)
    probe = tl.arange(0, ROWS * QUERIES)
    rows = first + probe // QUERIES
    offset = tl.load(query_offsets + (item * H + head) * QUERIES + probe % QUERIES)
    positions = rows * BQ + offset * tl.minimum(tl.maximum(S - rows * BQ, 0), BQ) // BQ
    base = q + wide_item * q_batch + wide_head * q_head
    q_tile = tl.load(
        base + positions.to(tl.int64)[:, None] * q_token + dims[None, :],
        mask=(rows < query_blocks)[:, None],
        other=0.0,
    )
    sample = tl.arange(0, BLOCKS * KEYS)
    key_offsets += (wide_item * H + wide_head) * KEYS * (key_blocks if BY_BLOCK else 1)
    k_base = k + wide_item * k_batch + wide_head * k_head

    peak = tl.full((ROWS * QUERIES,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS * QUERIES,), tl.float32)
    for block in range(0, key_blocks, BLOCKS):
        logits = _sampled_logits(
            q_tile, k_base, k_token, block, key_offsets, sample, present, key_blocks, scale,
            D, BK, KEYS, BY_BLOCK, UPCAST,
        )  # fmt: skip
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    divisor = tl.maximum(total, 1.0) if DENOMINATOR else tl.full((ROWS * QUERIES,), 1.0, tl.float32)
    for block in range(0, key_blocks, BLOCKS):
        logits = _sampled_logits(
            q_tile, k_base, k_token, block, key_offsets, sample, present, key_blocks, scale,
            D, BK, KEYS, BY_BLOCK, UPCAST,
        )  # fmt: skip
        if STATISTIC == "max":
            best = tl.max(logits.reshape(ROWS * QUERIES, BLOCKS, KEYS), 2)
            weights = tl.exp2(best - peak[:, None]) / divisor[:, None]
            score = tl.max(weights.reshape(ROWS, QUERIES, BLOCKS), 1)
        elif STATISTIC == "residual":
            by_block = (logits - peak[:, None]).reshape(ROWS * QUERIES, BLOCKS, KEYS)
            drawn = by_block > float("-inf")
            count = tl.sum(drawn.to(tl.float32), 2)
            mean = tl.exp2(tl.sum(tl.where(drawn, by_block, 0.0), 2) / tl.maximum(count, 1.0))
            difference = tl.where(drawn, tl.exp2(by_block) - mean[:, :, None], 0.0) / divisor[:, None, None]
            squares = tl.sum(difference * difference, 2).reshape(ROWS, QUERIES, BLOCKS)
            score = tl.sqrt(tl.sum(squares, 1) / QUERIES)
        else:
            weights = tl.exp2(logits - peak[:, None]) / divisor[:, None]
            mass = tl.sum(weights.reshape(ROWS * QUERIES, BLOCKS, KEYS), 2).reshape(ROWS, QUERIES, BLOCKS)
            if STATISTIC == "mean":
                score = tl.sum(mass, 1) / QUERIES
            else:
                score = tl.sqrt(tl.sum(mass * mass, 1) / QUERIES)
        row, column = first + tl.arange(0, ROWS), block + tl.arange(0, BLOCKS)
        to = ((wide_item * H + wide_head) * query_blocks + row[:, None]) * key_blocks + column[None, :]
        tl.store(importance + to, score, mask=(row < query_blocks)[:, None] & (column < key_blocks)[None, :])


@triton.jit
def _sampled_logits(
    q, k_base, k_token, block, key_offsets, sample, present, key_blocks, scale,
    D: tl.constexpr, BK: tl.constexpr, KEYS: tl.constexpr, BY_BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute base-2 logits over the samples of some key blocks; -inf for duplicates and samples past the end."""
    blocks = block + sample // KEYS
    length = tl.minimum(tl.maximum(present - blocks * BK, 0), BK)
    places = sample % KEYS
    if BY_BLOCK:
        places = block * KEYS + sample
    inside = blocks < key_blocks
    within = tl.load(key_offsets + places, mask=inside, other=0)
    previous = tl.load(key_offsets + places - 1, mask=inside & (sample % KEYS > 0), other=0)
    if not BY_BLOCK:
        within = within * length // BK
        previous = previous * length // BK
    distinct = (sample % KEYS == 0) | (within != previous)
    valid = (blocks < key_blocks) & (length > 0) & distinct
    pointers = k_base + (blocks * BK + within).to(tl.int64)[:, None] * k_token + tl.arange(0, D)[None, :]
    k = tl.load(pointers, mask=valid[:, None], other=0.0)
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    return tl.where(valid[None, :], logits, float("-inf"))


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

    low, high = 0, INFINITY_BITS + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum((bits >= middle).to(tl.int32), 0) >= target_count
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    tied = (bits == low).to(tl.int32)
    free = target_count - tl.sum((bits > low).to(tl.int32), 0)
    kept = (bits > low) | ((tied != 0) & (tl.cumsum(tied, 0) <= free))

    mask_row = (item.to(tl.int64) * H + head) * query_blocks + row
    count = tl.sum(kept.to(tl.int32), 0)
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(keep + mask_row * key_blocks + blocks, kept, mask=inside)
    tl.store(counts + mask_row, count)
    tl.store(indices + mask_row * capacity + slots, blocks, mask=kept & (slots < capacity))
    padding = (blocks >= count) & (blocks < capacity)
    tl.store(indices + mask_row * capacity + blocks, tl.zeros((WIDTH,), tl.int32), mask=padding)


@triton.jit
def digit_histogram_kernel(
    bits, histogram, prefix, size,
    SHIFT: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Count the values of one digit, `(bits >> SHIFT) % BINS`, among the bits that begin with a prefix.

    Args:
        bits: (B, size) int32, contiguous; negative ones are not counted.
        histogram: (B, BINS) int32, zeros, to which the counts are added.
        prefix: (B,) int32, the digits above.
    """
    chunk, item = tl.program_id(0), tl.program_id(1)
    places = chunk * CHUNK + tl.arange(0, CHUNK)
    values = tl.load(bits + item.to(tl.int64) * size + places, mask=places < size, other=-1)
    begins = (values >= 0) & ((values >> SHIFT) // BINS == tl.load(prefix + item))
    digits = tl.where(begins, (values >> SHIFT) % BINS, 0)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(digits, BINS)
    counts -= tl.where(bins == 0, CHUNK - tl.sum(begins.to(tl.int32), 0), 0)  # those that do not count fell into 0
    tl.atomic_add(histogram + item * BINS + bins, counts, mask=counts > 0)
