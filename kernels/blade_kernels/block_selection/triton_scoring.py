"""Kernels of the importance of sampled tokens: the sampled keys gathered, then scored in one pass over the logits."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)  # below every logit; twice of it is finite


@triton.jit
def gather_keys_kernel(
    k, offsets, lengths, gathered, drawn,
    T, H, key_blocks, samples,
    k_batch, k_token, k_head,
    D: tl.constexpr, BK: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
    BY_BLOCK: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Copy `TILE` sampled keys of one head; zeros for duplicates and samples past the end.

    Args:
        k: (B, T, H, D), strided.
        offsets: (B, H, KEYS) int32, sorted; or with `BY_BLOCK` (B, H, key blocks, KEYS), places below the block's
            length, ascending.
        lengths: (B,), number of valid keys, if `LENGTHS`.
        gathered: (B, H, samples, D), contiguous; `samples` is a multiple of `TILE`.
        drawn: (B, H, samples) bool, contiguous, true for distinct keys.
    """
    first, head, item = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    wide = item.to(tl.int64) * H + head
    present = T
    if LENGTHS:
        present = tl.minimum(tl.maximum(tl.load(lengths + item), 0), T).to(tl.int32)
    sample, dims = first + tl.arange(0, TILE), tl.arange(0, D)
    block, place = sample // KEYS, sample % KEYS
    length = tl.minimum(tl.maximum(present - block * BK, 0), BK)
    inside = block < key_blocks
    offsets += wide * KEYS * (key_blocks if BY_BLOCK else 1)
    at = sample if BY_BLOCK else place
    within = tl.load(offsets + at, mask=inside, other=0)
    previous = tl.load(offsets + at - 1, mask=inside & (place > 0), other=0)
    if not BY_BLOCK:
        within = within * length // BK
        previous = previous * length // BK
    valid = inside & (length > 0) & ((place == 0) | (within != previous))
    pointers = k + item.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
    pointers += (block * BK + within).to(tl.int64)[:, None] * k_token
    rows = tl.load(pointers + dims[None, :], mask=valid[:, None], other=0.0)
    to = wide * samples + sample
    tl.store(gathered + to[:, None] * D + dims[None, :], rows)
    tl.store(drawn + to, valid)


@triton.jit
def sampled_importance_kernel(
    q, gathered, drawn, query_offsets, lengths, statistics, importance,
    S, T, H, scale, first_head,
    query_blocks, key_blocks, padded_blocks,
    q_batch, q_token, q_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr,
    BLOCKS: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, LENGTHS: tl.constexpr,
    DENOMINATOR: tl.constexpr, STATISTIC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the importance of all key blocks for `ROWS` query blocks, in one pass over the sampled keys.

    The pass writes a statistic of each sampled query and key block as a logarithm, which does not depend on the
    largest logit and the sum of the weights, as these are known at its end; then the program reads its own back.

    Args:
        q: (B, S, H, D), strided.
        gathered: of `gather_keys_kernel`; likewise `drawn`.
        query_offsets: (B, H, QUERIES) int32, sorted.
        statistics: (B, heads of this launch, row tiles, ROWS * QUERIES, padded blocks) float32, contiguous.
        importance: (B, H, query blocks, key blocks) float32, contiguous.
        first_head: head of the first program.
        padded_blocks: `key_blocks` rounded up to a multiple of `BLOCKS`, the key blocks in a tile.
        COLUMNS: key blocks that are read back at a time.
        STATISTIC: "max", "mean", "rms" or "residual".
    """
    first, item = tl.program_id(0) * ROWS, tl.program_id(2)
    head = first_head + tl.program_id(1)
    wide_item, wide = item.to(tl.int64), item.to(tl.int64) * H + head
    present = T
    if LENGTHS:
        present = tl.minimum(tl.maximum(tl.load(lengths + item), 0), T).to(tl.int32)
    dims = tl.arange(0, D)
    probe = tl.arange(0, ROWS * QUERIES)
    rows = first + probe // QUERIES
    offset = tl.load(query_offsets + wide * QUERIES + probe % QUERIES)
    positions = rows * BQ + offset * tl.minimum(tl.maximum(S - rows * BQ, 0), BQ) // BQ
    base = q + wide_item * q_batch + head.to(tl.int64) * q_head
    q_tile = tl.load(
        base + positions.to(tl.int64)[:, None] * q_token + dims[None, :],
        mask=(rows < query_blocks)[:, None],
        other=0.0,
    )
    program = (wide_item * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    statistics += program * (ROWS * QUERIES) * padded_blocks
    gathered += wide * padded_blocks * KEYS * D
    drawn += wide * padded_blocks * KEYS

    peak = tl.full((ROWS * QUERIES,), LOWEST, tl.float32)
    total = tl.zeros((ROWS * QUERIES,), tl.float32)
    whole = present // BK // BLOCKS * BLOCKS  # key blocks in tiles without an absent key
    for block in range(0, whole, BLOCKS):
        peak, total = _score_tile(
            q_tile, gathered, drawn, statistics, block, padded_blocks, peak, total, scale,
            D, ROWS, QUERIES, BLOCKS, KEYS, STATISTIC, UPCAST, False,
        )  # fmt: skip
    for block in range(whole, padded_blocks, BLOCKS):
        peak, total = _score_tile(
            q_tile, gathered, drawn, statistics, block, padded_blocks, peak, total, scale,
            D, ROWS, QUERIES, BLOCKS, KEYS, STATISTIC, UPCAST, True,
        )  # fmt: skip
    tl.debug_barrier()  # the program's threads read what others of them wrote
    base = peak + tl.log2(tl.maximum(total, 1.0)) if DENOMINATOR else peak
    row = first + tl.arange(0, ROWS)
    for block in range(0, key_blocks, COLUMNS):
        column = block + tl.arange(0, COLUMNS)
        inside = column < key_blocks
        of_query = tl.load(
            statistics + probe[:, None] * padded_blocks + column[None, :], mask=inside[None, :], other=float("-inf")
        )
        if STATISTIC == "max":
            score = tl.max(tl.exp2(of_query - base[:, None]).reshape(ROWS, QUERIES, COLUMNS), 1)
        elif STATISTIC == "mean":
            score = tl.sum(tl.exp2(of_query - base[:, None]).reshape(ROWS, QUERIES, COLUMNS), 1) / QUERIES
        else:
            squares = tl.exp2(of_query - 2.0 * base[:, None]).reshape(ROWS, QUERIES, COLUMNS)
            score = tl.sqrt(tl.sum(squares, 1) / QUERIES)
        to = (wide * query_blocks + row[:, None]) * key_blocks + column[None, :]
        tl.store(importance + to, score, mask=(row < query_blocks)[:, None] & inside[None, :])


@triton.jit
def _score_tile(
    q, gathered, drawn, statistics, block, padded_blocks, peak, total, scale,
    D: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, KEYS: tl.constexpr,
    STATISTIC: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the statistics of a tile of key blocks; return the largest logits so far and the sums of weights."""
    sample = block * KEYS + tl.arange(0, BLOCKS * KEYS)
    k = tl.load(gathered + sample.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :])
    if UPCAST:
        q, k = q.to(tl.float32), k.to(tl.float32)
    logits = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
    masked = logits
    if MASKED:
        is_drawn = tl.load(drawn + sample) != 0
        masked = tl.where(is_drawn[None, :], logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(masked, 1))
    weights = tl.exp2(masked - higher[:, None])
    total = total * tl.exp2(peak - higher) + tl.sum(weights, 1)
    by_block = weights.reshape(ROWS * QUERIES, BLOCKS, KEYS)
    if STATISTIC == "max":
        found = tl.max(masked.reshape(ROWS * QUERIES, BLOCKS, KEYS), 2)
    elif STATISTIC == "mean":
        found = tl.log2(tl.sum(by_block, 2)) + higher[:, None]
    elif STATISTIC == "rms":
        found = 2.0 * (tl.log2(tl.sum(by_block, 2)) + higher[:, None])
    else:
        # the logits of absent keys, which are zeros, are 0
        mean = tl.sum(logits.reshape(ROWS * QUERIES, BLOCKS, KEYS), 2)
        if MASKED:
            counts = tl.sum(is_drawn.to(tl.float32).reshape(BLOCKS, KEYS), 1)
            mean = tl.where(counts[None, :] > 0.0, mean / tl.maximum(counts, 1.0)[None, :], float("-inf"))
        else:
            mean = mean * (1.0 / KEYS)
        difference = by_block - tl.exp2(mean - higher[:, None])[:, :, None]
        if MASKED:
            difference = tl.where(is_drawn.reshape(1, BLOCKS, KEYS), difference, 0.0)
        found = tl.log2(tl.sum(difference * difference, 2)) + 2.0 * higher[:, None]
    row, column = tl.arange(0, ROWS * QUERIES), block + tl.arange(0, BLOCKS)
    tl.store(statistics + row[:, None] * padded_blocks + column[None, :], found)
    return higher, total
