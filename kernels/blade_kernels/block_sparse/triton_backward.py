"""Backward kernels of block-sparse attention.

With a = e^(s - lse) as in `cpu`, delta = dout . out - dlse and ds = a (dout . v - delta):

- `delta_kernel` computes delta and the base-2 log-sum-exp, once for every query;
- `query_gradient_kernel` iterates, like the forward kernel, over the keys of a row: dq = scale sum ds k;
- `key_gradient_kernel` iterates over the query blocks that keep a key block: dk = scale sum ds q, dv = sum a dout;
- `pooled_gradient_kernel` iterates over a share of all queries, for a tile of pooled tokens.

No sums are accumulated across programs, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from blade_kernels.block_sparse.triton_tiles import (
    LOG2E,
    kept_blocks,
    key_stop,
    load_tile,
    multiply,
    multiply_add,
    tile_position,
    window_bias,
)


@triton.jit
def delta_kernel(
    out, grad_out, lse, grad_lse, lse2, delta,
    S, H,
    out_batch, out_token, out_head,
    grad_batch, grad_token, grad_head,
    lse_batch, lse_token, lse_head,
    grad_lse_batch, grad_lse_token, grad_lse_head,
    D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Compute delta = dout . out - dlse and the base-2 log-sum-exp (inf for a query without keys): (B, H, S)."""
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = tile * BLOCK_M
    queries = start + tl.arange(0, BLOCK_M).to(tl.int64)
    inside = queries < S
    wide_head, wide_item = head.to(tl.int64), item.to(tl.int64)
    out_tile = load_tile(out, item, head, start, S, out_batch, out_token, out_head, BLOCK_M, D, False, False)
    grad = load_tile(grad_out, item, head, start, S, grad_batch, grad_token, grad_head, BLOCK_M, D, False, False)
    sums = tl.load(lse + wide_item * lse_batch + wide_head * lse_head + queries * lse_token, mask=inside, other=0.0)
    grad_sums = tl.load(
        grad_lse + wide_item * grad_lse_batch + wide_head * grad_lse_head + queries * grad_lse_token,
        mask=inside, other=0.0,
    )  # fmt: skip
    to = (wide_item * H + wide_head) * S + queries
    tl.store(delta + to, tl.sum(out_tile.to(tl.float32) * grad.to(tl.float32), 1) - grad_sums, mask=inside)
    # exp2(logit - inf) is 0: a query without keys contributes no gradient
    tl.store(lse2 + to, tl.where(sums == float("-inf"), float("inf"), sums * LOG2E), mask=inside)


@triton.jit
def add_query_gradient(
    q, grad_out, k, v, bias, lse2, delta, grad_q, factor, BIASED: tl.constexpr, UPCAST: tl.constexpr
):
    """Add a tile of keys' contribution to the unscaled dq of a tile, (M, D)."""
    logits = multiply(q, tl.trans(k), UPCAST) * factor
    if BIASED:
        logits += bias[None, :]
    a = tl.exp2(logits - lse2[:, None])
    ds = a * (multiply(grad_out, tl.trans(v), UPCAST) - delta[:, None])
    if BIASED:  # hidden keys may hold anything, NaN included
        ds = tl.where(bias[None, :] == float("-inf"), 0.0, ds)
    return multiply_add(ds.to(k.dtype), k, grad_q, UPCAST)


@triton.jit
def query_gradient_kernel(
    q, k, v, grad_out, lse2, delta, grad_q,
    counts, indices, keep, order, key_lengths,
    pooled_k, pooled_v, pooled_bias, pooled_block,
    S, T, P, H, scale,
    query_blocks, key_blocks, capacity,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    grad_batch, grad_token, grad_head,
    pooled_k_batch, pooled_k_token, pooled_k_head,
    pooled_v_batch, pooled_v_token, pooled_v_head,
    mask_batch, mask_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr, DROPPED: tl.constexpr, LENGTHS: tl.constexpr, TAIL: tl.constexpr, ORDERED: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute dq of one tile of queries. For the other arguments see `forward_kernel`.

    Args:
        grad_out: (B, S, H, D), strided.
        lse2: (B, H, S) float32, from `delta_kernel`; likewise `delta`.
        grad_q: (B, S, H, D), contiguous.
    """
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = scale * LOG2E
    first_row = item.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    row, start = tile_position(order + first_row, tile, BQ, BLOCK_M, ORDERED)
    mask_row = first_row + row
    queries = start + tl.arange(0, BLOCK_M).to(tl.int64)
    inside = queries < S
    q_tile = load_tile(q, item, head, start, S, q_batch, q_token, q_head, BLOCK_M, D, False, False)
    grad_tile = load_tile(grad_out, item, head, start, S, grad_batch, grad_token, grad_head, BLOCK_M, D, False, False)
    sums = (item.to(tl.int64) * H + head) * S + queries
    lse_tile = tl.load(lse2 + sums, mask=inside, other=float("inf"))
    delta_tile = tl.load(delta + sums, mask=inside, other=0.0)
    kept = indices + mask_row * capacity
    stop = key_stop(key_lengths, item, T, LENGTHS)
    whole, count = kept_blocks(kept, tl.load(counts + mask_row), stop, key_blocks, BK, LENGTHS, TAIL)

    grad_q_tile = tl.zeros((BLOCK_M, D), tl.float32)
    PARTS: tl.constexpr = BK // BLOCK_N
    ZEROED: tl.constexpr = TMA and not LENGTHS  # descriptors return zeros past the end of the sequence
    for step in range(0, whole * PARTS):
        key = tl.load(kept + step // PARTS) * BK + (step % PARTS) * BLOCK_N
        k_tile = load_tile(k, item, head, key, T, k_batch, k_token, k_head, BLOCK_N, D, TMA, True)
        v_tile = load_tile(v, item, head, key, T, v_batch, v_token, v_head, BLOCK_N, D, TMA, True)
        grad_q_tile = add_query_gradient(
            q_tile, grad_tile, k_tile, v_tile, 0.0, lse_tile, delta_tile, grad_q_tile, factor, False, UPCAST
        )
    if LENGTHS or TAIL:
        for step in range(whole * PARTS, count * PARTS):
            key = tl.load(kept + step // PARTS) * BK + (step % PARTS) * BLOCK_N
            k_tile = load_tile(k, item, head, key, stop, k_batch, k_token, k_head, BLOCK_N, D, TMA, ZEROED)
            v_tile = load_tile(v, item, head, key, stop, v_batch, v_token, v_head, BLOCK_N, D, TMA, TMA)
            bias = tl.where(key + tl.arange(0, BLOCK_N) < stop, 0.0, float("-inf"))
            grad_q_tile = add_query_gradient(
                q_tile, grad_tile, k_tile, v_tile, bias, lse_tile, delta_tile, grad_q_tile, factor, True, UPCAST
            )
    if POOLED:
        POOL_N: tl.constexpr = BLOCK_N if BLOCK_N < 32 else 32
        for window in range(0, P, POOL_N):
            bias = window_bias(pooled_bias, pooled_block, keep + mask_row * key_blocks, window, P, POOL_N, DROPPED)
            k_tile = load_tile(
                pooled_k,
                item,
                head,
                window,
                P,
                pooled_k_batch,
                pooled_k_token,
                pooled_k_head,
                POOL_N,
                D,
                False,
                False,
            )
            v_tile = load_tile(
                pooled_v,
                item,
                head,
                window,
                P,
                pooled_v_batch,
                pooled_v_token,
                pooled_v_head,
                POOL_N,
                D,
                False,
                False,
            )
            grad_q_tile = add_query_gradient(
                q_tile, grad_tile, k_tile, v_tile, bias, lse_tile, delta_tile, grad_q_tile, factor, True, UPCAST
            )
    to = grad_q + ((item.to(tl.int64) * S + queries[:, None]) * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(to, (grad_q_tile * scale).to(grad_q.dtype.element_ty), mask=inside[:, None])


@triton.jit
def add_key_gradients(
    k, v, q, grad_out, bias, lse2, delta, grad_k, grad_v, factor, BIASED: tl.constexpr, UPCAST: tl.constexpr
):
    """Add a tile of queries' contribution to the unscaled dk and to dv of a tile, (N, D).

    Args:
        bias: (N, 1) or (N, M), added to the base-2 logits, if `BIASED`.
        lse2: (M,), inf past the last query; likewise `delta`, 0 there.
    """
    logits = multiply(k, tl.trans(q), UPCAST) * factor
    if BIASED:
        logits += bias
    a = tl.exp2(logits - lse2[None, :])
    grad_v = multiply_add(a.to(grad_out.dtype), grad_out, grad_v, UPCAST)
    ds = a * (multiply(v, tl.trans(grad_out), UPCAST) - delta[None, :])
    grad_k = multiply_add(ds.to(q.dtype), q, grad_k, UPCAST)
    return grad_k, grad_v


@triton.jit
def key_gradient_kernel(
    q, k, v, grad_out, lse2, delta, grad_k, grad_v,
    starts, rows, key_lengths,
    S, T, H, scale,
    key_blocks, kept_pairs,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    grad_batch, grad_token, grad_head,
    mask_batch, mask_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv of one tile of keys.

    Args:
        q: pointer or, with `TMA`, descriptor; likewise `grad_out`.
        grad_k: (B, T, H, D), contiguous; likewise `grad_v`.
        starts: (masks, key blocks + 1) int32, start of each key block's query blocks in `rows`.
        rows: (masks, kept pairs) int32, query blocks.
        kept_pairs: entries of `rows` per mask.
        mask_batch: masks between batch items, 0 if the mask is shared; likewise `mask_head`.
    """
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = scale * LOG2E
    TILES: tl.constexpr = BK // BLOCK_N
    block = tile // TILES
    start = block * BK + (tile % TILES) * BLOCK_N
    keys = start + tl.arange(0, BLOCK_N).to(tl.int64)
    stop = key_stop(key_lengths, item, T, LENGTHS)
    k_tile = load_tile(k, item, head, start, stop, k_batch, k_token, k_head, BLOCK_N, D, False, False)
    v_tile = load_tile(v, item, head, start, stop, v_batch, v_token, v_head, BLOCK_N, D, False, False)
    mask = item.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    first = tl.load(starts + mask * (key_blocks + 1) + block)
    end = tl.load(starts + mask * (key_blocks + 1) + block + 1)
    query_rows = rows + mask * kept_pairs
    sums = (item.to(tl.int64) * H + head) * S

    grad_k_tile = tl.zeros((BLOCK_N, D), tl.float32)
    grad_v_tile = tl.zeros((BLOCK_N, D), tl.float32)
    PARTS: tl.constexpr = BQ // BLOCK_M
    for step in range(first * PARTS, end * PARTS):
        query = tl.load(query_rows + step // PARTS) * BQ + (step % PARTS) * BLOCK_M
        q_tile = load_tile(q, item, head, query, S, q_batch, q_token, q_head, BLOCK_M, D, TMA, TMA)
        grad_tile = load_tile(grad_out, item, head, query, S, grad_batch, grad_token, grad_head, BLOCK_M, D, TMA, TMA)
        queries = query + tl.arange(0, BLOCK_M)
        lse_tile = tl.load(lse2 + sums + queries, mask=queries < S, other=float("inf"))
        delta_tile = tl.load(delta + sums + queries, mask=queries < S, other=0.0)
        grad_k_tile, grad_v_tile = add_key_gradients(
            k_tile, v_tile, q_tile, grad_tile, 0.0, lse_tile, delta_tile,
            grad_k_tile, grad_v_tile, factor, False, UPCAST,
        )  # fmt: skip
    # an invalid key was loaded as zero, and no query sees it
    valid = (keys < stop)[:, None]
    to = ((item.to(tl.int64) * T + keys[:, None]) * H + head) * D + tl.arange(0, D)[None, :]
    inside = (keys < T)[:, None]
    tl.store(grad_k + to, tl.where(valid, grad_k_tile * scale, 0.0).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + to, tl.where(valid, grad_v_tile, 0.0).to(grad_v.dtype.element_ty), mask=inside)


@triton.jit
def pooled_gradient_kernel(
    q, grad_out, lse2, delta, grad_k, grad_v,
    keep, pooled_k, pooled_v, pooled_bias, pooled_block,
    S, P, H, B, scale,
    query_blocks, key_blocks, rows_per_share,
    q_batch, q_token, q_head,
    grad_batch, grad_token, grad_head,
    pooled_k_batch, pooled_k_token, pooled_k_head,
    pooled_v_batch, pooled_v_token, pooled_v_head,
    mask_batch, mask_head,
    D: tl.constexpr, BQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DROPPED: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute the contribution of a share of the queries to dk and dv of one tile of pooled tokens.

    Args:
        q: pointer or, with `TMA`, descriptor; likewise `grad_out`.
        grad_k: (shares, B, P, H, D) float32, contiguous; likewise `grad_v`.
        rows_per_share: query blocks in a share.
    """
    tile, share = tl.program_id(0), tl.program_id(1)
    head, item = tl.program_id(2) % H, tl.program_id(2) // H
    start = tile * BLOCK_N
    windows = start + tl.arange(0, BLOCK_N)
    valid = windows < P
    k_tile = load_tile(
        pooled_k, item, head, start, P, pooled_k_batch, pooled_k_token, pooled_k_head, BLOCK_N, D, False, False
    )
    v_tile = load_tile(
        pooled_v, item, head, start, P, pooled_v_batch, pooled_v_token, pooled_v_head, BLOCK_N, D, False, False
    )
    bias = tl.where(valid, tl.load(pooled_bias + windows, mask=valid, other=0.0), float("-inf"))
    block = windows
    if DROPPED:
        block = tl.load(pooled_block + windows, mask=valid, other=0)
    factor = scale * LOG2E
    first_row = item.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    sums = (item.to(tl.int64) * H + head) * S

    grad_k_tile = tl.zeros((BLOCK_N, D), tl.float32)
    grad_v_tile = tl.zeros((BLOCK_N, D), tl.float32)
    PARTS: tl.constexpr = BQ // BLOCK_M
    for step in range(share * rows_per_share * PARTS, tl.minimum((share + 1) * rows_per_share, query_blocks) * PARTS):
        row = step // PARTS
        query = step * BLOCK_M
        q_tile = load_tile(q, item, head, query, S, q_batch, q_token, q_head, BLOCK_M, D, TMA, TMA)
        grad_tile = load_tile(grad_out, item, head, query, S, grad_batch, grad_token, grad_head, BLOCK_M, D, TMA, TMA)
        queries = query + tl.arange(0, BLOCK_M)
        lse_tile = tl.load(lse2 + sums + queries, mask=queries < S, other=float("inf"))
        delta_tile = tl.load(delta + sums + queries, mask=queries < S, other=0.0)
        row_bias = bias
        if DROPPED:
            kept = tl.load(keep + (first_row + row) * key_blocks + block, mask=valid, other=1)
            row_bias = tl.where(kept == 0, bias, float("-inf"))
        grad_k_tile, grad_v_tile = add_key_gradients(
            k_tile, v_tile, q_tile, grad_tile, row_bias[:, None], lse_tile, delta_tile,
            grad_k_tile, grad_v_tile, factor, True, UPCAST,
        )  # fmt: skip
    to = (((share.to(tl.int64) * B + item) * P + windows[:, None]) * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(grad_k + to, grad_k_tile * scale, mask=valid[:, None])
    tl.store(grad_v + to, grad_v_tile, mask=valid[:, None])


@triton.jit
def transpose_kernel(
    keep, starts, rows,
    query_blocks, key_blocks, kept_pairs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the query blocks that keep each of `BLOCK_N` key blocks, in ascending order, into `rows`."""
    mask = tl.program_id(1).to(tl.int64)
    blocks = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = blocks < key_blocks
    next_slot = tl.load(starts + mask * (key_blocks + 1) + blocks, mask=inside, other=0)
    for first in range(0, query_blocks, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        valid = (queries < query_blocks)[:, None] & inside[None, :]
        pointers = keep + (mask * query_blocks + queries[:, None]) * key_blocks + blocks[None, :]
        kept = tl.load(pointers, mask=valid, other=0).to(tl.int32)
        slots = next_slot[None, :] + tl.cumsum(kept, 0) - kept
        values = tl.broadcast_to(queries[:, None], (BLOCK_M, BLOCK_N))
        tl.store(rows + mask * kept_pairs + slots, values, mask=(kept != 0) & (slots < kept_pairs))
        next_slot += tl.sum(kept, 0)
