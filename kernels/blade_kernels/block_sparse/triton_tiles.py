"""What the kernels of block-sparse attention share: loads of tiles, and their products."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # logits are in base 2: exp2 is what the hardware computes


@triton.jit
def load_tile(
    x, item, head, start, stop, batch_stride, token_stride, head_stride,
    TOKENS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Load (TOKENS, D) of one head from token `start` on, with zeros from token `stop` on.

    Args:
        x: a pointer, or, with `TMA`, a descriptor of (B, H, S, D) in blocks of (1, 1, TOKENS, D).
        item: place in the batch; likewise `head`.
        start: first token.
        stop: token after the last one that there is; not looked at where `WHOLE`.
        batch_stride: from batch item to batch item; likewise the other strides.
    """
    if TMA:
        tile = x.load([item, head, start, 0]).reshape(TOKENS, D)
        if not WHOLE:  # what lies past `stop` may be anything, not a number included
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
    """How many of the first `count` blocks of a list are less than `block`."""
    found = count * 0
    for first in range(0, count, 128):
        places = first + tl.arange(0, 128)
        found += tl.sum((tl.load(kept + places, mask=places < count, other=block) < block).to(tl.int32), 0)
    return found


@triton.jit
def multiply(a, b, UPCAST: tl.constexpr):
    """Matrix product in float32. `UPCAST` is for the interpreter, which knows no product of bfloat16."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def multiply_add(a, b, total, UPCAST: tl.constexpr):
    """Matrix product added to `total`, as `multiply`."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tile_place(order, tile, BQ: tl.constexpr, BLOCK_M: tl.constexpr, ORDERED: tl.constexpr):
    """Row of the mask, and the first query, of a tile of queries. `order` is that of the rows, where `ORDERED`."""
    TILES: tl.constexpr = BQ // BLOCK_M
    row = tile // TILES
    if ORDERED:
        row = tl.load(order + row)
    return row, row * BQ + (tile % TILES) * BLOCK_M


@triton.jit
def key_stop(key_lengths, item, T, LENGTHS: tl.constexpr):
    """Where the keys of a batch item end: at T, or, with `LENGTHS`, where its own do."""
    stop = T
    if LENGTHS:
        stop = tl.minimum(tl.maximum(tl.load(key_lengths + item), 0), T).to(tl.int32)
    return stop


@triton.jit
def kept_blocks(kept, count, stop, key_blocks, BK: tl.constexpr, LENGTHS: tl.constexpr, TAIL: tl.constexpr):
    """How many of a row's `count` blocks are whole, and how many hold a key at all: they come first, as lists ascend.

    Args:
        kept: the row's list.
        stop: from `key_stop`.
        TAIL: whether the last key block is not full.
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
    """Bias of `BLOCK_N` pooled tokens: -inf past the last, and, with `DROPPED`, of blocks that the row keeps."""
    windows = window + tl.arange(0, BLOCK_N)
    seen = windows < P
    bias = tl.load(pooled_bias + windows, mask=seen, other=0.0)
    if DROPPED:
        block = tl.load(pooled_block + windows, mask=seen, other=0)
        seen = seen & (tl.load(keep_row + block, mask=seen, other=1) == 0)
    return tl.where(seen, bias, float("-inf"))
