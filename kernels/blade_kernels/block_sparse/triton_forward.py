"""Forward kernel of block-sparse attention: kept blocks, then pooled tokens, in one online softmax.

One program computes one tile of queries of one head, and iterates over the list of key blocks that its row keeps. The
mathematics is that of `naive`, with base-2 logits and sums in float32; in 8 bits that of `quantized`.
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
    nearest_float8,
    tile_position,
    window_bias,
)

LARGEST_FLOAT8 = tl.constexpr(448.0)
LOWEST = tl.constexpr(-3.0e38)  # initial running maximum: finite, so that -inf - LOWEST stays -inf


@triton.jit
def add_keys(
    q, k, v, bias, peak, total, out, factor, BIASED: tl.constexpr, FLOAT8: tl.constexpr, UPCAST: tl.constexpr
):
    """Add a tile of keys to the online softmax.

    Args:
        q: (M, D) queries.
        k: (N, D) keys; likewise `v`.
        bias: (N,), added to the base-2 logits, if `BIASED`; -inf hides a key.
        peak: (M,), largest logit so far.
        total: (M,), sum of weights relative to `peak`.
        out: (M, D), sum of weighted values relative to `peak`.
        factor: scale of the logits.
        FLOAT8: whether weights are 8-bit floats times 448, as the values are. They are summed after they are rounded,
            so that a key that outweighs all others keeps its value. `peak` is a whole number, so that what was rounded
            relative to a lower one is still rounded relative to a higher one.

    Returns:
        peak, total, out.
    """
    logits = multiply(q, tl.trans(k), UPCAST)
    if BIASED:
        # the logit of a hidden key may be anything, NaN included
        logits = tl.where(bias[None, :] == float("-inf"), float("-inf"), logits * factor + bias[None, :])
        highest = tl.max(logits, 1)
    else:
        highest = tl.max(logits, 1) * factor
    if FLOAT8:
        highest = tl.ceil(highest)
    higher = tl.maximum(peak, highest)
    weights = tl.exp2(logits - higher[:, None]) if BIASED else tl.exp2(logits * factor - higher[:, None])
    rescale = tl.exp2(peak - higher)
    if FLOAT8:
        weights = weights * LARGEST_FLOAT8
        if UPCAST:
            weights = nearest_float8(weights)
            rounded = weights
        else:
            weights = weights.to(v.dtype)
            rounded = weights.to(tl.float32)
        total = total * rescale + tl.sum(rounded, 1) / LARGEST_FLOAT8
    else:
        total = total * rescale + tl.sum(weights, 1)
        weights = weights.to(v.dtype)
    out = multiply_add(weights, v, out * rescale[:, None], UPCAST)
    return higher, total, out


@triton.jit
def result_rows(item, head, start, S, H, BLOCK_M: tl.constexpr):
    """Return the places of a tile of queries in a contiguous (B, S, H) tensor, and which of them exist."""
    queries = start + tl.arange(0, BLOCK_M).to(tl.int64)
    return (item.to(tl.int64) * S + queries) * H + head, queries < S


@triton.jit
def forward_kernel(
    q, k, v, out, lse,
    counts, indices, keep, order, key_lengths,
    pooled_k, pooled_v, pooled_bias, pooled_block,
    exact_q, q_scale, k_scale, v_scale, mean,
    S, T, P, H, scale,
    query_blocks, key_blocks, capacity,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    v_batch, v_token, v_head,
    pooled_k_batch, pooled_k_token, pooled_k_head,
    pooled_v_batch, pooled_v_token, pooled_v_head,
    exact_q_batch, exact_q_token, exact_q_head,
    mask_batch, mask_head,
    D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    POOLED: tl.constexpr, DROPPED: tl.constexpr, LENGTHS: tl.constexpr, TAIL: tl.constexpr, ORDERED: tl.constexpr,
    QUANTIZED: tl.constexpr, FLOAT8: tl.constexpr, RESUMED: tl.constexpr,
    TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute attention of one tile of queries. Tensors are strided unless stated otherwise.

    With `RESUMED` the kept blocks are done: `out` and `lse` hold their result, which the pooled tokens are added to.

    Args:
        k: pointer or, with `TMA`, descriptor; likewise `v`.
        out: (B, S, H, D), contiguous.
        lse: (B, S, H) float32, natural logarithm, contiguous.
        order: (.., query blocks) int32, rows of the mask, longest first, if `ORDERED`.
        pooled_bias: (P,) float32, in base 2.
        pooled_block: (P,) int32, the key block of each pooled token, if `DROPPED`.
        exact_q: the queries, if `QUANTIZED`; `q` and `k` are then 8-bit integers, keys and pooled ones without `mean`.
        q_scale: (B, H, query blocks) float32, contiguous, by which integers are multiplied; likewise `k_scale`.
        v_scale: (B, H, D) float32, contiguous, by which 8-bit values are multiplied, if `FLOAT8`.
        mean: (B, H, D) float32, contiguous.
        S: number of queries; likewise T keys, P pooled tokens and H heads.
        scale: factor of the logits.
        mask_batch: mask rows between batch items, 0 if the mask is shared; likewise `mask_head`.
        D: size of a head.
        BQ: tokens in a query block; likewise BK, in a key block.
        BLOCK_M: queries in a tile, which divides BQ; likewise BLOCK_N, keys in a tile.
        TAIL: whether the last key block is partial.
    """
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    factor = scale * LOG2E
    first_row = item.to(tl.int64) * mask_batch + head.to(tl.int64) * mask_head
    row, start = tile_position(order + first_row, tile, BQ, BLOCK_M, ORDERED)
    mask_row = first_row + row
    q_tile = load_tile(q, item, head, start, S, q_batch, q_token, q_head, BLOCK_M, D, False, False)
    pooled_factor = factor
    if QUANTIZED:
        q_step = tl.load(q_scale + (item.to(tl.int64) * H + head) * query_blocks + row)
        k_steps = k_scale + (item.to(tl.int64) * H + head) * key_blocks
        factor = factor * q_step
    kept = indices + mask_row * capacity
    stop = key_stop(key_lengths, item, T, LENGTHS)

    if RESUMED:
        whole = 0
        count = 0
        rows, inside = result_rows(item, head, start, S, H, BLOCK_M)
        sums = tl.load(lse + rows, mask=inside, other=float("-inf"))
        peak = tl.where(sums == float("-inf"), LOWEST, sums * LOG2E)
        total = tl.where(sums == float("-inf"), 0.0, 1.0)
        pointers = out + rows[:, None] * D + tl.arange(0, D)[None, :]
        out_tile = tl.load(pointers, mask=inside[:, None], other=0.0).to(tl.float32)
    else:
        whole, count = kept_blocks(kept, tl.load(counts + mask_row), stop, key_blocks, BK, LENGTHS, TAIL)
        peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        out_tile = tl.zeros((BLOCK_M, D), tl.float32)
    PARTS: tl.constexpr = BK // BLOCK_N
    ZEROED: tl.constexpr = TMA and not LENGTHS  # descriptors return zeros past the end of the sequence
    for step in range(0, whole * PARTS):
        block = tl.load(kept + step // PARTS)
        key = block * BK + (step % PARTS) * BLOCK_N
        k_tile = load_tile(k, item, head, key, T, k_batch, k_token, k_head, BLOCK_N, D, TMA, True)
        v_tile = load_tile(v, item, head, key, T, v_batch, v_token, v_head, BLOCK_N, D, TMA, True)
        tile_factor = factor * tl.load(k_steps + block) if QUANTIZED else factor
        peak, total, out_tile = add_keys(
            q_tile, k_tile, v_tile, 0.0, peak, total, out_tile, tile_factor, False, FLOAT8, UPCAST
        )
    if (LENGTHS or TAIL) and not RESUMED:
        for step in range(whole * PARTS, count * PARTS):
            block = tl.load(kept + step // PARTS)
            key = block * BK + (step % PARTS) * BLOCK_N
            k_tile = load_tile(k, item, head, key, stop, k_batch, k_token, k_head, BLOCK_N, D, TMA, TMA)
            v_tile = load_tile(v, item, head, key, stop, v_batch, v_token, v_head, BLOCK_N, D, TMA, ZEROED)
            bias = tl.where(key + tl.arange(0, BLOCK_N) < stop, 0.0, float("-inf"))
            tile_factor = factor * tl.load(k_steps + block) if QUANTIZED else factor
            peak, total, out_tile = add_keys(
                q_tile, k_tile, v_tile, bias, peak, total, out_tile, tile_factor, True, FLOAT8, UPCAST
            )
    if FLOAT8:
        steps = tl.load(v_scale + (item.to(tl.int64) * H + head) * D + tl.arange(0, D))
        out_tile = out_tile * (steps / LARGEST_FLOAT8)[None, :]
    if POOLED:
        pooled_q = (q_tile.to(tl.float32) * q_step).to(pooled_k.dtype.element_ty) if QUANTIZED else q_tile
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
            peak, total, out_tile = add_keys(
                pooled_q, k_tile, v_tile, bias, peak, total, out_tile, pooled_factor, True, False, UPCAST
            )

    divisor = tl.where(total == 0.0, 1.0, total)  # 0: a query without keys
    rows, inside = result_rows(item, head, start, S, H, BLOCK_M)
    pointers = out + rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(pointers, (out_tile / divisor[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    if QUANTIZED:  # what all logits of a query lack
        exact = load_tile(
            exact_q, item, head, start, S, exact_q_batch, exact_q_token, exact_q_head, BLOCK_M, D, False, False
        )
        common = tl.load(mean + (item.to(tl.int64) * H + head) * D + tl.arange(0, D))
        peak += tl.sum(exact.to(tl.float32) * common[None, :], 1) * pooled_factor
    sums = tl.where(total == 0.0, float("-inf"), (peak + tl.log2(divisor)) / LOG2E)
    tl.store(lse + rows, sums, mask=inside)
