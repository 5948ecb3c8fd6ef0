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
