"""Specification of block-sparse attention: a dense mask over all pairs of tokens, and one softmax.

For one query q in a row (a query block) of the mask, with the keys k_j and values v_j of the blocks that the row
keeps, and the pooled keys p_w and values u_w that it sees, each representing n_w tokens:

    s_j = scale q.k_j          t_w = scale q.p_w + ln n_w                  logits
    lse = ln(sum_j e^s_j + sum_w e^t_w)                                    one softmax over both
    out = sum_j e^(s_j - lse) v_j + sum_w e^(t_w - lse) u_w

A query that sees no key has out = 0 and lse = -inf.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.pooled import PooledTokens


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
    *,
    round_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute block-sparse attention in float32 (float64 for float64 inputs), with gradients by autograd.

    Stores the logits of all pairs, B * H * S * (T + pooled tokens) numbers, several times over. `round_weights`: see
    `dense_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if pooled is not None:
        pooled = replace(pooled, k=pooled.k.to(dtype), v=pooled.v.to(dtype))
    with torch.autocast(q.device.type, enabled=False):
        given = q.dtype
        q, k, v = (x.to(dtype) for x in (q, k, v))
        out, lse = dense_attention(q, k, v, mask, pooled, key_lengths, scale, round_weights=round_weights)
    return out.to(given), lse


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
    *,
    round_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the same in the dtype of `q`, `k` and `v` throughout.

    With `round_weights` the weights of tokens, though not of pooled ones, are the 8-bit floats of `quantized`,
    relative to the power of two that is at least the largest weight. The sum of the rounded weights divides the
    output, and is what the log-sum-exp is of.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, tokens, D)
    row = torch.arange(q.shape[2], device=q.device) // mask.block_size[0]
    key_block = torch.arange(k.shape[2], device=q.device) // mask.block_size[1]
    visible = mask.keep[:, :, row][..., key_block]  # (B or 1, H or 1, S, T)
    if key_lengths is not None:
        present = torch.arange(k.shape[2], device=q.device) < key_lengths.to(q.device).unsqueeze(-1)
        visible = visible & present[:, None, None]
    unused = ~visible.any(2).unsqueeze(-1)  # keys that no query sees may hold anything, even NaN
    k, v = k.masked_fill(unused, 0.0), v.masked_fill(unused, 0.0)
    logits = (q @ k.mT * scale).masked_fill(~visible, -torch.inf)
    if pooled is not None:
        pooled_k, pooled_v = (x.transpose(1, 2) for x in (pooled.k, pooled.v))
        visible = pooled.visible(mask)[:, :, row]  # (B or 1, H or 1, S, pooled tokens)
        pooled_logits = q @ pooled_k.mT * scale + pooled.log_weight.to(q.dtype)
        logits = torch.cat((logits, pooled_logits.masked_fill(~visible, -torch.inf)), -1)
        v = torch.cat((v, pooled_v), 2)
    lse = logits.logsumexp(-1, keepdim=True)
    sums = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be NaN
    weights = (logits - sums).exp()
    if round_weights:
        peak = (logits.amax(-1, keepdim=True) / math.log(2)).ceil().clamp_min(-1e30) * math.log(2)
        tokens = k.shape[2]
        rounded = rounded_weights((logits[..., :tokens] - peak).exp()) * (peak - sums).exp()
        weights = torch.cat((rounded, weights[..., tokens:]), -1)
        total = weights.sum(-1, keepdim=True)  # of weights that added up to 1 before, or of none
        weights, lse = weights / total.clamp_min(torch.finfo(total.dtype).tiny), lse + total.log()
    return (weights @ v).transpose(1, 2).contiguous(), lse.squeeze(-1).transpose(1, 2).contiguous()


def rounded_weights(weights: Tensor) -> Tensor:
    """Return what the 8-bit floats of 448 times weights from 0 to 1 stand for, in the dtype of the weights."""
    return (weights.float() * 448).to(torch.float8_e4m3fn).to(weights.dtype) / 448
