"""Kernels of block statistics: sums of blocks, the spread of values, and the keys of each block to sample."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_sums_kernel(
    x, lengths, sums, squares, T, H,
    x_batch, x_token, x_head,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LENGTHS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """Add up the tokens of one block of one head, and their squared norms.

    Args:
        x: (B, T, H, D), strided.
        lengths: (B,), tokens that are there, if `LENGTHS`.
        sums: (B, H, blocks, D) float32, contiguous; likewise `squares`, (B, H, blocks), if `SQUARES`.
        WIDTH: `BLOCK`, the tokens of a block, rounded up to a power of two.
    """
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (item.to(tl.int64) * H + head) * tl.num_programs(0) + block
    tile = _block_tile(x, lengths, item, head, block, T, x_batch, x_token, x_head, D, BLOCK, WIDTH, LENGTHS)
    tl.store(sums + row * D + tl.arange(0, D), tl.sum(tile, 0))
    if SQUARES:
        tl.store(squares + row, tl.sum(tl.sum(tile * tile, 1), 0))


@triton.jit
def value_spread_kernel(
    sums, squares, totals, lengths, spread, T, H, blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Compute the spread of `ROWS` blocks of one head, as specified by `value_spread`.

    Args:
        sums: of `block_sums_kernel`; likewise `squares`.
        totals: (B, H, D) float32, contiguous, the sums of whole heads.
        spread: (B, H, blocks) float32, contiguous.
    """
    first, head, item = tl.program_id(0) * ROWS, tl.program_id(1), tl.program_id(2)
    present = _present(lengths, item, T, LENGTHS)
    wide = item.to(tl.int64) * H + head
    row, dims = first + tl.arange(0, ROWS), tl.arange(0, D)
    inside = row < blocks
    count = tl.minimum(tl.maximum(present - row * BLOCK, 0), BLOCK)
    centre = tl.load(totals + wide * D + dims) / tl.maximum(present, 1)
    to = wide * blocks + row
    divisor = tl.maximum(count, 1)
    means = tl.load(sums + to[:, None] * D + dims[None, :], mask=inside[:, None], other=0.0) / divisor[:, None]
    square = tl.load(squares + to, mask=inside, other=0.0) / divisor
    distance = square - 2.0 * tl.sum(means * centre[None, :], 1) + tl.sum(centre * centre, 0)
    distance = tl.where(count > 0, tl.maximum(distance, 0.0), 0.0)
    tl.store(spread + to, tl.sqrt(distance), mask=inside)


@triton.jit
def largest_offsets_kernel(
    x, lengths, totals, drawn_offsets, offsets, T, H, largest,
    x_batch, x_token, x_head,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, SAMPLES: tl.constexpr, SLOTS: tl.constexpr,
    LENGTHS: tl.constexpr,
):  # fmt: skip
    """Choose the tokens of one block of one head to sample, as specified by `largest_key_offsets`.

    Args:
        x: (B, T, H, D), strided.
        totals: (B, H, D) float32, contiguous, the sums of whole heads.
        drawn_offsets: (B, H, SAMPLES) int32, contiguous.
        offsets: (B, H, blocks, SAMPLES) int32, contiguous.
        SLOTS: `SAMPLES` rounded up to a power of two.
    """
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide = item.to(tl.int64) * H + head
    present = _present(lengths, item, T, LENGTHS)
    count = tl.minimum(tl.maximum(present - block * BLOCK, 0), BLOCK)
    tile = _block_tile(x, lengths, item, head, block, T, x_batch, x_token, x_head, D, BLOCK, WIDTH, LENGTHS)
    centre = tl.load(totals + wide * D + tl.arange(0, D)) / tl.maximum(present, 1)
    difference = tile - centre[None, :]
    token = tl.arange(0, WIDTH)
    distance = tl.where(token < count, tl.sum(difference * difference, 1), -1.0)

    further = distance[None, :] > distance[:, None]
    further = further | (distance[None, :] == distance[:, None]) & (token[None, :] < token[:, None])
    is_far = tl.sum(further.to(tl.int32), 1) < largest
    slot = tl.arange(0, SLOTS)
    place = tl.load(drawn_offsets + wide * SAMPLES + slot, mask=slot < SAMPLES, other=-1)
    turn = tl.min(tl.where(place[None, :] == token[:, None], slot[None, :], SAMPLES), 1)
    # furthest tokens first, then those drawn in their order, then the rest; absent ones last
    order = tl.where(is_far, 0, 1 + turn)
    order = tl.where(token < count, order, SAMPLES + 2) * WIDTH + token
    rank = tl.sum((order[None, :] < order[:, None]).to(tl.int32), 1)
    chosen = (rank < SAMPLES) & (token < count)
    to = offsets + (wide * tl.num_programs(0) + block) * SAMPLES
    tl.store(to + tl.cumsum(chosen.to(tl.int32), 0) - 1, token, mask=chosen)
    repeated = (slot >= count) & (slot < SAMPLES)
    tl.store(to + slot, tl.zeros((SLOTS,), tl.int32) + tl.maximum(count - 1, 0), mask=repeated)


@triton.jit
def _block_tile(
    x, lengths, item, head, block, T, x_batch, x_token, x_head,
    D: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Load the tokens of a block, (WIDTH, D) float32, zeros past its end."""
    token = tl.arange(0, WIDTH)
    position = block * BLOCK + token
    inside = (token < BLOCK) & (position < _present(lengths, item, T, LENGTHS))
    base = x + item.to(tl.int64) * x_batch + head.to(tl.int64) * x_head
    pointers = base + position.to(tl.int64)[:, None] * x_token + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=inside[:, None], other=0.0).to(tl.float32)


@triton.jit
def _present(lengths, item, T, LENGTHS: tl.constexpr):
    """Return how many tokens of an item are there."""
    if LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths + item), 0), T).to(tl.int32)
    return T
