"""Normalisation and rotary embedding in plain PyTorch: the specification of the fused kernel."""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("none", "rms-all-heads", "rms", "layer")


def reference_norm_rope(
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
    """What `qk_norm_rope` computes, on any device; `cos` and `sin` are (tokens, D)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    weight, bias = (None if vector is None else vector.to(dtype) for vector in (weight, bias))
    if norm == "layer":
        y = torch.nn.functional.layer_norm(y, y.shape[-1:], weight, bias, eps)
    elif norm == "rms":
        y = torch.nn.functional.rms_norm(y, y.shape[-1:], weight, eps)
    elif norm == "rms-all-heads":
        y = torch.nn.functional.rms_norm(y.flatten(2), (y.shape[2] * y.shape[3],), weight, eps).view(y.shape)
    if cos is not None and sin is not None:
        stop = rope_start + len(cos)
        even, odd = y[:, rope_start:stop].unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None, 0::2].to(dtype), sin[:, None, 1::2].to(dtype)
        rotated = torch.stack((even * c - odd * s, even * s + odd * c), -1).flatten(-2)
        whole = rope_start == 0 and stop == y.shape[1]
        y = rotated if whole else torch.cat((y[:, :rope_start], rotated, y[:, stop:]), 1)
    y = y.to(x.dtype)
    if places is None:
        return y.contiguous()
    to = places.long().expand(x.shape[2], -1).T[None, :, :, None].expand_as(y)
    return torch.zeros_like(y).scatter(1, to, y)
