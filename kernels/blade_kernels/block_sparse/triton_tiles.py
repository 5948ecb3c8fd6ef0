"""Shared parts of the block-sparse attention kernels: loads of tiles, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # logits are in base 2, as the hardware computes exp2


@triton.jit
def load_tile(
    x, item, head, start, stop, batch_stride, token_stride, head_stride,
    TOKENS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load the (TOKENS, D) tile of one head that begins at token `start`, with zeros from token `stop` on.

    Args:
        x: a pointer or, with `TMA`, a descriptor of (B, H, S, D) in blocks of (1, 1, TOKENS, D).
        item: index in the batch; likewise `head`.
        start: first token.
        stop: token after the last valid one; ignored if `WHOLE`.
        batch_stride: distance between batch items; likewise the other strides.
    """
    if TMA:
        tile = x.load([item, head, start, 0]).reshape(TOKENS, D)
        if not WHOLE:  # values past `stop` may be anything, NaN included
            tile = tl.where((start + tl.arange(0, TOKENS) < stop)[:, None], tile, 0.0)
    else:
        tokens = start + tl.arange(0, TOKENS).to(tl.int64)
        base = x + item.to(tl.int64) * batch_stride + head.to(tl.int64) * head_stride
        pointers = base + tokens[:, None] * token_stride + tl.arange(0, D)[None, :]
        if WHOLE:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(tokens < stop)[:, None], other=0.0)
    return tile


@triton.jit
def count_below(kept, count, block):
    """Count the blocks below `block` among the first `count` of a list."""
    below = count * 0
    for first in range(0, count, 128):
        slots = first + tl.arange(0, 128)
        below += tl.sum((tl.load(kept + slots, mask=slots < count, other=block) < block).to(tl.int32), 0)
    return below


@triton.jit
def nearest_float8(x):
    """Round float32 to the nearest 8-bit floats of 4 bits of exponent, to even ones in the middle, still in float32.

    For the interpreter, whose conversion loses what is carried into the exponent.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    steps = x * 512.0  # below 2^-6 they are whole multiples of 2^-9
    lower = tl.floor(steps)
    rest = steps - lower
    odd = lower - 2.0 * tl.floor(lower / 2.0)
    nearest = tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), lower + 1.0, lower)
    return tl.where(tl.abs(x) < 0.015625, nearest / 512.0, normal)


@triton.jit
def multiply(a, b, UPCAST: tl.constexpr):
    """Multiply matrices, with sums in float32; those of 8-bit integers are exact.

    `UPCAST` is for the interpreter, which cannot multiply bfloat16, and multiplies in float32.
    """
    if a.dtype == tl.int8:
        product = tl.dot(a, b, out_dtype=tl.int32).to(tl.float32)
    elif UPCAST:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def multiply_add(a, b, total, UPCAST: tl.constexpr):
    """Add a matrix product to `total`; see `multiply`."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tile_position(order, tile, BQ: tl.constexpr, BLOCK_M: tl.constexpr, ORDERED: tl.constexpr):
    """Return the mask row and the first query of a tile of queries. `order` holds the rows' order, if `ORDERED`."""
    TILES: tl.constexpr = BQ // BLOCK_M
    row = tile // TILES
    if ORDERED:
        row = tl.load(order + row)
    return row, row * BQ + (tile % TILES) * BLOCK_M


@triton.jit
def key_stop(key_lengths, item, T, LENGTHS: tl.constexpr):
    """Return the number of valid keys of a batch item: T or, with `LENGTHS`, its own."""
    stop = T
    if LENGTHS:
        stop = tl.minimum(tl.maximum(tl.load(key_lengths + item), 0), T).to(tl.int32)
    return stop


@triton.jit
def kept_blocks(kept, count, stop, key_blocks, BK: tl.constexpr, LENGTHS: tl.constexpr, TAIL: tl.constexpr):
    """Count the full and the non-empty ones among a row's `count` blocks: both come first, as lists are ascending.

    Args:
        kept: the row's list.
        stop: from `key_stop`.
        TAIL: whether the last key block is partial.
    """
    whole = count
    if LENGTHS:
        count = count_below(kept, count, (stop + BK - 1) // BK)
        whole = count_below(kept, count, stop // BK)
    elif TAIL:
        last = tl.load(kept + tl.maximum(count - 1, 0))
        whole = count - ((count > 0) & (last == key_blocks - 1)).to(tl.int32)
    return whole, count


@triton.jit
def window_bias(pooled_bias, pooled_block, keep_row, window, P, BLOCK_N: tl.constexpr, DROPPED: tl.constexpr):
    """Return the bias of `BLOCK_N` pooled tokens: -inf past the end and, with `DROPPED`, for blocks the row keeps."""
    windows = window + tl.arange(0, BLOCK_N)
    visible = windows < P
    bias = tl.load(pooled_bias + windows, mask=visible, other=0.0)
    if DROPPED:
        block = tl.load(pooled_block + windows, mask=visible, other=0)
        visible = visible & (tl.load(keep_row + block, mask=visible, other=1) == 0)
    return tl.where(visible, bias, float("-inf"))
