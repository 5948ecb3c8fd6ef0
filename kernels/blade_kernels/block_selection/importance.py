"""Importance of each key block for each query block."""

from __future__ import annotations

import torch
from torch import Tensor

from blade_kernels.block_selection import triton_launch, triton_statistics_launch
from blade_kernels.block_selection.naive import (
    naive_largest_key_offsets,
    naive_sampled_importance,
    naive_value_spread,
)
from blade_kernels.implementations import choose_implementation
from blade_kernels.scratch import Scratch

STATISTICS = ("max", "mean", "rms", "residual")
"""Statistics of the weights between sampled tokens."""

_CHUNK_ELEMENTS = 2**19  # logits in memory at a time


def sampled_importance(
    q: Tensor,
    k: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    block_size: tuple[int, int] = (64, 64),
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
    softmax_denominator: bool = True,
    statistic: str = "max",
    implementation: str = "auto",
) -> Tensor:
    """Score each pair of blocks by the attention weights between their sampled tokens.

    The sampled queries attend to the sampled keys only, with one softmax over all of them; the score of a pair of
    blocks is a statistic of its part of that matrix. In a block with fewer tokens the offsets are scaled to its
    length, and a key sampled twice counts once. Tokens past the end are never read.

    Args:
        q: (B, S, H, D) queries; consecutive tokens form the blocks.
        k: (B, T, H, D) keys.
        query_offsets: integers that broadcast to (B, H, samples): distinct offsets within a query block, from 0 to
            its size - 1, shared by all blocks.
        key_offsets: likewise for key blocks; the number of samples may differ. Or (B, H, key blocks, samples), places
            in each block, in ascending order and below its length, as `largest_key_offsets` finds them; a block with
            fewer tokens than samples repeats a place, which counts once.
        block_size: tokens in a (query block, key block).
        scale: factor of the logits. None means 1 / sqrt(D).
        key_lengths: (B,) integers, number of valid keys; the rest are ignored. Blocks without valid keys score 0.
        softmax_denominator: divide by the sum of the softmax, as in the paper. Without it, as in the paper's code,
            each sampled query gives its best key a score of 1, however flat its distribution.
        statistic: "max", the largest weight, as in the paper; or, of the weight that each query gives to all sampled
            keys of the block together, the "mean" or the root mean square, "rms", over the queries; or "residual", the
            root mean square over the queries of what the mean of the block's keys gets wrong: the Euclidean norm of
            the differences between the weights of the sampled keys and the weight that their mean would get.
        implementation: "triton"; "cpu", plain PyTorch on any device; "naive", the specification; "auto" picks Triton
            on CUDA where possible, else "cpu". "reference" is an alias of "cpu".

    Returns:
        (B, H, query blocks, key blocks) in float32 (float64 for float64 inputs), not negative. Not differentiable.

    Raises:
        ValueError: inconsistent shapes, or an unknown statistic or implementation.
        NotImplementedError: the requested implementation cannot compute this.

    Source: BLADE, arXiv 2508.10774, P = MaxPool(softmax(Qs Ks^T / sqrt(d))).
    """
    _check(q, k, block_size, key_lengths)
    by_block = (q.shape[0], q.shape[2], -(-k.shape[1] // block_size[1]))
    for name, offsets in (("query_offsets", query_offsets), ("key_offsets", key_offsets)):
        if name == "key_offsets" and offsets.shape[:-1] == by_block and offsets.shape[-1]:
            continue
        if offsets.is_floating_point() or not 1 <= offsets.ndim <= 3 or not offsets.shape[-1]:
            raise ValueError(
                f"`{name}` must be integers that broadcast to ({q.shape[0]}, {q.shape[2]}, samples), "
                f"got {offsets.dtype} of shape {tuple(offsets.shape)}."
            )
    if statistic not in STATISTICS:
        raise ValueError(f"`statistic` must be one of {', '.join(STATISTICS)}, got {statistic!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    problem = triton_launch.scoring_unsupported(q, k, query_offsets.shape[-1], key_offsets.shape[-1])
    chosen = choose_implementation(implementation, q.device, problem)
    with torch.no_grad():
        if chosen == "triton":
            found: Tensor = triton_launch.sampled_importance(
                q, k, query_offsets, key_offsets, list(block_size), scale, key_lengths, softmax_denominator, statistic
            )
            return found
        if chosen == "naive":
            return naive_sampled_importance(
                q, k, query_offsets, key_offsets, block_size, scale, key_lengths, softmax_denominator, statistic
            )
        qs, _ = _sample(q, query_offsets, block_size[0], None, blocks_first=True)
        # The first samples of all blocks, then the second ones, and so on: maxima over samples vectorise over blocks.
        ks, absent = _sample(k, key_offsets, block_size[1], key_lengths, blocks_first=False)
        qs = qs * scale
        batch, heads, query_blocks, query_samples, _ = qs.shape
        key_samples, key_blocks = ks.shape[2:4]
        qs, ks = qs.flatten(0, 1), ks.flatten(0, 1).flatten(1, 2)  # (B * H, keys, D)
        absent = None if absent is None else absent.flatten(0, 1).mT.unsqueeze(1)  # (B * H, 1, samples, blocks)
        mean_keys = _sample_means(ks, key_blocks, absent) if statistic == "residual" else None

        importance = qs.new_empty(batch * heads, query_blocks, key_blocks)
        row_logits = query_samples * ks.shape[1]
        heads_at_once = max(1, _CHUNK_ELEMENTS // (query_blocks * row_logits))
        blocks_at_once = max(1, _CHUNK_ELEMENTS // row_logits)
        scratch = Scratch(qs.dtype, qs.device)
        for head in range(0, batch * heads, heads_at_once):
            head_slice = slice(head, head + heads_at_once)
            for block in range(0, query_blocks, blocks_at_once):
                rows = slice(block, block + blocks_at_once)
                sampled = qs[head_slice, rows].flatten(1, 2)
                logits = scratch("importance logits", *sampled.shape[:2], ks.shape[1])
                torch.bmm(sampled, ks[head_slice].mT, out=logits)
                logits = logits.view(*logits.shape[:2], key_samples, key_blocks)
                if absent is not None:
                    logits[..., key_blocks - absent.shape[-1] :].masked_fill_(absent[head_slice], -torch.inf)
                if mean_keys is None:
                    scores = _block_scores(logits, query_samples, softmax_denominator, statistic)
                else:
                    mean_logits = sampled @ mean_keys[head_slice].mT
                    hidden = None if absent is None else absent[head_slice]
                    squares = _squared_residuals(logits, mean_logits, hidden, softmax_denominator)
                    scores = torch.unflatten(squares, 1, (-1, query_samples)).mean(2).sqrt()
                importance[head_slice, rows] = scores
        return importance.view(batch, heads, query_blocks, key_blocks)


def mean_pooled_importance(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int] = (64, 64),
    *,
    scale: float | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Score each pair of blocks by the attention weight between its mean query and its mean key.

    Args:
        q: (B, S, H, D) queries; consecutive tokens form the blocks.
        k: (B, T, H, D) keys.
        block_size: tokens in a (query block, key block). Means are over the real tokens of a block.
        scale: factor of the logits. None means 1 / sqrt(D).
        key_lengths: (B,) integers, number of valid keys; the rest are ignored. Blocks without valid keys score 0.

    Returns:
        (B, H, query blocks, key blocks) in float32 (float64 for float64 inputs); rows sum to 1. Not differentiable.

    Raises:
        ValueError: inconsistent shapes.
    """
    _check(q, k, block_size, key_lengths)
    with torch.no_grad():
        mean_q, _ = _block_means(q, block_size[0], None)
        mean_k, key_counts = _block_means(k, block_size[1], key_lengths)
        logits = (mean_q @ mean_k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return logits.masked_fill((key_counts == 0)[:, None, None], -torch.inf).softmax(-1).nan_to_num(0.0)


def largest_key_offsets(
    k: Tensor,
    offsets: Tensor,
    largest: int,
    block_size: int = 64,
    *,
    key_lengths: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Choose the keys of each block to sample: those furthest from the mean of all keys, and others as drawn.

    A few keys of large norm (sinks) can take much of the attention of every query; a sample that is only drawn misses
    most of them.

    Args:
        k: (B, T, H, D) keys; consecutive tokens form the blocks.
        offsets: integers that broadcast to (B, H, samples): distinct offsets in a block of `block_size`; those that
            come first are taken first.
        largest: samples of a block that are those furthest from the mean, at most as many as `offsets` has.
        block_size: tokens in a block.
        key_lengths: (B,) integers, number of valid keys; the rest are ignored.
        implementation: see `sampled_importance`. They differ in the order of float32 sums, and thus may take either
            of two keys whose distances from the mean differ by no more than that rounds.

    Returns:
        (B, H, blocks, samples) int32, ascending places in each block; a block of fewer tokens repeats one of them.

    Raises:
        ValueError: `largest` is out of range, or an unknown implementation.
        NotImplementedError: the requested implementation cannot compute this.
    """
    batch, tokens, heads, _ = k.shape
    samples = offsets.shape[-1]
    if not 0 <= largest <= samples:
        raise ValueError(f"`largest` must be from 0 to the {samples} offsets of a block, got {largest}.")
    problem = triton_statistics_launch.statistics_unsupported(k, block_size)
    chosen = choose_implementation(implementation, k.device, problem)
    with torch.no_grad():
        if chosen == "triton":
            found: Tensor = triton_statistics_launch.largest_key_offsets(k, offsets, largest, block_size, key_lengths)
            return found
        if chosen == "naive":
            return naive_largest_key_offsets(k, offsets, largest, block_size, key_lengths)
        means, counts = _block_means(k, block_size, key_lengths)
        weights = counts.to(means.dtype)[:, None, :, None]
        centre = (means * weights).sum(2) / weights.sum(2).clamp(min=1)  # (B, H, D)
        norms = torch.linalg.vector_norm(k, dim=-1, dtype=means.dtype).square()
        inner = (k * centre.to(k.dtype).unsqueeze(1)).sum(-1, dtype=means.dtype)
        distances = (norms - 2 * inner).transpose(1, 2)  # (B, H, T), less what is the same for all keys
        distances = torch.nn.functional.pad(distances, (0, -tokens % block_size), value=-torch.inf)
        distances = distances.unflatten(-1, (-1, block_size))
        present = torch.arange(block_size, device=k.device) < counts[:, None, :, None]
        # tokens that were not drawn come last, for short blocks
        priority = torch.arange(block_size, 0, -1, device=k.device, dtype=torch.int32).repeat(batch, heads, 1)
        rank = torch.arange(block_size + samples, block_size, -1, device=k.device, dtype=torch.int32)
        priority.scatter_(-1, offsets.long().expand(batch, heads, -1), rank.expand(batch, heads, -1))
        priority = priority.unsqueeze(2).expand_as(distances).clone()
        if largest:
            furthest = distances.masked_fill(~present, -torch.inf).topk(largest).indices
            priority.scatter_(-1, furthest, block_size + samples + 1)
        best = priority.masked_fill_(~present, -1).topk(samples)
        first = best.indices[..., :1] * (counts > 0)[:, None, :, None]
        return best.indices.where(best.values >= 0, first).sort(-1).values.to(torch.int32)


def value_spread(
    v: Tensor, block_size: int = 64, *, key_lengths: Tensor | None = None, implementation: str = "auto"
) -> Tensor:
    """Return how far the values of each block are from the mean of all values, as a root mean square.

    Args:
        v: (B, T, H, D) values; consecutive tokens form the blocks.
        block_size: tokens in a block.
        key_lengths: (B,) integers, number of valid tokens; the rest are ignored.
        implementation: see `sampled_importance`.

    Returns:
        (B, H, blocks) in float32 (float64 for float64 values), 0 for a block without tokens. Not differentiable.

    Raises:
        ValueError: an unknown implementation.
        NotImplementedError: the requested implementation cannot compute this.
    """
    problem = triton_statistics_launch.statistics_unsupported(v, block_size)
    chosen = choose_implementation(implementation, v.device, problem)
    with torch.no_grad():
        if chosen == "triton":
            spread: Tensor = triton_statistics_launch.value_spread(v, block_size, key_lengths)
            return spread
        if chosen == "naive":
            return naive_value_spread(v, block_size, key_lengths)
        means, counts = _block_means(v, block_size, key_lengths)  # (B, H, blocks, D), (B or 1, blocks)
        counts = counts.unsqueeze(1)
        norms = torch.linalg.vector_norm(v, dim=-1, dtype=means.dtype).unsqueeze(-1)
        squares, _ = _block_means(norms.square(), block_size, key_lengths)
        centre = (means * counts.unsqueeze(-1)).sum(2, keepdim=True) / counts.sum(-1)[..., None, None].clamp(min=1)
        distances = squares.squeeze(-1) - 2 * (means * centre).sum(-1) + centre.square().sum(-1)
        return distances.clamp(min=0).sqrt() * (counts > 0)


def _block_scores(logits: Tensor, query_samples: int, softmax_denominator: bool, statistic: str) -> Tensor:
    """Reduce logits (n, QB * samples, samples, KB), in place, to a statistic of softmax weights (n, QB, KB)."""
    query_blocks = (-1, query_samples)
    if statistic != "max":
        if softmax_denominator:
            flat = logits.flatten(-2)
            torch.softmax(flat, -1, out=flat)
        else:
            peak = logits.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(logits.dtype).min)
            logits.sub_(peak).exp_()
        mass = torch.unflatten(logits.sum(-2), 1, query_blocks).nan_to_num_(0.0)
        return mass.mean(2) if statistic == "mean" else mass.square().mean(2).sqrt()
    if softmax_denominator:
        flat = logits.flatten(-2)
        torch.softmax(flat, -1, out=flat)  # one pass over cached data; nan where every key is absent
        return torch.unflatten(logits, 1, query_blocks).amax(2).amax(2).nan_to_num_(0.0)
    best = logits.amax(-2)
    peak = best.amax(-1, keepdim=True).clamp(min=torch.finfo(best.dtype).min)  # finite where every key is absent
    return torch.unflatten((best - peak).exp_(), 1, query_blocks).amax(2)


def _sample_means(ks: Tensor, blocks: int, absent: Tensor | None) -> Tensor:
    """Average the sampled keys of each block: (n, blocks, D), of keys (n, samples * blocks, D)."""
    ks = ks.unflatten(1, (-1, blocks))
    means = ks.mean(1)
    if absent is not None:
        first, absent = blocks - absent.shape[-1], absent.squeeze(1).unsqueeze(-1)  # (n, samples, blocks, 1)
        sums = ks[:, :, first:].masked_fill(absent, 0.0).sum(1)
        means[:, first:] = sums / (~absent).sum(1).clamp(min=1)
    return means


def _squared_residuals(
    logits: Tensor, mean_logits: Tensor, absent: Tensor | None, softmax_denominator: bool
) -> Tensor:
    """Sum over a block's samples the squared difference of weight and weight of their mean key.

    Args:
        logits: (n, queries, samples, KB), overwritten; -inf for a sample that is absent.
        mean_logits: (n, queries, KB), of the mean keys.
        absent: (n, 1, samples, blocks) bool, of the last blocks; None if none is.
        softmax_denominator: see `sampled_importance`.

    Returns:
        (n, queries, KB).
    """
    peak = logits.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(logits.dtype).min)  # finite where all are absent
    weights = logits.sub_(peak).exp_()
    total = weights.sum((-2, -1)).clamp(min=1.0).unsqueeze(-1) if softmax_denominator else 1.0
    differences = weights.sub_((mean_logits - peak.squeeze(-2)).exp_().unsqueeze(-2))
    if absent is not None:
        differences[..., differences.shape[-1] - absent.shape[-1] :].masked_fill_(absent, 0.0)
    return differences.square_().sum(-2).div_(total * total)


def _sample(
    x: Tensor, offsets: Tensor, size: int, lengths: Tensor | None, *, blocks_first: bool
) -> tuple[Tensor, Tensor | None]:
    """Gather the sampled tokens of every block of (B, T, H, D).

    Returns:
        (B, H, blocks, samples, D) if `blocks_first`, else (B, H, samples, blocks, D), in float32 or wider; and
        (B, H, blocks, samples) bool, samples that are past the end or duplicates, for the last block only if `lengths`
        is None, or None if every sample is a distinct token.
    """
    batch, tokens, heads, width = x.shape
    by_block = offsets.ndim == 4
    whole = lengths is None and tokens % size == 0
    within = offsets.long() if by_block else offsets.long().expand(batch, heads, -1).unsqueeze(2)
    if not whole:  # (B, H, 1 or blocks, samples)
        counts = _token_counts(tokens, size, x.device, lengths)  # (B or 1, blocks)
    if not whole and not by_block:
        within = within.sort(-1).values * counts[:, None, :, None] // size
    blocks = -(-tokens // size)
    # Row indices into (B * T * H, D).
    rows = within * heads + torch.arange(heads, device=x.device).view(-1, 1, 1)
    rows = rows + torch.arange(0, blocks * size * heads, size * heads, device=x.device).view(-1, 1)
    if batch > 1:
        rows = rows + torch.arange(0, batch * tokens * heads, tokens * heads, device=x.device).view(-1, 1, 1, 1)
    rows = rows if blocks_first else rows.mT
    dtype = torch.promote_types(x.dtype, torch.float32)
    picked = x.reshape(-1, width).index_select(0, rows.flatten()).to(dtype).view(*rows.shape, width)
    if whole:
        return picked, None
    first = 0 if lengths is not None else blocks - 1
    within = within.expand(-1, -1, blocks, -1)[:, :, first:]
    repeated = torch.zeros_like(within, dtype=torch.bool)
    repeated[..., 1:] = within[..., 1:] == within[..., :-1]
    return picked, repeated | (counts[:, None, first:, None] == 0)


def _block_means(x: Tensor, size: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average the real tokens of each block of (B, T, H, D).

    Returns:
        (B, H, blocks, D) in float32 or wider, zeros for a block without tokens; and (B or 1, blocks), the number of
        tokens in each.
    """
    tokens = x.shape[1]
    counts = _token_counts(tokens, size, x.device, lengths)
    if lengths is not None:
        absent = torch.arange(tokens, device=x.device) >= lengths.to(x.device).unsqueeze(-1)
        x = x.masked_fill(absent[:, :, None, None], 0.0)
    if tokens % size:
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -tokens % size))
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.unflatten(1, (-1, size)).sum(2, dtype=dtype)
    return (sums / counts.clamp(min=1)[:, :, None, None]).transpose(1, 2), counts


def _token_counts(tokens: int, size: int, device: torch.device, lengths: Tensor | None) -> Tensor:
    """Count the real tokens in each block: (B or 1, blocks) int64."""
    starts = torch.arange(-(-tokens // size), device=device) * size
    if lengths is None:
        return (tokens - starts).clamp(max=size).unsqueeze(0)
    return (lengths.to(device).clamp(0, tokens).unsqueeze(-1) - starts).clamp(0, size)


def _check(q: Tensor, k: Tensor, block_size: tuple[int, int], key_lengths: Tensor | None) -> None:
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"`q` must be (batch, tokens, heads, head size), none of them 0, got {tuple(q.shape)}.")
    batch, _, heads, size = q.shape
    if k.ndim != 4 or k.shape[:1] + k.shape[2:] != (batch, heads, size) or not k.shape[1]:
        raise ValueError(f"`k` must be ({batch}, tokens, {heads}, {size}) to match `q`, got {tuple(k.shape)}.")
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"`block_size` must be two positive numbers of tokens, got {block_size!r}.")
    if key_lengths is not None and key_lengths.shape != (batch,):
        raise ValueError(f"`key_lengths` must be of shape ({batch},), got {tuple(key_lengths.shape)}.")
