"""Patterns that were put into queries and keys are found again."""

import numpy as np
import pytest
import torch

from blade import TokenGrid
from blade.attention.patterns import HeadPattern, half_width, pattern_blocks
from blade.profiling.assignment import GreedyRule, least_error
from blade.profiling.candidates import default_candidates
from blade.profiling.measure import Candidates, column_mass, measure_layer
from blade.profiling.recording_plan import most_attended_blocks

GRID, BLOCK, SIZE, PEAK = TokenGrid(6, 8, 8), 16, 96, 9.0
CANDIDATES = default_candidates(GRID, BLOCK, densities=(0.2, 0.45))
MASKS = [pattern_blocks(pattern, GRID, BLOCK, "raster") for pattern in CANDIDATES]
DENSITIES = np.array([float(mask.float().mean()) for mask in MASKS])
COPIES = 4
WANTED_DENSITIES = {"full": 1.0, "skip": 0.0, "diagonal": DENSITIES[3], "multi-diagonal": DENSITIES[5]}
"""Of heads between two widths: the wider."""


def planted_heads(noise, seed):
    """Queries, keys and values of heads, and what each should be found as: a candidate, or only its kind."""
    rng = torch.Generator().manual_seed(seed)
    heads = []  # (mask of tokens or None, scale of values, candidate or kind)
    tokens = GRID.sequence_length
    for number, pattern in enumerate(CANDIDATES):
        if pattern.kind in ("full", "skip"):
            continue
        for _ in range(COPIES):
            if pattern.kind == "vertical":  # its own stripes, of blocks
                blocks = torch.randperm(tokens // BLOCK, generator=rng)[: round(pattern.share * tokens / BLOCK)]
                columns = torch.zeros(tokens // BLOCK, dtype=torch.bool).index_fill_(0, blocks, True)
                mask = columns.repeat_interleave(BLOCK).expand(tokens, -1)
            elif pattern.frames is not None:  # as wide as its whole blocks
                width = half_width(pattern, GRID, BLOCK) / (GRID.height * GRID.width)
                mask = pattern_blocks(HeadPattern(kind=pattern.kind, frames=width), GRID, 1, "raster")
            else:
                mask = pattern_blocks(pattern, GRID, 1, "raster")
            heads.append((mask, 1.0, number))
    for _ in range(COPIES):  # between two candidates' widths
        wrong = HeadPattern(kind="diagonal", frames=0.6), HeadPattern(kind="multi-diagonal", frames=0.6)
        heads += [(pattern_blocks(pattern, GRID, 1, "raster"), 1.0, pattern.kind) for pattern in wrong]
        heads += [(None, 1.0, "full"), (None, 0.02, "skip")]
    queries, keys, values = [], [], []
    for mask, scale, _ in heads:
        if mask is None:
            query, key = torch.randn(2, tokens, SIZE, generator=rng)
        else:  # logits of PEAK inside and 0 outside, as far as so few channels can have them
            u, s, v = torch.linalg.svd(PEAK * SIZE**0.5 * mask.float())
            root = s[:SIZE].sqrt()
            query, key = u[:, :SIZE] * root, v.mT[:, :SIZE] * root
            query = query + noise * query.std() * torch.randn(query.shape, generator=rng)
            key = key + noise * key.std() * torch.randn(key.shape, generator=rng)
        queries.append(query)
        keys.append(key)
        value = torch.randn(tokens, SIZE, generator=rng)
        output = (query @ key.T * SIZE**-0.5).softmax(-1) @ value
        values.append(scale * value / output.square().mean().sqrt())  # heads of one energy, but the one to skip
    stacked = (torch.stack(x, 1)[None] for x in (queries, keys, values))
    return *stacked, [wanted for _, _, wanted in heads]


def measured(query, key, value):
    """Mean squared errors (candidates, heads); stripes go where each head's attention goes."""
    columns = column_mass(query, key, BLOCK).numpy()
    text, groups = np.zeros(columns.shape[1], dtype=bool), {}
    for number, (pattern, mask) in enumerate(zip(CANDIDATES, MASKS)):
        if pattern.kind == "vertical":
            keep = torch.zeros(len(columns), *mask.shape, dtype=torch.bool)
            for head, weights in enumerate(columns):
                keep[head, :, list(most_attended_blocks(weights, pattern.share, text))] = True
        else:
            keep = mask[None]
        groups.setdefault(pattern.order or "raster", []).append((number, keep))
    candidates = [
        Candidates(
            numbers=tuple(number for number, _ in group),
            masks=tuple(mask for _, mask in group),
            tokens=None if order == "raster" else GRID.order(order),
        )
        for order, group in groups.items()
    ]
    found = measure_layer(query, key, value, candidates, candidates=len(MASKS), block_size=BLOCK)
    return (found.head_error / found.queries).numpy()


def found_share(choice, wanted):
    """Share of heads whose choice is the planted candidate, or of the planted kind."""
    return np.mean(
        [
            number == one if isinstance(one, int) else CANDIDATES[number].kind == one
            for number, one in zip(choice, wanted)
        ]
    )


@pytest.mark.parametrize("noise", [0.0, 0.25, 0.5])
def test_planted_patterns_are_found(noise):
    query, key, value, wanted = planted_heads(noise, seed=int(100 * noise))
    errors = measured(query, key, value)
    # no pattern is taken whose loss is above that of the full one
    by_rule = GreedyRule(weight=0.5, threshold=0.5).choose(errors, DENSITIES)
    assert found_share(by_rule, wanted) >= 0.95
    budget = sum(DENSITIES[one] if isinstance(one, int) else WANTED_DENSITIES[one] for one in wanted)
    together = least_error(errors.T, np.broadcast_to(DENSITIES, errors.T.shape), budget)
    assert found_share(together.choice, wanted) >= 0.95


def test_fewer_pairs_are_computed_the_larger_the_threshold():
    query, key, value, _ = planted_heads(0.5, seed=1)
    errors = measured(query, key, value)
    densities = [
        DENSITIES[GreedyRule(weight=0.5, threshold=threshold).choose(errors, DENSITIES)].mean()
        for threshold in (0.0, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 3.0)
    ]
    assert densities == sorted(densities, reverse=True) and densities[0] == 1 and densities[-1] < 0.4
