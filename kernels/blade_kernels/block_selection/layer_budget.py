"""Selection with one budget for the rows of all heads, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from blade_kernels.block_selection.ranking import largest
from blade_kernels.triton_support import on_device

INFINITY_BITS = 0x7F800000
"""Bits of infinity, which no finite score reaches. Non-negative float32 numbers sort as their bits do."""

DIGITS = ((20, 2048), (10, 1024), (0, 1024))
"""The 31 bits of a non-negative float32 number as digits, highest first: bits below each, and its values."""

CHUNK = 4096
"""Numbers that one program counts."""


def keep_over_heads(
    importance: Tensor,
    limit: int,
    extra: int,
    least: int,
    forced: Tensor | None,
    forced_query_blocks: Tensor | None,
    *,
    use_triton: bool,
) -> Tensor:
    """Keep the most important key blocks of all rows of all heads of an item together.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks) float32, not negative.
        limit: key blocks in a row on average, less than there are.
        extra: rows with one more.
        least: best blocks that every row keeps.
        forced: bool that broadcasts to (query blocks, key blocks), or None.
        forced_query_blocks: (query blocks,) bool, or None.
        use_triton: find the threshold with the kernel, on a GPU, instead of by sorting.

    Returns:
        Bool of the shape of `importance`.
    """
    heads, query_blocks = importance.shape[1:3]
    ranked = importance.abs() if forced is None else importance.abs().masked_fill(forced, torch.inf)
    bits = ranked.contiguous().view(torch.int32)
    bits = bits.scatter(-1, largest(ranked, least), INFINITY_BITS)
    total: int | Tensor = heads * (limit * query_blocks + extra)
    if forced_query_blocks is not None:
        rows = torch.arange(query_blocks + 1, device=bits.device) * extra // query_blocks
        total = heads * ((limit + rows.diff()) * ~forced_query_blocks).sum()
        bits = bits.masked_fill(forced_query_blocks.unsqueeze(-1), -1)
    flat = bits.flatten(1)
    threshold, at_threshold = _threshold_kernel(flat, total) if use_triton else _threshold_by_sorting(flat, total)
    tied = flat == threshold
    keep = (flat > threshold) | (tied & (tied.cumsum(-1) <= at_threshold)) | (flat == INFINITY_BITS)
    keep = keep.view_as(bits)
    return keep if forced_query_blocks is None else keep | forced_query_blocks.unsqueeze(-1)


def _threshold_by_sorting(bits: Tensor, total: int | Tensor) -> tuple[Tensor, Tensor]:
    """Find the `total`-th largest of each row of (B, n), (B, 1), and how many equal to it are among them, (B, 1)."""
    size = bits.shape[1]
    if isinstance(total, int):
        threshold = bits.kthvalue(size - total + 1, keepdim=True).values
    else:
        place = (size - total).clamp(max=size - 1)  # 0 are kept where every row is forced
        threshold = bits.sort().values.index_select(1, place.view(1))
    return threshold, total - (bits > threshold).sum(-1, keepdim=True)


def _threshold_kernel(bits: Tensor, total: int | Tensor) -> tuple[Tensor, Tensor]:
    """Do as `_threshold_by_sorting`, by counting the values of one digit after another."""
    threshold = torch.zeros(bits.shape[0], dtype=torch.int32, device=bits.device)
    missing = torch.zeros_like(threshold).add_(total)
    for shift, values in DIGITS:
        counts = digit_histogram(bits, threshold, shift, values)
        from_here = counts.flip(-1).cumsum(-1).flip(-1)  # of this value and all larger ones
        digit = ((from_here >= missing.unsqueeze(-1)).sum(-1) - 1).clamp(min=0)
        missing = missing - (from_here - counts).gather(-1, digit.unsqueeze(-1)).squeeze(-1)
        threshold = threshold * values + digit.to(torch.int32)
    return threshold.unsqueeze(-1), missing.unsqueeze(-1)


@torch.library.custom_op("blade::digit_histogram", mutates_args=())
def digit_histogram(bits: Tensor, prefix: Tensor, shift: int, values: int) -> Tensor:
    """Count the values of one digit with the kernel, among the numbers that begin with a prefix.

    Args:
        bits: (B, n) int32, contiguous; negative ones are not counted.
        prefix: (B,) int32, the digits above.
        shift: bits below the digit.
        values: values of the digit, a power of two.

    Returns:
        (B, values) int32.
    """
    from blade_kernels.block_selection.triton_selection import digit_histogram_kernel

    histogram = torch.zeros(bits.shape[0], values, dtype=torch.int32, device=bits.device)
    with on_device(bits):
        digit_histogram_kernel[(-(-bits.shape[1] // CHUNK), bits.shape[0])](
            bits, histogram, prefix, bits.shape[1], SHIFT=shift, BINS=values, CHUNK=CHUNK
        )
    return histogram


@digit_histogram.register_fake
def _(bits: Tensor, prefix: Tensor, shift: int, values: int) -> Tensor:
    return bits.new_empty(bits.shape[0], values)
