"""Block-sparse attention in plain PyTorch, arranged for a CPU; runs on every device.

The forward pass is specified by `naive`. Backward, from the gradients dout and dlse, with a_j = e^(s_j - lse):

    delta = dout.out - dlse              ds_j = a_j (dout.v_j - delta)
    dq = scale sum_j ds_j k_j            dk_j = scale sum_q ds_j q            dv_j = sum_q a_j dout

and the same for pooled tokens. Heads are processed one at a time, or a few small uniform ones together, in pieces of
rows and keys, in float32 or wider and with base-2 logits. Gathered copies fit into the threads' caches. The number of
blocks in each row is read on the host.
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
    """Attend to the kept blocks and the pooled tokens, on any device, differentiably.

    Args:
        q: (B, S, H, D), any floating-point dtype.
        k: (B, T, H, D).
        v: (B, T, H, D).
        mask: the kept blocks.
        pooled: pooled tokens that share the softmax, or None.
        key_lengths: (B,) integers, number of valid keys; None if all are valid.
        scale: factor of the logits.

    Returns:
        Output, (B, S, H, D) in the dtype of `q`, and log-sum-exp, (B, S, H) in float32 (float64 for float64 inputs).
    """
    return _attention(*Arguments.of(q, k, v, mask, pooled, key_lengths, scale))


def _forward(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """Compute output and log-sum-exp of all heads, a few at a time."""
    q, heads = arguments.q, _heads(arguments)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[:3], dtype=heads.dtype)
    for item, group in heads:
        head = heads[item, group]
        head_out, head_lse = _attend(head)
        out[item, :, group] = head.in_sequence(head_out, q.shape[1])
        lse[item, :, group] = head.in_sequence(head_lse, q.shape[1]).squeeze(-1)
    return out, lse.mul_(_LN2)


def _backward(
    arguments: Arguments, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the gradients of q, k, v and of the pooled keys and values."""
    q, k, v, scale, heads = arguments.q, arguments.k, arguments.v, arguments.scale, _heads(arguments)
    dq, dk, dv, d_pooled_k, d_pooled_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (q, k, v, arguments.pooled_k, arguments.pooled_v)
    )
    for item, group in heads:
        head = heads[item, group]
        d_out = grad_out[item, :, group].to(heads.dtype)
        delta = (d_out * out[item, :, group]).sum(-1)
        if grad_lse is not None:
            delta -= grad_lse[item, :, group]
        grads = _attend_backward(
            head,
            head.in_order(d_out),
            head.in_order(lse[item, :, group, None] / _LN2),
            head.in_order(delta.unsqueeze(-1)),
        )
        dq[item, :, group] = head.in_sequence(grads.q.mul_(scale), q.shape[1])
        # The head's queries carry the factor scale / ln 2, and so do the gradients that are sums over them.
        for gradient, head_gradient in ((dk, grads.k.mul_(_LN2)), (dv, grads.v)):
            by_head = head_gradient.view(head.heads, -1, head_gradient.shape[-1])
            gradient[item, :, group] = by_head[:, : gradient.shape[1]].transpose(0, 1)
        d_pooled_k[item, :, group] = grads.pooled_k.mul_(_LN2).transpose(0, 1)
        d_pooled_v[item, :, group] = grads.pooled_v.transpose(0, 1)
    return dq, dk, dv, d_pooled_k, d_pooled_v


def _heads(arguments: Arguments) -> Heads:
    """Return the heads of a call, ready to iterate over."""
    q, k, v, key_lengths, scale = arguments.q, arguments.k, arguments.v, arguments.key_lengths, arguments.scale
    return Heads(q, k, v, arguments.mask, arguments.pooled, key_lengths, scale / _LN2)


def _attend(head: Head) -> tuple[Tensor, Tensor]:
    """Compute the output (R, bq, D) and base-2 log-sum-exp (R, bq, 1), with rows in the head's order."""
    out = head.scratch("head out", *head.q.shape)
    total = out.new_zeros(*out.shape[:2], 1)
    lowest = torch.finfo(total.dtype).min  # finite, so that -inf - peak stays -inf
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
        rescale = peak_.sub_(higher).exp2_()  # earlier sums were relative to a lower peak
        total_.mul_(rescale).add_(a.sum(-1, keepdim=True))
        out_.mul_(rescale)
        if piece.blocks is None:
            head.by_head(out_, piece).baddbmm_(head.by_head(a, piece), head.gather_v(piece))
        else:
            out_.baddbmm_(a, head.gather_v(piece))
        peak_.copy_(higher)
    # The largest weight of a query is exactly 1, so a total below 1 means that it has no keys.
    return out.div_(total.clamp(min=1.0)), peak.add_(total.log2())


class _HeadGradients(NamedTuple):
    """Gradients of a `Head`'s tensors, of the same shapes."""

    q: Tensor
    k: Tensor
    v: Tensor
    pooled_k: Tensor
    pooled_v: Tensor


def _attend_backward(head: Head, d_out: Tensor, lse: Tensor, delta: Tensor) -> _HeadGradients:
    """Compute the gradients of a head, or of a group of heads.

    Args:
        head: the head or group.
        d_out: (R, bq, D) in the head's row order, gradient of the output.
        lse: (R, bq, 1), base-2 log-sum-exp.
        delta: (R, bq, 1), `d_out . out - d_lse`.
    """
    grads = _HeadGradients(*(torch.zeros_like(x) for x in (head.q, head.k, head.v, head.pooled_k, head.pooled_v)))
    lse = lse.clamp(min=torch.finfo(lse.dtype).min)
    for piece in head.pieces():
        q, dq, do = head.q[piece.rows], grads.q[piece.rows], d_out[piece.rows]
        a = head.logits(piece).sub_(lse[piece.rows]).exp2_()
        ds = head.scratch("ds", *a.shape)
        if piece.blocks is None:
            group, piece_delta = head.heads_of(piece), head.by_head(delta[piece.rows], piece)
            a, ds, q, dq, do = (head.by_head(x, piece) for x in (a, ds, q, dq, do))
            torch.bmm(do, head.pooled_v[group].mT, out=ds).sub_(piece_delta).mul_(a)
            dq.baddbmm_(ds, head.pooled_k[group])
            grads.pooled_k[group].baddbmm_(ds.mT, q)
            grads.pooled_v[group].baddbmm_(a.mT, do)
        else:
            torch.bmm(do, head.gather_v(piece).mT, out=ds).sub_(delta[piece.rows]).mul_(a)
            dq.baddbmm_(ds, head.gather_k(piece))
            gathered = head.scratch(
                "gathered", len(q), ds.shape[-1], q.shape[-1]
            )  # gradients of the keys, then of the values
            by_block = gathered.view(-1, *head.k.shape[1:])
            torch.bmm(ds.mT, q, out=gathered)
            grads.k.index_add_(0, piece.blocks, by_block)
            torch.bmm(a.mT, do, out=gathered)
            grads.v.index_add_(0, piece.blocks, by_block)
    return grads


_attention = register("block_sparse_cpu", _forward, _backward)
