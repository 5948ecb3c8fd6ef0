"""Specification of `qk_norm_rope`, one formula after another.

For the channels x_i of one head of a token (of all its heads with the norm "rms-all-heads"):

    rms      y_i = x_i / sqrt(mean(x^2) + eps) w_i
    layer    y_i = (x_i - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) w_i + b_i

Then each pair of adjacent channels is rotated by its angle: the complex number y_2i + i y_2i+1 is multiplied by
cos + i sin. Finally token t of head h moves to position `places[h, t]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("none", "rms-all-heads", "rms", "layer")


def naive_norm_rope(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    places: Tensor | None,
    norm: str,
    eps: float,
    rope_start: int,
) -> Tensor:
    """Compute `qk_norm_rope` in float32 (float64 for float64), rounded once; `cos` and `sin` are (tokens, D)."""
    dtype, size = torch.promote_types(x.dtype, torch.float32), x.shape[-1]
    y = x.to(dtype)  # (B, S, H, D)
    if norm == "layer":
        y = y - y.mean(-1, keepdim=True)
    if norm != "none":
        normalised = (-2, -1) if norm == "rms-all-heads" else -1
        y = y / (y.square().mean(normalised, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.to(dtype).view(-1, size)  # (H, D) or (1, D)
    if bias is not None:
        y = y + bias.to(dtype)
    if cos is not None and sin is not None:
        stop = rope_start + len(cos)
        even, odd = y[:, rope_start:stop, :, 0::2], y[:, rope_start:stop, :, 1::2]
        c, s = (table[:, None, 0::2].to(dtype) for table in (cos, sin))  # each value is repeated for both channels
        rotated = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
        y = torch.cat((y[:, :rope_start], rotated, y[:, stop:]), 1)
    y = y.to(x.dtype)
    if places is None:
        return y.contiguous()
    moved = torch.empty_like(y, memory_format=torch.contiguous_format)
    for head, positions in enumerate(places.expand(y.shape[2], -1)):
        moved[:, positions, head] = y[:, :, head]
    return moved
