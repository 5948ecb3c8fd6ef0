"""Rounding of queries or keys to 8-bit integers, by block and head, and of values to 8-bit floats, by channel."""

from __future__ import annotations

import triton
import triton.language as tl

from blade_kernels.block_sparse.triton_tiles import key_stop, load_tile, nearest_float8


@triton.jit
def quantize_kernel(
    x, mean, key_lengths, values, scales, T, H,
    x_batch, x_token, x_head,
    D: tl.constexpr, BLOCK: tl.constexpr, MEAN: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Round one block of one head; see `quantized.quantize`.

    Args:
        x: (B, T, H, D), strided.
        mean: (B, H, D) float32, contiguous, if `MEAN`.
        key_lengths: (B,), if `LENGTHS`.
        values: (B, T, H, D) int8, contiguous.
        scales: (B, H, blocks) float32, contiguous.
        T: number of tokens; likewise H heads.
        D: size of a head.
        BLOCK: tokens in a block.
    """
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = item.to(tl.int64) * H + head
    stop = key_stop(key_lengths, item, T, LENGTHS)
    tile = load_tile(x, item, head, block * BLOCK, stop, x_batch, x_token, x_head, BLOCK, D, False, False).to(
        tl.float32
    )
    tokens = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    if MEAN:
        common = tl.load(mean + row * D + tl.arange(0, D))
        tile = tl.where((tokens < stop)[:, None], tile - common[None, :], 0.0)
    step = tl.maximum(tl.max(tl.max(tl.abs(tile), 1), 0) / 127.0, 1e-30)
    rounded = tl.floor(tile / step + 0.5).to(tl.int8)
    pointers = values + ((item.to(tl.int64) * T + tokens[:, None]) * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(pointers, rounded, mask=(tokens < T)[:, None])
    tl.store(scales + row * tl.num_programs(0) + block, step)


@triton.jit
def round_values_kernel(
    x, scales, key_lengths, values, T, H,
    x_batch, x_token, x_head,
    D: tl.constexpr, BLOCK: tl.constexpr, LENGTHS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Round the values of some tokens of one head to 8-bit floats; see `quantized.rounded_values`.

    Args:
        x: (B, T, H, D), strided.
        scales: (B, H, D) float32, contiguous, by which they are divided.
        key_lengths: (B,), if `LENGTHS`.
        values: (B, T, H, D), contiguous.
        T: number of tokens; likewise H heads.
        D: size of a head.
        BLOCK: tokens of a program.
    """
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stop = key_stop(key_lengths, item, T, LENGTHS)
    tile = load_tile(x, item, head, block * BLOCK, stop, x_batch, x_token, x_head, BLOCK, D, False, False)
    steps = tl.load(scales + (item.to(tl.int64) * H + head) * D + tl.arange(0, D))
    tile = tile.to(tl.float32) / steps[None, :]
    if UPCAST:
        tile = nearest_float8(tile)
    tokens = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    pointers = values + ((item.to(tl.int64) * T + tokens[:, None]) * H + head) * D + tl.arange(0, D)[None, :]
    tl.store(pointers, tile.to(values.dtype.element_ty), mask=(tokens < T)[:, None])
