"""Launches of the kernels of block statistics, and their limits."""

from __future__ import annotations

import torch
from torch import Tensor

from blade_kernels.triton_support import missing_triton, on_device

LARGEST_BLOCK = 128
"""Tokens in a block, all held by one program and compared with each other."""

ROWS_TOGETHER = 16
"""Blocks whose spread one program computes."""


def statistics_unsupported(x: Tensor, block_size: int) -> str | None:
    """Return why the kernels cannot compute statistics of blocks, or None if they can."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels compute bfloat16, float16 and float32, not {x.dtype}"
    if x.shape[-1] not in (16, 32, 64, 128):
        return f"the Triton kernels need heads of 16, 32, 64 or 128, got {x.shape[-1]}"
    if block_size > LARGEST_BLOCK:
        return f"the Triton kernels compare at most {LARGEST_BLOCK} tokens of a block, got {block_size}"
    return missing_triton(x.device)


@torch.library.custom_op("blade::largest_key_offsets", mutates_args=())
def largest_key_offsets(
    k: Tensor, offsets: Tensor, largest: int, block_size: int, key_lengths: Tensor | None
) -> Tensor:
    """Compute `block_selection.largest_key_offsets` with the kernels."""
    from blade_kernels.block_selection.triton_statistics import largest_offsets_kernel

    batch, tokens, heads, size = k.shape
    k = k if k.stride(-1) == 1 else k.contiguous()
    sums, _ = _block_sums(k, block_size, key_lengths, squares=False)
    drawn = offsets.expand(batch, heads, -1).contiguous()
    found = _new_offsets(k, offsets, block_size)
    samples = found.shape[-1]
    with on_device(k):
        largest_offsets_kernel[(found.shape[2], heads, batch)](
            k, _lengths(k, key_lengths), sums.sum(2), drawn, found, tokens, heads, largest, *k.stride()[:3],
            D=size, BLOCK=block_size, WIDTH=_power_of_two(block_size), SAMPLES=samples, SLOTS=_power_of_two(samples),
            LENGTHS=key_lengths is not None,
        )  # fmt: skip
    return found


@largest_key_offsets.register_fake
def _(k: Tensor, offsets: Tensor, largest: int, block_size: int, key_lengths: Tensor | None) -> Tensor:
    return _new_offsets(k, offsets, block_size)


@torch.library.custom_op("blade::value_spread", mutates_args=())
def value_spread(v: Tensor, block_size: int, key_lengths: Tensor | None) -> Tensor:
    """Compute `block_selection.value_spread` with the kernels."""
    from blade_kernels.block_selection.triton_statistics import value_spread_kernel

    v = v if v.stride(-1) == 1 else v.contiguous()
    sums, squares = _block_sums(v, block_size, key_lengths, squares=True)
    spread = torch.empty_like(squares)
    batch, heads, blocks, size = sums.shape
    with on_device(v):
        value_spread_kernel[(-(-blocks // ROWS_TOGETHER), heads, batch)](
            sums, squares, sums.sum(2), _lengths(v, key_lengths), spread, v.shape[1], heads, blocks,
            D=size, BLOCK=block_size, ROWS=ROWS_TOGETHER, LENGTHS=key_lengths is not None,
        )  # fmt: skip
    return spread


@value_spread.register_fake
def _(v: Tensor, block_size: int, key_lengths: Tensor | None) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], -(-v.shape[1] // block_size), dtype=torch.float32)


def _block_sums(x: Tensor, block_size: int, lengths: Tensor | None, *, squares: bool) -> tuple[Tensor, Tensor]:
    """Add up the tokens of each block, (B, H, blocks, D), and their squared norms, (B, H, blocks)."""
    from blade_kernels.block_selection.triton_statistics import block_sums_kernel

    batch, tokens, heads, size = x.shape
    blocks = -(-tokens // block_size)
    sums = x.new_empty(batch, heads, blocks, size, dtype=torch.float32)
    squared = x.new_empty(batch, heads, blocks, dtype=torch.float32)
    with on_device(x):
        block_sums_kernel[(blocks, heads, batch)](
            x, _lengths(x, lengths), sums, squared, tokens, heads, *x.stride()[:3],
            D=size, BLOCK=block_size, WIDTH=_power_of_two(block_size), LENGTHS=lengths is not None, SQUARES=squares,
        )  # fmt: skip
    return sums, squared


def _lengths(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the lengths for a kernel, which reads none of the tensor that stands for None."""
    return x if lengths is None else lengths.to(x.device).contiguous()


def _new_offsets(k: Tensor, offsets: Tensor, block_size: int) -> Tensor:
    shape = (k.shape[0], k.shape[2], -(-k.shape[1] // block_size), offsets.shape[-1])
    return k.new_empty(shape, dtype=torch.int32)


def _power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()
