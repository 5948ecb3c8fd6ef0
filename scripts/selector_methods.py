"""Ways to choose what sparse attention computes, published by others and our own, at a given budget.

All but ours are re-implemented here from their papers, in plain PyTorch, with what they need and no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attention_heads import Heads
from blade_kernels.block_selection import largest_key_offsets, sampled_importance, select_blocks, value_spread
from torch import Tensor


@dataclass(frozen=True)
class Method:
    """A way to choose."""

    name: str
    """As the table names it."""
    choose: Callable[[Heads, float], Tensor]
    """Returns the pairs that are kept, (H, compared, S) bool, for a number of pairs per query."""
    operations: Callable[[Heads], float]
    """Counts the floating-point operations of choosing, of the matrix products, for one head."""
    pooled: bool = False
    """Put the means of dropped blocks beside what is kept; the choice then pays for them."""
    is_oracle: bool = False
    """True if it looks at all of attention."""
    second_order: bool = False
    """See `Heads.attend`; makes it an oracle."""


def whole_blocks(heads: Heads, pairs: float, pooled: bool) -> float:
    """Return the number of blocks, perhaps not whole, that a row can keep for so many pairs per query."""
    if pooled:
        pairs, block = pairs - heads.blocks, heads.block - 1
    else:
        block = heads.block
    return min(max(pairs / block, 1.0), float(heads.blocks))


def by_rank(heads: Heads, scores: Tensor, pairs: float, *, pooled: bool = False, layer: bool = False) -> Tensor:
    """Keep the blocks of the largest scores, (H, blocks or compared rows, blocks), in each row or of all together."""
    kept = whole_blocks(heads, pairs, pooled)
    fraction = math.floor((kept - math.floor(kept)) * scores.shape[1])
    mask = select_blocks(
        scores[None].float(),
        (heads.block, heads.block),
        max_blocks=math.floor(kept),
        extra_blocks=fraction,
        budget="layer" if layer else "row",
    )
    return expand(heads, mask.keep[0])


def expand(heads: Heads, keep: Tensor) -> Tensor:
    """Mark the pairs of the compared tokens in kept blocks, (H, blocks or compared rows, blocks)."""
    rows = heads.block_of[heads.compared]
    if keep.shape[1] < heads.blocks:
        rows = torch.searchsorted(heads.rows, rows)
    return keep[:, rows][..., heads.block_of]


def by_threshold(
    heads: Heads, choose: Callable[[float], Tensor], pairs: float, low: float, high: float, rounds: int = 24
) -> Tensor:
    """Keep what a threshold keeps, the one by bisection at which a query has so many pairs on average.

    Args:
        heads: the heads.
        choose: returns the blocks that a threshold keeps, (H, blocks or compared rows, blocks) bool, fewer the higher
            it is.
        pairs: pairs per query.
        low: a threshold that keeps too much.
        high: one that keeps no more than may be.
        rounds: halvings.
    """
    best = choose(high)
    for _ in range(rounds):
        middle = (low + high) / 2
        keep = choose(middle)
        if float((keep * heads.sizes).sum(-1, dtype=torch.float32).mean()) <= pairs:
            best, high = keep, middle
        else:
            low = middle
    return expand(heads, best)


def sampled_scores(
    heads: Heads, statistic: str, *, share: int = 2, values: bool = False, largest: bool = False, seed: int = 0
) -> Tensor:
    """Score the blocks by the attention of sampled tokens."""
    generator = torch.Generator().manual_seed(seed)
    samples = probe_tokens(heads, share)
    of_queries, of_keys = torch.rand(2, heads.q.shape[0], heads.block, generator=generator).argsort(-1)[..., :samples]
    q, k = (x.transpose(0, 1)[None] for x in (heads.q, heads.k))
    if largest:
        of_keys = largest_key_offsets(k, of_keys, samples // 2, heads.block)
    scores = sampled_importance(q, k, of_queries, of_keys, (heads.block, heads.block), statistic=statistic)[0]
    if values:
        scores = scores * value_spread(heads.v.transpose(0, 1)[None], heads.block)[0].unsqueeze(1)
    return scores


def probe_tokens(heads: Heads, share: int) -> int:
    """Return the tokens of a block that are sampled: a share of it, or the paper's 16 if that is fewer."""
    return min(heads.block, 32) // share


def _sampled(
    name: str, statistic: str, *, ours: bool = False, pooled: bool = True, layer: bool = False, share: int = 2
) -> Method:
    def choose(heads: Heads, pairs: float) -> Tensor:
        scores = sampled_scores(heads, statistic, share=share, values=ours, largest=ours)
        return by_rank(heads, scores, pairs, pooled=pooled, layer=layer)

    def operations(heads: Heads) -> float:
        return 2.0 * heads.size * (heads.blocks * probe_tokens(heads, share)) ** 2

    return Method(name, choose, operations, pooled)


def mean_logits(heads: Heads) -> Tensor:
    """Return the logits of the blocks' mean queries and mean keys: (H, blocks, blocks)."""
    return heads.means(heads.q) @ heads.means(heads.k).mT / math.sqrt(heads.size)


def mean_operations(heads: Heads) -> float:
    """Count the operations of `mean_logits`, for one head."""
    return 2.0 * heads.size * heads.blocks**2


def mean_pooling(heads: Heads, pairs: float) -> Tensor:
    """Keep the blocks of the largest attention between means."""
    return by_rank(heads, mean_logits(heads).softmax(-1), pairs)


def sub_block_means(heads: Heads, pairs: float, parts: int = 4) -> Tensor:
    """Score blocks by the means of their parts: the logarithm of the summed exponentials of all pairs of parts."""
    part = heads.block // parts
    finer = Heads(heads.q, heads.k, heads.v, part, torch.arange(-(-heads.tokens // part)))
    logits = mean_logits(finer)
    missing = -logits.shape[-1] % parts
    logits = torch.nn.functional.pad(logits, (0, missing, 0, missing), value=-torch.inf)
    whole = logits.unflatten(2, (-1, parts)).unflatten(1, (-1, parts))  # (H, blocks, parts, blocks, parts)
    return by_rank(heads, whole.logsumexp((2, 4)).softmax(-1), pairs, pooled=True, layer=True)


def antidiagonals(heads: Heads, pairs: float, stride: int = 8) -> Tensor:
    """Score blocks by sums along antidiagonals. Source: XAttention, arXiv 2503.16428."""
    tokens = -(-heads.tokens // heads.block) * heads.block
    q, k = (torch.nn.functional.pad(x, (0, 0, 0, tokens - heads.tokens)) for x in (heads.q, heads.k))
    # token i of a stride of queries meets token stride - 1 - i of one of keys
    q = q.unflatten(1, (-1, stride)).flip(2).flatten(2)
    k = k.unflatten(1, (-1, stride)).flatten(2)
    weights = (q @ k.mT / math.sqrt(heads.size) / stride).softmax(-1)
    per_block = heads.block // stride
    scores = weights.unflatten(2, (-1, per_block)).sum(-1).unflatten(1, (-1, per_block)).sum(2)
    return by_rank(heads, scores, pairs)


def self_similarity(x: Tensor, heads: Heads) -> Tensor:
    """Return the mean cosine similarity of the tokens of each block: (H, blocks)."""
    unit = torch.nn.functional.normalize(x, dim=-1)
    return heads.means(unit).square().sum(-1)


def guarded_mean_pooling(heads: Heads, pairs: float, least: float = 0.3) -> Tensor:
    """Keep blocks whose keys are unlike each other, then by means. Source: SpargeAttn, arXiv 2502.18137.

    Of the blocks of unlike keys, at most half the budget's, those of the largest norm are kept by every row.
    """
    weights = mean_logits(heads).softmax(-1)
    unlike = self_similarity(heads.k, heads) < least
    most = int(whole_blocks(heads, pairs, False) / 2)
    norms = heads.means(heads.k.norm(dim=-1, keepdim=True)).squeeze(-1).masked_fill(~unlike, -1.0)
    guarded = torch.zeros_like(unlike).scatter_(-1, norms.topk(most).indices, True) & unlike
    return by_rank(heads, weights + 2.0 * guarded.unsqueeze(1), pairs)


def cumulative_mass(heads: Heads, pairs: float) -> Tensor:
    """Keep the blocks of a row until they hold a share of its mass. Source: NABLA, arXiv 2507.13546."""
    weights = mean_logits(heads).softmax(-1)
    order = weights.argsort(dim=-1, descending=True)
    before = weights.gather(-1, order).cumsum(-1) - weights.gather(-1, order)
    before = torch.empty_like(before).scatter_(-1, order, before)  # the mass of the blocks that are better
    return by_threshold(heads, lambda threshold: before <= 1 - threshold, pairs, 0.0, 1.0)


def mean_and_deviation(heads: Heads, pairs: float) -> Tensor:
    """Keep logits of means above mean + tau deviations of their row. Source: Sol-Attn, arXiv 2607.24027."""
    logits = mean_logits(heads)
    standard = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
    best = standard == standard.amax(-1, keepdim=True)
    blocks = whole_blocks(heads, pairs, True) * heads.block
    return by_threshold(heads, lambda tau: best | (standard > tau), blocks, -10.0, 10.0)


def clusters(x: Tensor, count: int, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """Cluster (S, D) by k-means: the cluster of each token, and the centres."""
    centres = x[torch.linspace(0, len(x) - 1, count).long()].clone()
    labels = torch.zeros(len(x), dtype=torch.int64)
    for _ in range(rounds):
        labels = torch.cdist(x, centres).argmin(-1)
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=count)
        centres = torch.where(counts.unsqueeze(-1) > 0, sums / counts.clamp(min=1).unsqueeze(-1), centres)
    return labels, centres


def semantic_clusters(heads: Heads, pairs: float, rounds: int = 10) -> Tensor:
    """Cluster queries and keys, and keep pairs of clusters. Source: Sparse VideoGen2, arXiv 2505.18875.

    As many clusters as blocks; the mass of a cluster of keys is its size times the exponential of its centre's logit.
    """
    keeps = []
    for q, k in zip(heads.q, heads.k):
        (query_cluster, query_centres), (key_cluster, key_centres) = (
            clusters(x, heads.blocks, rounds) for x in (q, k)
        )
        sizes = torch.bincount(key_cluster, minlength=heads.blocks)
        logits = query_centres @ key_centres.T / math.sqrt(heads.size) + sizes.log()
        order = logits.argsort(dim=-1, descending=True)
        before = sizes[order].cumsum(-1) - sizes[order]  # keys in better clusters
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, before + sizes[order] / 2 <= pairs)
        keep |= logits == logits.amax(-1, keepdim=True)
        keeps.append(keep[query_cluster[heads.compared]][:, key_cluster])
    return torch.stack(keeps)


def running_maximum(heads: Heads, pairs: float) -> Tensor:
    """Skip the softmax of blocks whose logits are far below the running maximum. Source: BLASST, arXiv 2512.12087.

    Logits are computed in any case; blocks of keys come in the order of the sequence, and a block is skipped if that
    holds for all queries of the block.
    """
    compared = torch.searchsorted(heads.rows, heads.block_of[heads.compared])
    best = torch.full((heads.q.shape[0], len(heads.compared), heads.blocks), -torch.inf)
    best.scatter_reduce_(2, heads.block_of.expand_as(heads.logits), heads.logits, "amax")
    margin = best - best.cummax(-1).values  # 0 where the block holds the maximum so far
    rows = torch.full((heads.q.shape[0], len(heads.rows), heads.blocks), -torch.inf)
    rows.scatter_reduce_(1, compared[None, :, None].expand_as(margin), margin, "amax")
    return by_threshold(heads, lambda threshold: rows >= threshold, pairs, -60.0, 0.0)


def _per_row_of_blocks(heads: Heads, x: Tensor) -> Tensor:
    """Sum (H, compared, blocks) over the queries of a block: (H, compared rows, blocks)."""
    sums = x.new_zeros(x.shape[0], len(heads.rows), heads.blocks)
    return sums.index_add_(1, torch.searchsorted(heads.rows, heads.block_of[heads.compared]), x)


def _true_mass(heads: Heads, pairs: float, pooled: bool) -> Tensor:
    mass = _per_row_of_blocks(heads, heads.block_sums(heads.weights))
    return by_rank(heads, mass, pairs, pooled=pooled)


def _least_error(heads: Heads, pairs: float) -> Tensor:
    """Keep the blocks whose means would change the output most, of all heads together."""
    total = heads.logits.logsumexp(-1, keepdim=True)
    mean_weights = (heads.pooled_logits - heads.sizes.log() - total).exp()[..., heads.block_of]
    difference = heads.weights - mean_weights
    squares = torch.zeros(*heads.output.shape[:2], heads.blocks)
    for block in range(heads.blocks):
        part = difference[..., heads.block_of == block]
        change = part @ heads.v[:, heads.block_of == block] - part.sum(-1, keepdim=True) * heads.output
        squares[..., block] = change.square().sum(-1)
    return by_rank(heads, _per_row_of_blocks(heads, squares), pairs, pooled=True, layer=True)


PRESET = _sampled("ours: the preset", "residual", ours=True, layer=True)

METHODS = (
    _sampled("ASA, as published", "max", pooled=False),
    _sampled("ASA, dropped blocks pooled", "max"),
    _sampled("ours, a budget for each row", "residual", ours=True),
    PRESET,
    _sampled("ours, with half the probe", "residual", ours=True, layer=True, share=4),
    Method(
        "means of quarter blocks, pooled, by layer", sub_block_means,
        lambda heads: 2.0 * heads.size * (4 * heads.blocks) ** 2, pooled=True,
    ),
    Method("mean pooling", mean_pooling, mean_operations),
    Method("XAttention, antidiagonals", antidiagonals, lambda heads: 2.0 * heads.size * heads.tokens**2 / 8),
    Method("SpargeAttn, guard", guarded_mean_pooling, mean_operations),
    Method("NABLA, cumulative mass", cumulative_mass, mean_operations),
    Method("Sol-Attn, mean + tau sigma", mean_and_deviation, mean_operations, pooled=True),
    Method(
        "Sparse VideoGen2, clusters", semantic_clusters,
        lambda heads: 2.0 * heads.size * (2 * 10 * heads.tokens * heads.blocks + heads.blocks**2),
    ),
    Method("BLASST, skipped softmax", running_maximum, lambda heads: 2.0 * heads.size * heads.tokens**2),
    Method(
        "oracle: true mass", lambda heads, pairs: _true_mass(heads, pairs, False), lambda heads: 0.0, is_oracle=True,
    ),
    Method(
        "oracle: true mass, pooled", lambda heads, pairs: _true_mass(heads, pairs, True), lambda heads: 0.0,
        pooled=True, is_oracle=True,
    ),
    Method(
        "oracle: the preset, second-order means", PRESET.choose, PRESET.operations,
        pooled=True, is_oracle=True, second_order=True,
    ),
    Method(
        "oracle: output error, pooled, by layer", _least_error, lambda heads: 0.0, pooled=True, is_oracle=True,
    ),
)  # fmt: skip
"""All that are compared, ours first, oracles last."""
