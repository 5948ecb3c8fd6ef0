"""Normalisation and rotary embedding in plain PyTorch, arranged for a CPU; runs on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def cpu_norm_rope(
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
    """Compute `qk_norm_rope`; `cos` and `sin` are (tokens, D)."""
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
        rotated = _rotate(y[:, rope_start:stop], cos[:, None, 0::2].to(dtype), sin[:, None, 1::2].to(dtype))
        whole = rope_start == 0 and stop == y.shape[1]
        y = rotated if whole else torch.cat((y[:, :rope_start], rotated, y[:, stop:]), 1)
    y = y.to(x.dtype)
    if places is None:
        return y.contiguous()
    to = places.long().expand(x.shape[2], -1).T[None, :, :, None].expand_as(y)
    return torch.zeros_like(y).scatter(1, to, y)


def _rotate(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels, (B, S, H, D), by angles, (S, 1, D / 2), as complex numbers."""
    if torch.compiler.is_compiling():  # the compiler fuses real operations, but not complex ones
        even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    pairs = torch.view_as_complex(y.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
