"""Block-sparse attention in PyTorch's own operations, arranged for a CPU; runs on every device.

The forward computes what `naive` specifies. Backward, from the gradients dout and dlse, with a_j = e^(s_j - lse):

    delta = dout.out - dlse              ds_j = a_j (dout.v_j - delta)
    dq = scale sum_j ds_j k_j            dk_j = scale sum_q ds_j q            dv_j = sum_q a_j dout

and the same for pooled tokens. One head is computed at a time, or a few small ones that are alike, a piece of its
rows and keys at a time, in float32 at the least and with logits in base 2. No gathered copy is larger than what the
threads' caches hold. How many blocks the rows keep is read on the host.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse.cpu_walk import Head, Heads
from blade_kernels.block_sparse.operators import Arguments, register
from blade_kernels.block_sparse.pooled import PooledTokens

_LN2 = math.log(2.0)


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    pooled: PooledTokens | None,
    key_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept blocks and the pooled tokens, on any device, with gradients.

    Args:
        q: (B, S, H, D), any float type.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: which blocks are kept.
        pooled: pooled tokens that share the softmax, or None.
        key_lengths: (B,) integers, keys from there on are absent; or None.
        scale: factor of the logits.

    Returns:
        Output, (B, S, H, D) in the type of `q`, and log-sum-exp, (B, S, H) in float32 (float64 of float64).
    """
    return _attention(*Arguments.of(q, k, v, mask, pooled, key_lengths, scale))


def _forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """All heads, a few at a time."""
    q, heads = arguments.q, _heads(arguments)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=heads.dtype)
    for item, some in heads:
        head = heads[item, some]
        head_out, head_lse = _attend(head)
        out[item, :, some] = head.in_sequence(head_out, q.shape[1])
        lse[item, :, some] = head.in_sequence(head_lse, q.shape[1]).squeeze(-1)
    return out, lse.mul_(_LN2)


def _backward(
    arguments: Arguments, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and of the pooled keys and values."""
    q, k, v, scale, heads = arguments.q, arguments.k, arguments.v, arguments.scale, _heads(arguments)
    dq, dk, dv, d_pooled_k, d_pooled_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, arguments.pooled_k, arguments.pooled_v)
    )
    for item, some in heads:
        head = heads[item, some]
        d_out = grad_out[item, :, some].to(heads.dtype)
        delta = (d_out * out[item, :, some]).sum(-1) - grad_lse[item, :, some]
        grads = _attend_backward(
            head,
            head.in_order(d_out),
            head.in_order(lse[item, :, some, None] / _LN2),
            head.in_order(delta.unsqueeze(-1)),
        )
        dq[item, :, some] = head.in_sequence(grads.q.mul_(scale), q.shape[1])
        # The queries of a head bear the factor scale / ln 2, and so do the gradients that are sums over them.
        for gradient, own in ((dk, grads.k.mul_(_LN2)), (dv, grads.v)):
            by_head = own.view(head.heads, -1, own.shape[-1])
            gradient[item, :, some] = by_head[:, : gradient.shape[1]].transpose(0, 1)
        d_pooled_k[item, :, some] = grads.pooled_k.mul_(_LN2).transpose(0, 1)
        d_pooled_v[item, :, some] = grads.pooled_v.transpose(0, 1)
    return dq, dk, dv, d_pooled_k, d_pooled_v


def _heads(arguments: Arguments) -> Heads:
    """The heads of a call, to be walked over."""
    q, k, v, key_lengths, scale = arguments.q, arguments.k, arguments.v, arguments.key_lengths, arguments.scale
    return Heads(q, k, v, arguments.mask, arguments.pooled, key_lengths, scale / _LN2)


def _attend(head: Head) -> tuple[Tensor, Tensor]:
    """Output (R, bq, D) and log-sum-exp in base 2 (R, bq, 1), in the heads' order of rows."""
    out = head.scratch("head out", *head.q.shape)
    total = out.new_zeros(*out.shape[:2], 1)
    lowest = torch.finfo(total.dtype).min  # finite, so that -inf less the peak stays -inf
    peak = torch.full_like(total, lowest)
    out[head.occupied :].zero_()
    for piece in head.pieces():
        logits = head.logits(piece)
        out_, total_, peak_ = out[piece.rows], total[piece.rows], peak[piece.rows]
        if piece.first:
            torch.amax(logits, -1, keepdim=True, out=peak_).clamp_(min=lowest)
            a = logits.sub_(peak_).exp2_()
            torch.sum(a, -1, keepdim=True, out=total_)
            torch.bmm(a, head.gather_v(piece), out=out_)
            continue
        higher = torch.maximum(peak_, logits.amax(-1, keepdim=True))
        a = logits.sub_(higher).exp2_()
        fade = peak_.sub_(higher).exp2_()  # what came before was relative to a lower peak
        total_.mul_(fade).add_(a.sum(-1, keepdim=True))
        out_.mul_(fade)
        if piece.blocks is None:
            head.by_head(out_, piece).baddbmm_(head.by_head(a, piece), head.gather_v(piece))
        else:
            out_.baddbmm_(a, head.gather_v(piece))
        peak_.copy_(higher)
    # The largest weight of a query is exactly 1: a total below 1 is that of a query without keys.
    return out.div_(total.clamp(min=1.0)), peak.add_(total.log2())


class _HeadGradients(NamedTuple):
    """Gradients of the tensors of a `Head`, shaped as they are."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor
    pooled_v: Tensor


def _attend_backward(head: Head, d_out: Tensor, lse: Tensor, delta: Tensor) -> _HeadGradients:
    """Gradients of a head, or of those that are taken together.

    Args:
        head: the head.
        d_out: (R, bq, D) in the head's order of rows, gradient of the output.
        lse: (R, bq, 1), log-sum-exp in base 2.
        delta: (R, bq, 1), `d_out . out - d_lse`.
    """
    grads = _HeadGradients(*(torch.zeros_like(x) for x in (head.q, head.k, head.v, head.pooled_k, head.pooled_v)))
    lse = lse.clamp(min=torch.finfo(lse.dtype).min)
    for piece in head.pieces():
        q, dq, do = head.q[piece.rows], grads.q[piece.rows], d_out[piece.rows]
        a = head.logits(piece).sub_(lse[piece.rows]).exp2_()
        ds = head.scratch("ds", *a.shape)
        if piece.blocks is None:
            own, change = head.heads_of(piece), head.by_head(delta[piece.rows], piece)
            a, ds, q, dq, do = (head.by_head(x, piece) for x in (a, ds, q, dq, do))
            torch.bmm(do, head.pooled_v[own].mT, out=ds).sub_(change).mul_(a)
            dq.baddbmm_(ds, head.pooled_k[own])
            grads.pooled_k[own].baddbmm_(ds.mT, q)
            grads.pooled_v[own].baddbmm_(a.mT, do)
        else:
            torch.bmm(do, head.gather_v(piece).mT, out=ds).sub_(delta[piece.rows]).mul_(a)
            dq.baddbmm_(ds, head.gather_k(piece))
            gathered = head.scratch("gathered", len(q), ds.shape[-1], q.shape[-1])  # gradient of keys, then of values
            by_block = gathered.view(-1, *head.k.shape[1:])
            torch.bmm(ds.mT, q, out=gathered)
            grads.k.index_add_(0, piece.blocks, by_block)
            torch.bmm(a.mT, do, out=gathered)
            grads.v.index_add_(0, piece.blocks, by_block)
    return grads


_attention = register("block_sparse_cpu", _forward, _backward)
