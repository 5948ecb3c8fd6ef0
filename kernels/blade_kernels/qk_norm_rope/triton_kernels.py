"""Kernels of normalisation and rotary embedding, forward and backward, one token with all its heads at a time."""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RMS_ALL_HEADS, RMS, LAYER = (tl.constexpr(number) for number in range(4))


@triton.jit
def load_pairs(pointers, mask):
    """Load (H, D) as even and odd channels, both (H, D / 2) float32."""
    tile = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.split(tile.reshape(tile.shape[0], tile.shape[1] // 2, 2))


@triton.jit
def mean_of(even, odd, H, D: tl.constexpr, NORM: tl.constexpr):
    """Average over the channels that are normalised together; broadcast to (H, D / 2)."""
    sums = tl.sum(even + odd, 1)
    if NORM == RMS_ALL_HEADS:
        total = tl.sum(sums, 0) / (H * D)
        return tl.zeros_like(even) + total
    return tl.zeros_like(even) + sums[:, None] / D


@triton.jit
def normalise(even, odd, H, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Return the normalised channels and the factor that they were multiplied by."""
    if NORM == LAYER:
        mean = mean_of(even, odd, H, D, NORM)
        even, odd = even - mean, odd - mean
    if NORM == NONE:
        factor = tl.zeros_like(even) + 1.0
    else:
        factor = tl.rsqrt(mean_of(even * even, odd * odd, H, D, NORM) + eps)
    return even * factor, odd * factor, factor


@triton.jit
def normalise_backward(g_even, g_odd, even, odd, factor, H, D: tl.constexpr, NORM: tl.constexpr):
    """Return the gradients of the channels, from those of the normalised ones, `even` and `odd`."""
    if NORM == LAYER:
        mean = mean_of(g_even, g_odd, H, D, NORM)
        along = mean_of(g_even * even, g_odd * odd, H, D, NORM)
        g_even, g_odd = factor * (g_even - mean - even * along), factor * (g_odd - mean - odd * along)
    elif NORM != NONE:
        along = mean_of(g_even * even, g_odd * odd, H, D, NORM)
        g_even, g_odd = factor * (g_even - even * along), factor * (g_odd - odd * along)
    return g_even, g_odd


@triton.jit
def norm_rope_kernel(
    x, weight, bias, cos, sin, places, out,
    S, H, eps, rope_start, rope_stop,
    x_batch, x_token, x_head, places_head,
    HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROPE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Process one token with all its heads.

    Args:
        out: (B, S, H, D), contiguous.
        places_head: stride between heads in `places`; 0 if all heads share them.
        HEADS: number of heads rounded up to a power of two.
    """
    token, item = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    heads = tl.arange(0, HEADS)
    channels = tl.arange(0, D)
    inside = (heads < H)[:, None] & (channels < D)[None, :]
    source = x + item * x_batch + token * x_token + heads[:, None].to(tl.int64) * x_head + channels[None, :]
    even, odd = load_pairs(source, inside)
    even, odd, _ = normalise(even, odd, H, eps, D, NORM)
    parameters = (
        channels[None, :] + (heads * D)[:, None] if NORM == RMS_ALL_HEADS else channels[None, :] + heads[:, None] * 0
    )
    if WEIGHT:
        weight_even, weight_odd = load_pairs(weight + parameters, inside)
        even, odd = even * weight_even, odd * weight_odd
    if BIAS:
        bias_even, bias_odd = load_pairs(bias + parameters, inside)
        even, odd = even + bias_even, odd + bias_odd
    if ROPE:
        if (token >= rope_start) & (token < rope_stop):
            c, s = load_rotation(cos, sin, token - rope_start, D)
            even, odd = even * c - odd * s, even * s + odd * c
    to = token + heads.to(tl.int64) * 0
    if PLACES:
        to = tl.load(places + heads * places_head + token, mask=heads < H, other=0).to(tl.int64)
    pointers = out + ((item * S + to[:, None]) * H + heads[:, None]) * D + channels[None, :]
    tl.store(pointers, tl.join(even, odd).reshape(HEADS, D).to(out.dtype.element_ty), mask=inside)


@triton.jit
def load_rotation(cos, sin, position, D: tl.constexpr):
    """Load the cosines and sines of a position, (1, D / 2) float32."""
    channels = tl.arange(0, D // 2) * 2
    c = tl.load(cos + position * D + channels).to(tl.float32)
    s = tl.load(sin + position * D + channels + 1).to(tl.float32)
    return c[None, :], s[None, :]


@triton.jit
def norm_rope_backward_kernel(
    x, weight, cos, sin, places, grad_out, grad_x, grad_weight, grad_bias,
    S, H, B, eps, rope_start, rope_stop,
    x_batch, x_token, x_head, places_head,
    HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, ROPE: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of some tokens with all their heads, and partial gradients of weight and bias.

    Args:
        grad_out: (B, S, H, D), contiguous; likewise `grad_x`.
        grad_weight: (programs, HEADS, D) float32, one partial sum per program; likewise `grad_bias`.
    """
    heads = tl.arange(0, HEADS)
    channels = tl.arange(0, D)
    inside = (heads < H)[:, None] & (channels < D)[None, :]
    parameters = (
        channels[None, :] + (heads * D)[:, None] if NORM == RMS_ALL_HEADS else channels[None, :] + heads[:, None] * 0
    )
    if WEIGHT:
        weight_even, weight_odd = load_pairs(weight + parameters, inside)
        dw_even, dw_odd = tl.zeros_like(weight_even), tl.zeros_like(weight_odd)
    if BIAS:
        db_even, db_odd = tl.zeros((HEADS, D // 2), tl.float32), tl.zeros((HEADS, D // 2), tl.float32)
    for index in range(tl.program_id(0), B * S, tl.num_programs(0)):
        item, token = (index // S).to(tl.int64), (index % S).to(tl.int64)
        source = x + item * x_batch + token * x_token + heads[:, None].to(tl.int64) * x_head + channels[None, :]
        even, odd = load_pairs(source, inside)
        even, odd, factor = normalise(even, odd, H, eps, D, NORM)
        to = token + heads.to(tl.int64) * 0
        if PLACES:
            to = tl.load(places + heads * places_head + token, mask=heads < H, other=0).to(tl.int64)
        pointers = grad_out + ((item * S + to[:, None]) * H + heads[:, None]) * D + channels[None, :]
        g_even, g_odd = load_pairs(pointers, inside)
        if ROPE:
            if (token >= rope_start) & (token < rope_stop):
                c, s = load_rotation(cos, sin, token - rope_start, D)
                g_even, g_odd = g_even * c + g_odd * s, g_odd * c - g_even * s
        if BIAS:
            db_even, db_odd = db_even + g_even, db_odd + g_odd
        if WEIGHT:
            dw_even, dw_odd = dw_even + g_even * even, dw_odd + g_odd * odd
            g_even, g_odd = g_even * weight_even, g_odd * weight_odd
        g_even, g_odd = normalise_backward(g_even, g_odd, even, odd, factor, H, D, NORM)
        pointers = grad_x + ((item * S + token) * H + heads[:, None]) * D + channels[None, :]
        tl.store(pointers, tl.join(g_even, g_odd).reshape(HEADS, D).to(grad_x.dtype.element_ty), mask=inside)
    part = (tl.program_id(0).to(tl.int64) * HEADS + heads[:, None]) * D + channels[None, :]
    if WEIGHT:
        tl.store(grad_weight + part, tl.join(dw_even, dw_odd).reshape(HEADS, D))
    if BIAS:
        tl.store(grad_bias + part, tl.join(db_even, db_odd).reshape(HEADS, D))
