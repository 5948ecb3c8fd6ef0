"""Specification of block selection: scores from all attention weights, selection row by row."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def naive_sampled_importance(
    q: Tensor,
    k: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    block_size: tuple[int, int],
    scale: float,
    key_lengths: Tensor | None,
    softmax_denominator: bool,
    statistic: str,
) -> Tensor:
    """Score every pair of blocks by the attention weights between its sampled tokens, from all S * T weights.

    Returns:
        (B, H, query blocks, key blocks) in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries = _sampled(q, query_offsets, block_size[0], None)  # (B, H, S)
    keys = _sampled(k, key_offsets, block_size[1], key_lengths)  # (B, H, T)
    q, k = (x.to(dtype).transpose(1, 2) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False):
        logits = (q @ k.mT * scale).masked_fill((keys == 0).unsqueeze(2), -torch.inf)
    base = logits.logsumexp(-1, keepdim=True) if softmax_denominator else logits.amax(-1, keepdim=True)
    weights = (logits - base.masked_fill(base == -torch.inf, 0.0)).exp()  # -inf - -inf would be NaN
    weights = weights.masked_fill((queries == 0).unsqueeze(-1), 0.0)
    missing = (-weights.shape[2] % block_size[0], -weights.shape[3] % block_size[1])
    whole = torch.nn.functional.pad(weights, (0, missing[1], 0, missing[0]))
    by_block = torch.unflatten(torch.unflatten(whole, 3, (-1, block_size[1])), 2, (-1, block_size[0]))
    if statistic == "max":
        return by_block.amax((3, 5))
    drawn = torch.nn.functional.pad(queries, (0, missing[0])).unflatten(-1, (-1, block_size[0])).unsqueeze(-1)
    if statistic == "residual":
        sampled = torch.nn.functional.pad(keys, (0, missing[1])).unflatten(-1, (-1, block_size[1])) > 0
        sampled = sampled[:, :, None, None]  # (B, H, 1, 1, key blocks, keys)
        padded = torch.nn.functional.pad(logits - base, (0, missing[1], 0, missing[0]))
        blocked = torch.unflatten(torch.unflatten(padded, 3, (-1, block_size[1])), 2, (-1, block_size[0]))
        mean_logit = blocked.where(sampled, 0.0).sum(5) / sampled.sum(5).clamp(min=1)
        differences = (by_block - mean_logit.exp().unsqueeze(5)).where(sampled, 0.0)
        squares = differences.square().sum(5) * drawn
        residual: Tensor = (squares.sum(3) / query_offsets.shape[-1]).sqrt()
        return residual
    mass = by_block.sum(5)  # of every query in every key block
    power = 1 if statistic == "mean" else 2
    mean: Tensor = (mass.pow(power) * drawn).sum(3) / query_offsets.shape[-1]
    return mean if statistic == "mean" else mean.sqrt()


def _sampled(x: Tensor, offsets: Tensor, size: int, lengths: Tensor | None) -> Tensor:
    """Count how often each token of (B, tokens, H, D) is sampled: (B, H, tokens) int64."""
    batch, tokens, heads, _ = x.shape
    sampled = torch.zeros(batch, heads, tokens, dtype=torch.int64, device=x.device)
    by_block = offsets.ndim == 4
    offsets = offsets.long() if by_block else offsets.long().expand(batch, heads, -1)
    for item in range(batch):
        length = tokens if lengths is None else min(int(lengths[item]), tokens)
        for start in range(0, length, size):
            block_tokens = min(size, length - start)  # in a short block the offsets are scaled to its length
            places = offsets[item, :, start // size] if by_block else offsets[item] * block_tokens // size
            places = start + places
            sampled[item].scatter_add_(-1, places, torch.ones_like(places))
    return sampled


def naive_largest_key_offsets(
    k: Tensor, offsets: Tensor, largest: int, block_size: int, key_lengths: Tensor | None
) -> Tensor:
    """Choose the keys of every block to sample, one block after another, as `largest_key_offsets` describes.

    Returns:
        (B, H, blocks, samples) int32.
    """
    batch, tokens, heads, _ = k.shape
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    drawn = offsets.long().expand(batch, heads, -1).tolist()
    samples, blocks = offsets.shape[-1], -(-tokens // block_size)
    places = torch.zeros(batch, heads, blocks, samples, dtype=torch.int32)
    for item, head, block in itertools.product(range(batch), range(heads), range(blocks)):
        length = tokens if key_lengths is None else min(int(key_lengths[item]), tokens)
        keys, start = k[item, :length, head], block * block_size
        if start < length:
            distance = (keys[start : start + block_size] - keys.mean(0)).square().sum(-1).tolist()
            furthest = sorted(range(len(distance)), key=lambda place: (-distance[place], place))[:largest]
            ranking = dict.fromkeys([*furthest, *drawn[item][head], *range(len(distance))])
            chosen = sorted([place for place in ranking if place < len(distance)][:samples])
            places[item, head, block] = torch.tensor(chosen + chosen[-1:] * (samples - len(chosen)))
    return places.to(k.device)


def naive_value_spread(v: Tensor, block_size: int, key_lengths: Tensor | None) -> Tensor:
    """Compute how far the values of each block are from the mean of all, as `value_spread` describes.

    Returns:
        (B, H, blocks) in float32 (float64 for float64 values).
    """
    batch, tokens, heads, _ = v.shape
    v = v.to(torch.promote_types(v.dtype, torch.float32))
    spread = v.new_zeros(batch, heads, -(-tokens // block_size))
    for item in range(batch):
        length = tokens if key_lengths is None else min(int(key_lengths[item]), tokens)
        if length > 0:
            values = v[item, :length]  # (tokens, H, D)
            squares = (values - values.mean(0)).square().sum(-1)
            blocks = [block.mean(0).sqrt() for block in squares.split(block_size)]
            spread[item, :, : len(blocks)] = torch.stack(blocks, -1)
    return spread


def naive_selection(
    importance: Tensor,
    block_size: tuple[int, int],
    max_blocks: int,
    extra_blocks: int,
    min_blocks: int,
    cumulative_mass: float | None,
    forced_key_blocks: Tensor | None,
    forced_query_blocks: Tensor | None,
    local_radius: int | None,
) -> Tensor:
    """Rank the key blocks of every row and keep the leading ones, as `select_blocks` describes.

    Returns:
        (B or 1, H or 1, query blocks, key blocks) bool.
    """
    *rows, key_blocks = importance.shape
    query_blocks = rows[-1]
    keep = torch.zeros(importance.shape, dtype=torch.bool)
    for row in itertools.product(*map(range, rows)):
        score, first = importance[row].float().tolist(), row[-1] * block_size[0]
        forced = [False] * key_blocks if forced_key_blocks is None else forced_key_blocks.tolist()
        if local_radius is not None:
            last = first + block_size[0] - 1
            nearest = first // block_size[1] - local_radius, last // block_size[1] + local_radius
            forced = [flag or nearest[0] <= block <= nearest[1] for block, flag in enumerate(forced)]
        ranking = sorted(range(key_blocks), key=lambda block: (not forced[block], -score[block], block))
        extra = (row[-1] + 1) * extra_blocks // query_blocks - row[-1] * extra_blocks // query_blocks
        count = most = min(max_blocks + extra, key_blocks)
        if cumulative_mass is not None:
            mass = list(itertools.accumulate(score[block] for block in ranking))
            count = 1 + sum(partial < cumulative_mass * mass[-1] for partial in mass)  # and the block that reaches it
        count = max(min(max(count, min_blocks), most), sum(forced))
        if forced_query_blocks is not None and forced_query_blocks[row[-1]]:
            count = key_blocks
        keep[row][ranking[:count]] = True
    return keep.to(importance.device)


def naive_selection_over_heads(
    importance: Tensor,
    max_blocks: int,
    extra_blocks: int,
    min_blocks: int,
    forced: Tensor | None,
    forced_query_blocks: Tensor | None,
) -> Tensor:
    """Rank the key blocks of all rows of all heads, as `select_blocks` describes with a budget for the layer.

    Args:
        importance: (B or 1, H or 1, query blocks, key blocks).
        max_blocks: key blocks in a row on average.
        extra_blocks: rows with one more.
        min_blocks: leading blocks that every row keeps.
        forced: bool that broadcasts to (query blocks, key blocks), or None.
        forced_query_blocks: (query blocks,) bool, or None.

    Returns:
        Bool of the shape of `importance`.
    """
    batch, heads, query_blocks, key_blocks = importance.shape
    whole = [False] * query_blocks if forced_query_blocks is None else forced_query_blocks.tolist()
    none = torch.zeros(query_blocks, key_blocks, dtype=torch.bool)
    certain = (none if forced is None else none | forced.cpu()).tolist()
    rows = [row for row in range(query_blocks) if not whole[row]]
    extra = {row: (row + 1) * extra_blocks // query_blocks - row * extra_blocks // query_blocks for row in rows}
    total = heads * sum(max_blocks + extra[row] for row in rows)
    keep = torch.zeros(importance.shape, dtype=torch.bool)
    keep[:, :, whole] = True
    for item in range(batch):
        ranking = []
        for head, row in itertools.product(range(heads), rows):
            score = importance[item, head, row].tolist()
            best = sorted(range(key_blocks), key=lambda block: (not certain[row][block], -score[block], block))
            first = {*best[:min_blocks], *(block for block in range(key_blocks) if certain[row][block])}
            keep[item, head, row, list(first)] = True
            ranking += [(-score[block], head, row, block) for block in range(key_blocks) if block not in first]
        free = total - int(keep[item][:, rows].sum())
        for _, head, row, block in sorted(ranking)[: max(free, 0)]:
            keep[item, head, row, block] = True
    return keep.to(importance.device)
