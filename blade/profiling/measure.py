"""Errors that candidate patterns would cause in one layer, measured on its queries, keys and values.

The numerators and denominators of the softmax are summed by key block, for a few query blocks at a time; the output
under any block mask is a sum of these. All candidates together therefore cost about as much as one dense attention,
and no tensor of tokens x tokens is ever allocated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from blade.attention.sequence_parallel import HeadShare

MAP_SIZE = 48
"""Most rows and columns of the attention map that is recorded of a head."""

CHUNK_BYTES = 2**28
"""Memory that the sums of the query blocks processed together may take."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Block masks of the candidate patterns that share a token order."""

    numbers: tuple[int, ...]
    """Indices of the candidates."""
    masks: tuple[Tensor, ...]
    """One mask each: (H or 1, blocks, blocks) bool, or (B, H, blocks, blocks) if batch items differ."""
    tokens: Tensor | None = None
    """(S,) int64, the tokens in this order as positions in the model's own order; None: the model's own order."""


@dataclass(kw_only=True)
class LayerMeasurement:
    """Sums over the sampled queries of one layer and step, which can be added up over passes."""

    queries: int
    """Number of queries."""
    output_error: Tensor
    """(candidates, H) float64, squared error of the layer's output, after the projection, mean over channels."""
    head_error: Tensor
    """(candidates, H) float64, squared error of the head's output before the projection, mean over channels."""
    mass: Tensor
    """(candidates, H) float64, attention weight in the kept blocks."""
    best_mass: Tensor
    """(candidates, H) float64, the most attention weight that equally many blocks per row could hold."""
    energy: Tensor
    """(H,) float64, squared output after the projection, mean over channels."""
    block_map: Tensor
    """(H, rows, columns) float64, attention weight summed over patches of the map, in the model's own order."""
    rows: Tensor
    """(rows,) float64, number of queries summed in each row of `block_map`."""

    def __add__(self, other: LayerMeasurement) -> LayerMeasurement:
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__}
        return LayerMeasurement(**sums)

    def tensors(self) -> dict[str, Tensor]:
        """Return all values as tensors, for saving."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: torch.as_tensor(value).cpu() for name, value in values.items()}

    def of_all_heads(self, share: HeadShare) -> LayerMeasurement:
        """Put together what ranks measured, each of its heads."""
        parts = [*(getattr(self, name).mT for name in _BY_CANDIDATE), self.energy[:, None], self.block_map.flatten(1)]
        gathered = share.gather_heads(torch.cat(parts, dim=1).unsqueeze(0)).squeeze(0)
        *sums, energy, block_map = gathered.split([part.shape[1] for part in parts], dim=1)
        return LayerMeasurement(
            queries=self.queries,
            energy=energy.squeeze(1),
            block_map=block_map.unflatten(1, self.block_map.shape[1:]),
            rows=self.rows,
            **{name: tensor.mT for name, tensor in zip(_BY_CANDIDATE, sums)},
        )

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LayerMeasurement:
        """Make a measurement from the result of `tensors`."""
        sums = {name: tensor for name, tensor in tensors.items() if name != "queries"}
        return cls(queries=int(tensors["queries"]), **sums)


def measure_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Sequence[Candidates],
    *,
    candidates: int,
    block_size: int,
    projection: Tensor | None = None,
    key_lengths: Tensor | None = None,
    query_blocks: Tensor | None = None,
) -> LayerMeasurement:
    """Measure the errors of all candidates on one layer's queries, keys and values.

    Args:
        query: (B, S, H, D), in the model's token order, after position embeddings.
        key: (B, S, H, D).
        value: (B, S, H, D).
        groups: the candidates by token order, the model's own order first.
        candidates: the number of candidates.
        block_size: tokens in a block.
        projection: (channels, H * D), weights of the layer's output projection. None: the identity.
        key_lengths: (B,) integers: keys from there on are padding, and are not counted as queries either.
        query_blocks: int64, the blocks of queries to sample, in each order; None: all.
    """
    heads, size = query.shape[2:]
    grams = _grams(projection, heads, size, query.device)
    total: LayerMeasurement | None = None
    for group in groups:
        measured = _measure_group(
            _in_order(query, group.tokens),
            _in_order(key, group.tokens),
            _in_order(value, group.tokens),
            group,
            candidates,
            block_size,
            grams,
            key_lengths,
            query_blocks,
        )
        if total is None:
            total = measured
            continue
        for name in _BY_CANDIDATE:
            getattr(total, name).add_(getattr(measured, name))
    assert total is not None
    return total


def column_mass(
    query: Tensor, key: Tensor, block_size: int, *, key_lengths: Tensor | None = None, queries: int = 1024
) -> Tensor:
    """Return the attention weight that each key block receives from evenly spaced queries.

    Args:
        query: (B, S, H, D).
        key: (B, S, H, D).
        block_size: tokens in a block.
        key_lengths: see `measure_layer`.
        queries: the number of queries sampled in every batch item.

    Returns:
        (H, blocks) float64, rows sum to 1.
    """
    tokens, heads = query.shape[1:3]
    blocks = -(-tokens // block_size)
    sampled = torch.linspace(0, tokens - 1, min(queries, tokens), device=query.device).long()
    total = torch.zeros(heads, blocks, dtype=torch.float64, device=query.device)
    chunk = max(1, CHUNK_BYTES // (max(heads, 1) * tokens * 4))
    for item in range(len(query)):
        for positions in sampled.split(chunk):
            logits = _logits(query[item, positions].transpose(0, 1), key[item].transpose(0, 1), blocks * block_size)
            _hide(logits, tokens if key_lengths is None else key_lengths[item])
            weights = logits.softmax(-1).unflatten(-1, (blocks, block_size))
            total += weights.sum((1, 3), dtype=torch.float64)
    return total / total.sum(-1, keepdim=True)


def _in_order(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Put the tokens of (B, S, H, D) into an order; None leaves them unchanged."""
    return x if tokens is None else x.index_select(1, tokens)


def _measure_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: Candidates,
    candidates: int,
    block_size: int,
    grams: Tensor,
    key_lengths: Tensor | None,
    query_blocks: Tensor | None,
) -> LayerMeasurement:
    batch, tokens, heads, size = query.shape
    blocks, device = -(-tokens // block_size), query.device
    sampled = torch.arange(blocks, device=device) if query_blocks is None else query_blocks.to(device)
    cells = min(MAP_SIZE, blocks)
    cell = torch.arange(blocks, device=device) * cells // blocks
    sums = {name: torch.zeros(candidates, heads, dtype=torch.float64, device=device) for name in _BY_CANDIDATE}
    energy = torch.zeros(heads, dtype=torch.float64, device=device)
    map_sums = torch.zeros(heads, cells, cells, dtype=torch.float64, device=device)
    map_rows = torch.zeros(cells, dtype=torch.float64, device=device)
    queries = 0
    for item in range(batch):
        stop = tokens if key_lengths is None else int(key_lengths[item])
        values = _padded(value[item], blocks * block_size).transpose(0, 1).unflatten(1, (blocks, block_size))
        for chunk in _chunks(sampled, heads, block_size, blocks, size):
            positions = (chunk[:, None] * block_size + torch.arange(block_size, device=device)).flatten()
            real = (positions < stop).view(len(chunk), block_size)
            rows = _padded(query[item], blocks * block_size).index_select(0, positions)
            logits = _logits(rows.transpose(0, 1), key[item].transpose(0, 1), blocks * block_size)
            _hide(logits, stop)
            weights = (logits - logits.amax(-1, keepdim=True)).exp_()
            weights = weights.view(heads, len(chunk), block_size, blocks, block_size)
            denominators = weights.sum(-1)  # (H, U, queries, blocks)
            numerators = torch.einsum("huqnk,hnkd->hunqd", weights, values.to(weights.dtype))
            del logits, weights
            total = denominators.sum(-1)
            exact = numerators.sum(2) / total.unsqueeze(-1)  # (H, U, queries, D)
            share = (denominators / total.unsqueeze(-1)) * real[None, :, :, None]
            by_block = share.sum(2, dtype=torch.float64)  # (H, U, blocks)
            queries += int(real.sum())
            energy += _quadratic(exact * real[None, :, :, None], grams).sum((1, 2), dtype=torch.float64)
            map_sums.index_add_(1, cell[chunk], torch.zeros(
                heads, len(chunk), cells, dtype=torch.float64, device=device
            ).index_add_(2, cell, by_block))  # fmt: skip
            map_rows.index_add_(0, cell[chunk], real.sum(1, dtype=torch.float64))
            ranked = by_block.sort(-1, descending=True).values.cumsum(-1)
            for number, mask in zip(group.numbers, group.masks):
                mask = mask[item % len(mask)] if mask.ndim == 4 else mask
                kept = mask.index_select(1, chunk).expand(heads, -1, -1)  # (H, U, blocks)
                weight_mask = kept.to(numerators.dtype)
                numerator = torch.einsum("hun,hunqd->huqd", weight_mask, numerators)
                denominator = torch.einsum("hun,huqn->huq", weight_mask, denominators).unsqueeze(-1)
                difference = torch.where(denominator > 0, numerator / denominator, 0.0) - exact
                difference = difference * real[None, :, :, None]
                sums["head_error"][number] += difference.square().mean(-1).sum((1, 2), dtype=torch.float64)
                sums["output_error"][number] += _quadratic(difference, grams).sum((1, 2), dtype=torch.float64)
                sums["mass"][number] += (by_block * kept).sum((1, 2))
                count = kept.sum(-1, keepdim=True)
                best = ranked.gather(-1, (count - 1).clamp(min=0)) * (count > 0)
                sums["best_mass"][number] += best.sum((1, 2))
    return LayerMeasurement(queries=queries, energy=energy, block_map=map_sums, rows=map_rows, **sums)


_BY_CANDIDATE = ("output_error", "head_error", "mass", "best_mass")


def _chunks(sampled: Tensor, heads: int, block_size: int, blocks: int, size: int) -> Iterator[Tensor]:
    """Split query blocks into chunks whose sums fit into `CHUNK_BYTES`."""
    block_bytes = max(heads, 1) * block_size * blocks * (block_size + size) * 4
    return iter(sampled.split(max(1, CHUNK_BYTES // block_bytes)))


def _grams(projection: Tensor | None, heads: int, size: int, device: torch.device) -> Tensor:
    """Return G, (H, D, D): for a head's error e, e G e is the layer's squared error, mean over channels."""
    if projection is None:
        return torch.eye(size, device=device).expand(heads, -1, -1) / size
    by_head: Tensor = projection.detach().to(device, torch.float32).unflatten(1, (heads, size)).movedim(1, 0)
    return by_head.mT @ by_head / len(projection)


def _quadratic(x: Tensor, grams: Tensor) -> Tensor:
    """Return the product x G x for x of (H, U, queries, D)."""
    return (torch.einsum("huqd,hde->huqe", x, grams) * x).sum(-1)


def _logits(query: Tensor, key: Tensor, width: int) -> Tensor:
    """Return the logits, padded to a width: (H, queries, width) float32."""
    logits = (query @ key.mT).to(torch.float32) * query.shape[-1] ** -0.5
    return functional.pad(logits, (0, width - logits.shape[-1]))


def _hide(logits: Tensor, stop: int | Tensor) -> None:
    positions = torch.arange(logits.shape[-1], device=logits.device)
    logits.masked_fill_(positions >= stop, -torch.inf)


def _padded(x: Tensor, tokens: int) -> Tensor:
    return functional.pad(x, (0, 0, 0, 0, 0, tokens - len(x)))
