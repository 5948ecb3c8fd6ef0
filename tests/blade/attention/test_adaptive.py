"""Adaptive attention: what it chooses, what it draws by chance, and that it computes what it says."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blade import BladeConfig, TokenGrid
from blade.attention.adaptive import (
    DRAWN_STEPS,
    AdaptivePlan,
    adaptive_attention,
    draw_table,
    select,
)
from blade.attention.config import AdaptiveConfig
from blade.attention.methods import AdaptiveMethod
from blade.attention.selectors import block_nearness, random_scores

CPU = torch.device("cpu")
HEADS, SIZE = 2, 8

grids = st.builds(
    TokenGrid,
    frames=st.integers(1, 4),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    text_before=st.sampled_from([0, 0, 3, 8, 13]),
    text_after=st.sampled_from([0, 0, 1, 8, 21]),
)
configs = st.builds(
    lambda sparsity, pooled, **details: BladeConfig(
        sparsity=sparsity, pooled_tokens=pooled, asa=AdaptiveConfig(block_size=8, pooled_window=4, **details)
    ),
    sparsity=st.floats(0.05, 0.95),
    pooled=st.sampled_from(["none", "all", "dropped"]),
    selector=st.sampled_from(["sampled", "mean-pooled", "random", "local"]),
    probe_tokens=st.integers(1, 8),
    softmax_denominator=st.booleans(),
    cumulative_mass=st.sampled_from([None, None, 0.3, 0.9, 1.0]),
    min_fraction=st.sampled_from([0.0, 0.05, 0.5]),
    value_weighting=st.booleans(),
)


def qkv(grid, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 2, grid.sequence_length, HEADS, SIZE)
    query, key, value = torch.randn(shape, generator=generator, dtype=dtype).unbind(0)
    return 2 * query, 2 * key, value


def pooled_by_hand(tokens, grid, window, blocks):
    """Means of windows of (B, S, H, D), their token counts, and the key block that each lies in, one at a time."""
    means, counts, homes = [], [], []
    starts = (
        [(8 * block, min(8 * block + 8, grid.sequence_length)) for block in blocks]
        if blocks is not None
        else [(grid.video_start, grid.video_stop)]
    )
    for start, stop in starts:
        for first in range(start, stop, window):
            part = tokens[:, first : min(first + window, stop)]
            means.append(part.mean(1))
            counts.append(part.shape[1])
            homes.append(start // 8)
    return torch.stack(means, 1), torch.tensor(counts), torch.tensor(homes)


def oracle(query, key, value, mask, plan):
    """One float64 softmax over kept tokens and pooled ones, with an S x S mask."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    tokens = query.shape[1]
    keep = mask.keep.repeat_interleave(8, -1).repeat_interleave(8, -2)[..., :tokens, :tokens]
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / SIZE**0.5
    logits = logits.masked_fill(~keep, -torch.inf)
    if plan.budget.pooled_tokens != "none":
        blocks = None
        if plan.budget.pooled_tokens == "dropped":
            blocks = [block for block, text in enumerate(plan.grid.text_blocks(8)) if not text]
        pooled_key, counts, homes = pooled_by_hand(key, plan.grid, 4, blocks)
        pooled_value, _, _ = pooled_by_hand(value, plan.grid, 4, blocks)
        pooled_logits = torch.einsum("bqhd,bkhd->bhqk", query, pooled_key) / SIZE**0.5 + counts.float().log().double()
        if blocks is not None:
            kept = mask.keep[..., homes].repeat_interleave(8, -2)[..., :tokens, :]
            pooled_logits = pooled_logits.masked_fill(kept, -torch.inf)
        logits = torch.cat([logits, pooled_logits], -1)
        value = torch.cat([value, pooled_value], 1)
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), value)


@settings(max_examples=60, deadline=None)
@given(grids, configs)
def test_any_grid_text_and_method(grid, config):
    plan = AdaptivePlan.of(config, grid, CPU)
    draw = draw_table(config, layer=1, heads=HEADS)[3]
    query, key, value = qkv(grid)
    mask = select(query, key, value, plan, draw)
    budget = plan.budget

    text = torch.tensor(grid.text_blocks(8))
    assert mask.keep[..., text].all() and mask.keep[..., text, :].all()
    kept = mask.keep[..., ~text, :][..., ~text].sum(-1)
    assert (kept >= min(1, int((~text).sum()))).all()
    assert (kept <= budget.kept_blocks).all()
    if config.asa.cumulative_mass is None:
        assert (kept == budget.kept_blocks).all()
    assert torch.equal(select(query, key, value, plan, draw).keep, mask.keep)

    output, density, _ = adaptive_attention(query, key, value, plan, draw)
    expected = oracle(query, key, value, mask, plan)
    # float32 rounding: the bound is what plain attention over all tokens loses against float64
    plain = torch.einsum(
        "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", query, key) / SIZE**0.5).softmax(-1), value
    )
    exact = torch.einsum(
        "bhqk,bkhd->bqhd",
        (torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()) / SIZE**0.5).softmax(-1),
        value.double(),
    )
    assert (output - expected).abs().max() <= 4 * (plain - exact).abs().max() + 1e-6
    assert density <= budget.density + 1e-6
    if not budget.is_exceeded:
        assert density <= 1 - config.sparsity + 1e-6


@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
def test_gradients_are_those_of_the_oracle(pooled):
    grid = TokenGrid(3, 5, 3, text_before=3)
    config = BladeConfig(pooled_tokens=pooled, asa=AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4))
    plan = AdaptivePlan.of(config, grid, CPU)
    draw = draw_table(config, 0, HEADS)[0]
    inputs = [tensor.requires_grad_() for tensor in qkv(grid, dtype=torch.float64)]
    output, density, _ = adaptive_attention(*inputs, plan, draw)
    assert not density.requires_grad
    weights = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gradients = torch.autograd.grad((output * weights).sum(), inputs)
    expected = oracle(*inputs, select(*inputs, plan, draw), plan)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weights).sum(), inputs)):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-11)


def test_offsets_are_distinct_and_depend_on_seed_layer_and_step_alone():
    config = BladeConfig(asa=AdaptiveConfig(block_size=32, probe_tokens=8))
    table = draw_table(config, layer=2, heads=3)
    assert table.shape == (DRAWN_STEPS, 2, 3, 8)
    assert (table.sort(-1).values.diff(dim=-1) > 0).all()
    assert table.min() == 0 and table.max() == 31
    torch.manual_seed(17)
    assert torch.equal(draw_table(config, layer=2, heads=3), table)
    for other in (
        draw_table(config, layer=3, heads=3),
        draw_table(dataclasses.replace(config, seed=1), layer=2, heads=3),
    ):
        assert not torch.equal(other, table)
    assert not torch.equal(table[0], table[1])
    assert not torch.equal(table[:, 0], table[:, 1])
    assert torch.equal(draw_table(config, layer=2, heads=3, steps=5), table[:5])


@pytest.mark.parametrize(("steps", "rows"), [(1, 16), (16, 16), (17, 32), (50, 64), (64, 64), (1000, 64), (None, 64)])
def test_no_more_is_drawn_than_a_run_reads(steps, rows):
    method = AdaptiveMethod(BladeConfig())
    assert method.rows(steps) == rows
    assert len(method.tables(0, HEADS, rows)[0]) == rows


def test_random_scores_are_even_and_depend_on_their_key():
    scores = random_scores(torch.tensor([12345]), (1, 4, 64, 64))
    assert torch.equal(random_scores(torch.tensor([12345]), (1, 4, 64, 64)), scores)
    assert scores.min() >= 0 and scores.max() < 1
    assert scores.mean() == pytest.approx(0.5, abs=0.01)
    assert scores.var() == pytest.approx(1 / 12, abs=0.005)
    other = random_scores(torch.tensor([12346]), (1, 4, 64, 64))
    for a, b in ((scores, other), (scores[..., :-1], scores[..., 1:]), (scores[..., :-1, :], scores[..., 1:, :])):
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.05


def test_random_blocks_differ_between_rows_heads_and_steps():
    grid = TokenGrid(4, 8, 8)
    config = BladeConfig(sparsity=0.8, asa=AdaptiveConfig(block_size=8, probe_tokens=4, selector="random"))
    plan = AdaptivePlan.of(config, grid, CPU)
    table = draw_table(config, 0, HEADS)
    first, second = (select(*qkv(grid), plan, table[step]).keep for step in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0, 0], first[0, 1])
    assert len({tuple(row.tolist()) for row in first[0, 0]}) > 16


def test_the_local_window_is_near_in_the_video():
    """In raster order the block above or in the frame before is far along the sequence, but near in the video."""
    grid = TokenGrid(3, 4, 8)
    nearness = block_nearness(grid, AdaptiveConfig(block_size=8, probe_tokens=4, token_order="raster"))[0, 0]
    assert torch.equal(nearness.diagonal(), torch.ones(12))
    assert torch.equal(nearness, nearness.T)
    assert nearness[5, 1] == nearness[5, 4] == nearness[5, 9] == 0.5  # a block is a row of the frame
    assert nearness[5, 3] < nearness[5, 1]


def test_sampling_every_token_finds_the_largest_weight():
    """With the whole block probed, the score is the largest true attention weight between two blocks."""
    grid = TokenGrid(2, 4, 4)
    config = BladeConfig(sparsity=0.7, asa=AdaptiveConfig(block_size=8, probe_tokens=8))
    plan = AdaptivePlan.of(config, grid, CPU)
    query, key, value = qkv(grid)
    mask = select(query, key, value, plan, draw_table(config, 0, HEADS)[0])
    weights = (torch.einsum("bqhd,bkhd->bhqk", query, key) / SIZE**0.5).softmax(-1)
    scores = weights.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).amax((-1, -3))
    assert torch.equal(mask.keep, scores == scores.amax(-1, keepdim=True))


@settings(max_examples=30, deadline=None)
@given(grids, configs, st.sampled_from(["floor", "spread"]))
def test_a_budget_for_the_layer_is_met_by_all_heads_together(grid, config, rounding):
    details = dataclasses.replace(config.asa, cumulative_mass=None, min_fraction=0.0, rounding=rounding)
    by_row, by_layer = (
        AdaptivePlan.of(dataclasses.replace(config, asa=dataclasses.replace(details, budget=budget)), grid, CPU)
        for budget in ("row", "layer")
    )
    draw = draw_table(config, layer=1, heads=HEADS)[3]
    inputs = qkv(grid)
    rows, layer = (select(*inputs, plan, draw) for plan in (by_row, by_layer))
    text = torch.tensor(grid.text_blocks(8))
    assert layer.keep[..., text].all() and layer.keep[..., text, :].all()
    # a selector without heads or items of its own gives all the same mask
    assert layer.keep.sum((1, 2, 3)).tolist() == rows.keep.sum((1, 2, 3)).tolist()
    assert (layer.keep[..., ~text].sum(-1) >= min(1, int((~text).sum()))).all()
    # short rows may leave their pairs to whole ones, and rows of text the block that `spread` counts for them
    short = len(text) * 8 * (-grid.sequence_length % 8) + 64 * int(text.sum())
    _, density, _ = adaptive_attention(*inputs, by_layer, draw)
    assert density <= by_layer.budget.density + short / grid.sequence_length**2 + 1e-6


def test_heads_that_pooling_serves_badly_get_more_of_a_layer():
    grid = TokenGrid(2, 8, 8)
    details = AdaptiveConfig(
        block_size=8, probe_tokens=8, pooled_window=8, statistic="residual", value_weighting=True, budget="layer"
    )
    config = BladeConfig(sparsity=0.6, pooled_tokens="dropped", asa=details)
    plan = AdaptivePlan.of(config, grid, CPU)
    query, key, value = qkv(grid)
    query[..., 1, :] *= 0.01  # nearly even attention, which the means reproduce
    kept = select(query, key, value, plan, draw_table(config, 0, HEADS)[0]).keep.sum((2, 3))
    assert (kept[:, 0] > 3 * kept[:, 1]).all()
    value[..., 0, :] = value[:, :1, :, :][..., 0, :]  # whatever the weights, the output is the same
    kept = select(query, key, value, plan, draw_table(config, 0, HEADS)[0]).keep.sum((2, 3))
    assert (kept[:, 1] > 3 * kept[:, 0]).all()
