"""Attention that published students were trained with, from its formulas, beside what BLADE computes."""

from __future__ import annotations

import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.naive import naive_attention
from blade_kernels.block_sparse.pooled import PooledTokens
from torch import Tensor

TILE, TILES, KEPT, HEAD_DIM = 8, 6, 2, 16
"""Tokens of a tile, tiles, those of them that each row keeps, and numbers in a head."""


def video_sparse_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, gate: Tensor) -> Tensor:
    """Return the attention of FastVideo's students: a softmax over the kept tiles plus a gated one over tiles' means.

    Args:
        q: (tokens, D).
        k: (tokens, D).
        v: (tokens, D).
        keep: (tiles, tiles) bool.
        gate: (tokens, D), or a number.

    Source: `video_sparse_attn` of hao-ai-lab/FastVideo, arXiv 2505.13389.
    """
    means = [x.unflatten(0, (-1, TILE)).mean(1) for x in (q, k, v)]
    coarse = torch.softmax(means[0] @ means[1].T / HEAD_DIM**0.5, -1) @ means[2]
    return sparse_attention(q, k, v, keep) + gate * coarse.repeat_interleave(TILE, 0)


def sparse_linear_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, projection: Tensor) -> Tensor:
    """Return the attention of TurboDiffusion's students: a softmax over kept blocks plus projected linear attention.

    Args:
        q: (tokens, D).
        k: (tokens, D).
        v: (tokens, D).
        keep: (blocks, blocks) bool.
        projection: (D, D), the weight of `proj_l`; its bias is zero.

    Source: `SLA/core.py` of thu-ml/TurboDiffusion, arXiv 2509.24006.
    """
    features, keys = torch.softmax(q, -1), torch.softmax(k, -1)
    linear = features @ (keys.T @ v) / (1e-5 + features @ keys.sum(0, keepdim=True).T)
    return sparse_attention(q, k, v, keep) + linear @ projection.T


def sparse_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Return a softmax over the kept blocks, from a mask of all pairs."""
    pairs = keep.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return torch.softmax((q @ k.T / HEAD_DIM**0.5).masked_fill(~pairs, -torch.inf), -1) @ v


def blades_attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *, pooled: bool) -> Tensor:
    """Return BLADE's attention over the kept blocks, with the means of dropped ones in the same softmax or without."""
    mask = BlockMask.from_dense(keep[None, None], (TILE, TILE))
    means = None
    if pooled:
        key, value = (x.unflatten(0, (-1, TILE)).mean(1)[None, :, None] for x in (k, v))
        blocks = torch.arange(TILES, dtype=torch.int32)
        means = PooledTokens(key, value, torch.full((TILES,), float(TILE)).log(), blocks)
    batched = (x[None, :, None] for x in (q, k, v))
    output, _ = naive_attention(*batched, mask, means, None, HEAD_DIM**-0.5)
    return output[0, :, 0]


def branch_differences() -> dict[str, float]:
    """Return relative differences from BLADE's attention on random tensors, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TILES * TILE, HEAD_DIM, dtype=torch.float64, generator=generator) for _ in range(3))
    keep = torch.zeros(TILES, TILES, dtype=torch.bool)
    keep.scatter_(1, torch.rand(TILES, TILES, generator=generator).argsort(1)[:, :KEPT], True)
    plain, pooled = (blades_attention(q, k, v, keep, pooled=pooled) for pooled in (False, True))
    sparse = video_sparse_attention(q, k, v, keep, torch.zeros(()))
    coarse = video_sparse_attention(q, k, v, keep, torch.ones(())) - sparse
    fitted = ((pooled - sparse) * coarse).sum(1, keepdim=True) / coarse.square().sum(1, keepdim=True)
    unit, zero = torch.eye(HEAD_DIM, dtype=q.dtype), q.new_zeros(HEAD_DIM, HEAD_DIM)

    def relative(theirs: Tensor, ours: Tensor) -> float:
        return ((theirs - ours).norm() / ours.norm()).item()

    return {
        "VSA, gate 1, against pooled dropped blocks": relative(sparse + coarse, pooled),
        "VSA, the gate of each token that fits best, against pooled dropped blocks": relative(
            sparse + fitted * coarse, pooled
        ),
        "VSA, gate 0, against kept blocks alone": relative(sparse, plain),
        "SLA, projection 1, against kept blocks alone": relative(sparse_linear_attention(q, k, v, keep, unit), plain),
        "SLA, projection 0, against kept blocks alone": relative(sparse_linear_attention(q, k, v, keep, zero), plain),
    }
