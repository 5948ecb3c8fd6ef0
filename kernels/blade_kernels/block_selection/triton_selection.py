"""The kernels of block selection: importance of sampled tokens, and the choice of a row's blocks without a sort."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(2.0**-126)  # of normal float32 numbers; Triton takes a smaller one for a float64
INFINITY_BITS = tl.constexpr(0x7F800000)  # float32 numbers from 0 to infinity sort as their bits do


@triton.jit
def sampled_importance_kernel(
    q, k, importance,
    query_offsets, key_offsets, key_lengths,
    S, T, H, scale,
    query_blocks, key_blocks,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr, LENGTHS: tl.constexpr, DENOMINATOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Importance of all key blocks for `ROWS` query blocks: two walks over the sampled keys.

    Args:
        importance: (B, H, query blocks, key blocks) float32, contiguous.
        query_offsets: (B, H, QUERIES) int32, sorted; likewise `key_offsets`, (B, H, KEYS).
        BLOCKS: key blocks at a time.
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
    own = tl.load(key_offsets + (item * H + head) * KEYS + sample % KEYS)
    before = tl.load(key_offsets + (item * H + head) * KEYS + sample % KEYS - 1, mask=sample % KEYS > 0, other=0)
    k_base = k + wide_item * k_batch + wide_head * k_head

    peak = tl.full((ROWS * QUERIES,), -3.0e38, tl.float32)
    total = tl.zeros((ROWS * QUERIES,), tl.float32)
    for block in range(0, key_blocks, BLOCKS):
        logits = _sampled_logits(
            q_tile, k_base, k_token, block, own, before, sample, present, key_blocks, scale, D, BK, KEYS, UPCAST
        )
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    divisor = tl.maximum(total, 1.0) if DENOMINATOR else tl.full((ROWS * QUERIES,), 1.0, tl.float32)
    for block in range(0, key_blocks, BLOCKS):
        logits = _sampled_logits(
            q_tile, k_base, k_token, block, own, before, sample, present, key_blocks, scale, D, BK, KEYS, UPCAST
        )
        best = tl.max(logits.reshape(ROWS * QUERIES, BLOCKS, KEYS), 2)
        weights = tl.exp2(best - peak[:, None]) / divisor[:, None]
        largest = tl.max(weights.reshape(ROWS, QUERIES, BLOCKS), 1)
        row, column = first + tl.arange(0, ROWS), block + tl.arange(0, BLOCKS)
        to = ((wide_item * H + wide_head) * query_blocks + row[:, None]) * key_blocks + column[None, :]
        tl.store(importance + to, largest, mask=(row < query_blocks)[:, None] & (column < key_blocks)[None, :])


@triton.jit
def _sampled_logits(
    q, k_base, k_token, block, own, before, sample, present, key_blocks, scale,
    D: tl.constexpr, BK: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 over the samples of some key blocks; -inf for what is no token, or is there twice."""
    blocks = block + sample // KEYS
    held = tl.minimum(tl.maximum(present - blocks * BK, 0), BK)
    within = own * held // BK
    seen = (blocks < key_blocks) & (held > 0) & ((sample % KEYS == 0) | (within != before * held // BK))
    pointers = k_base + (blocks * BK + within).to(tl.int64)[:, None] * k_token + tl.arange(0, D)[None, :]
    k = tl.load(pointers, mask=seen[:, None], other=0.0)
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    return tl.where(seen[None, :], logits, float("-inf"))


@triton.jit
def select_kernel(
    importance, keep, counts, indices,
    forced_keys, forced_queries,
    H, query_blocks, key_blocks, capacity, limit, least, mass,
    importance_batch, importance_head, importance_row, local_radius,
    BQ: tl.constexpr, BK: tl.constexpr, WIDTH: tl.constexpr,
    BY_MASS: tl.constexpr, FORCED_KEYS: tl.constexpr, FORCED_QUERIES: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Choose the key blocks of one row, as `select_blocks` says.

    A threshold is found by bisecting the bits of the numbers; of blocks at the threshold the first ones are kept.

    Args:
        importance: by strides, not negative.
        keep: (B, H, query blocks, key blocks) bool, contiguous; likewise `counts` and `indices`.
        limit: the most blocks that a row keeps, `max_blocks`; likewise `least`, `min_blocks`.
        mass: `cumulative_mass`, where `BY_MASS`.
        WIDTH: the power of two from `key_blocks` on.
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

    wanted = limit
    if BY_MASS:
        target = tl.sum(values, 0) * mass
        low, high = 0, INFINITY_BITS + 1  # the mass of what is at least `low` reaches the target, of `high` not
        for _ in range(31):
            middle = low + (high - low) // 2
            reached = tl.sum(tl.where(bits >= middle, values, 0.0), 0) >= target
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        above = tl.sum((bits > low).to(tl.int32), 0)
        missing = target - tl.sum(tl.where(bits > low, values, 0.0), 0)
        one = tl.max(tl.where(bits == low, values, 0.0), 0)
        at = tl.sum((bits == low).to(tl.int32), 0)
        more = tl.ceil(tl.div_rn(missing, tl.maximum(one, SMALLEST))).to(tl.int32)
        wanted = above + tl.minimum(tl.maximum(more, 1), tl.maximum(at, 1))
        wanted = tl.minimum(tl.maximum(wanted, least), limit)
    wanted = tl.maximum(wanted, tl.sum(forced.to(tl.int32), 0))
    if FORCED_QUERIES:
        wanted = tl.where(tl.load(forced_queries + row) != 0, key_blocks, wanted)

    low, high = 0, INFINITY_BITS + 1
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum((bits >= middle).to(tl.int32), 0) >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    at = (bits == low).to(tl.int32)
    free = wanted - tl.sum((bits > low).to(tl.int32), 0)
    kept = (bits > low) | ((at != 0) & (tl.cumsum(at, 0) <= free))

    place = (item.to(tl.int64) * H + head) * query_blocks + row
    count = tl.sum(kept.to(tl.int32), 0)
    slots = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(keep + place * key_blocks + blocks, kept, mask=inside)
    tl.store(counts + place, count)
    tl.store(indices + place * capacity + slots, blocks, mask=kept & (slots < capacity))
    tl.store(
        indices + place * capacity + blocks, tl.zeros((WIDTH,), tl.int32), mask=(blocks >= count) & (blocks < capacity)
    )
