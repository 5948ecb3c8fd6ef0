"""Attention in 8 bits, as SageAttention (arXiv 2410.02367) and SageAttention2 (arXiv 2411.10958) have it.

Keys have a large part in common that cancels in the softmax: their mean is subtracted first. Then the tokens of each
block of each head are divided by a 127th of their largest magnitude, which is kept beside them, and rounded. With
`int8` values and weights stay as they are. With `fp8` they are 8-bit floats of 4 bits of exponent and 3 of mantissa:
each channel of a head's values is divided by a 448th of its largest magnitude, and weights, relative to a power of two
that is at least the row's largest, are multiplied by 448 and summed as they are rounded. There are no gradients.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from blade_kernels.block_sparse.pooled import PooledTokens

PRECISIONS = ("full", "int8", "fp8")
"""Types in which attention multiplies: the inputs' own; 8-bit integers for queries and keys; with them 8-bit floats
for weights and values."""

LEVELS = 127
"""Largest integer."""

LARGEST = 448
"""Largest 8-bit float."""

SMALLEST = 1e-30
"""Scale of a block of zeros, which must not be divided by 0."""


def mean_keys(k: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Return the mean of the valid keys: (B, H, D) float32, zero without any.

    Args:
        k: (B, T, H, D).
        key_lengths: (B,) integers, number of valid keys; the rest may hold anything. None if all are valid.
    """
    if key_lengths is None:
        return k.mean(1, dtype=torch.float32)
    present = _present(k, key_lengths)
    total = torch.where(present, k, 0.0).sum(1, dtype=torch.float32)
    return total / key_lengths.to(k.device).clamp(1, k.shape[1]).view(-1, 1, 1)


def quantize(
    x: Tensor, block: int, mean: Tensor | None = None, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round tokens to 8-bit integers, with a scale for each block of each head.

    Args:
        x: (B, S, H, D).
        block: tokens in a block; the last may be shorter.
        mean: (B, H, D), subtracted first; None: nothing.
        key_lengths: see `mean_keys`; tokens behind count as zeros.

    Returns:
        (B, S, H, D) int8, and (B, H, blocks) float32, by which it is multiplied to have the tokens again.
    """
    values = x.float() if mean is None else x.float() - mean.unsqueeze(1)
    if key_lengths is not None:
        values = torch.where(_present(x, key_lengths), values, 0.0)
    batch, tokens, heads, size = x.shape
    blocks = -(-tokens // block)
    padded = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, blocks * block - tokens))
    by_block = padded.view(batch, blocks, block, heads, size)
    scales = (by_block.abs().amax((2, 4)) / LEVELS).clamp_min(SMALLEST)
    rounded = (by_block / scales[:, :, None, :, None] + 0.5).floor().to(torch.int8)
    return rounded.view(batch, -1, heads, size)[:, :tokens].contiguous(), scales.transpose(1, 2).contiguous()


def dequantize(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Return what 8-bit integers stand for: (B, S, H, D) float32; see `quantize`."""
    by_token = scales.repeat_interleave(block, 2)[..., : values.shape[1]]
    return values.float() * by_token.transpose(1, 2).unsqueeze(-1)


def value_scales(v: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Return what 8-bit values are multiplied by: (B, H, D) float32, a 448th of each channel's largest magnitude.

    Args:
        v: (B, T, H, D).
        key_lengths: see `mean_keys`.
    """
    if key_lengths is not None:
        v = torch.where(_present(v, key_lengths), v, 0.0)
    largest: Tensor = torch.linalg.vector_norm(v, float("inf"), dim=1)
    return (largest.float() / LARGEST).clamp_min(SMALLEST)


def rounded_values(v: Tensor, key_lengths: Tensor | None) -> Tensor:
    """Return values that hold what their 8-bit floats stand for: (B, T, H, D) float32; see `value_scales`."""
    scales = value_scales(v, key_lengths).unsqueeze(1)
    values = v if key_lengths is None else torch.where(_present(v, key_lengths), v, 0.0)
    return (values.float() / scales).to(torch.float8_e4m3fn).float() * scales


def rounded_inputs(
    q: Tensor, k: Tensor, pooled: PooledTokens | None, key_lengths: Tensor | None, block_size: tuple[int, int]
) -> tuple[Tensor, Tensor, PooledTokens | None, Tensor]:
    """Return queries and keys that hold what their 8-bit integers stand for, for implementations that have none.

    Args:
        q: (B, S, H, D).
        k: (B, T, H, D).
        pooled: pooled tokens, or None.
        key_lengths: see `mean_keys`.
        block_size: tokens in a (query block, key block).

    Returns:
        Queries and keys in float32, wider if they were; the keys and those of the pooled tokens without the mean; and
        what the log-sum-exp then lacks, before it is scaled: (B, S, H).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    mean = mean_keys(k, key_lengths)
    queries = dequantize(*quantize(q, block_size[0]), block_size[0]).to(dtype)
    keys = dequantize(*quantize(k, block_size[1], mean, key_lengths), block_size[1]).to(dtype)
    if pooled is not None:
        pooled = replace(pooled, k=(pooled.k.to(dtype) - mean.unsqueeze(1).to(dtype)), v=pooled.v.to(dtype))
    lacking = torch.einsum("bshd,bhd->bsh", q.to(dtype), mean.to(dtype))
    return queries, keys, pooled, lacking


def _present(x: Tensor, key_lengths: Tensor) -> Tensor:
    """Mark the valid tokens: (B, T, 1, 1) bool."""
    places = torch.arange(x.shape[1], device=x.device)
    return (places < key_lengths.to(x.device).unsqueeze(-1))[:, :, None, None]
