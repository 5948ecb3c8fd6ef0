"""Queries of text that a grid sets apart are exact in every method; those of video are as they were."""

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import block_sparse_attention
from blade_kernels.block_sparse.pooled import pool_tokens

from blade import BladeConfig, PatternTable, TokenGrid
from blade.attention.adaptive import AdaptivePlan, attend_to_blocks, draw_table
from blade.attention.budget import plan_budget
from blade.attention.config import AdaptiveConfig
from blade.attention.pattern_plan import PatternPlan, pattern_tables
from blade.attention.patterns import HeadPattern

GRID = TokenGrid(3, 5, 7, text_after=13, dense_text=True)
PLAIN = TokenGrid(3, 5, 7, text_after=13)
VIDEO, TOKENS = 105, 118
DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
CPU = torch.device("cpu")


@pytest.fixture
def qkv():
    return torch.randn(3, 2, TOKENS, 2, 8, generator=torch.Generator().manual_seed(0)).mul(2).unbind(0)


def dense(query, key, value, lengths=None):
    there = None if lengths is None else (torch.arange(TOKENS) < lengths[:, None])[:, None, None]
    moved = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(*moved, attn_mask=there).transpose(1, 2)


@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
@pytest.mark.parametrize("lengths", [None, [118, 110]])
def test_rows_of_text_are_dense_and_rows_of_video_the_same(qkv, pooled, lengths):
    query, key, value = qkv
    lengths = None if lengths is None else torch.tensor(lengths)
    keep = torch.rand(1, 2, 15, 15, generator=torch.Generator().manual_seed(1)) < 0.3
    keep[..., 13:] = keep[..., 13:, :] = True
    mask = BlockMask.from_dense(keep, (8, 8)).longest_rows_first()
    tokens = None
    if pooled != "none":
        tokens = pool_tokens(key, value, 4, stop=VIDEO, block_size=8 if pooled == "dropped" else None)
    options = {"pooled": tokens, "key_lengths": lengths, "implementation": "cpu", "precision": "full"}
    output, density, _ = attend_to_blocks(*qkv, mask, GRID, **options)
    plain, plain_density, _ = attend_to_blocks(*qkv, mask, PLAIN, **options)
    torch.testing.assert_close(output[:, :VIDEO], plain[:, :VIDEO])
    torch.testing.assert_close(output[:, VIDEO:], dense(query[:, VIDEO:], key, value, lengths))
    changed = (output[:, VIDEO:] - plain[:, VIDEO:]).abs().max() > 1e-3
    assert changed == (pooled == "all")  # which text sees without `dense_text`
    pairs = 0 if tokens is None else tokens.pairs(mask, TOKENS)
    if pooled == "all":
        pairs -= len(tokens) * (TOKENS - VIDEO)
    torch.testing.assert_close(density, mask.density(TOKENS, TOKENS, pooled_pairs=pairs))
    assert (density < plain_density) == (pooled == "all")


@pytest.mark.parametrize("attention", ["asa", "asa-gt"])
@pytest.mark.parametrize("precision", ["full", "int8"])
def test_adaptive_attention_leaves_text_exact(qkv, attention, precision):
    config = BladeConfig(attention=attention, sparsity=0.6, asa=DETAILS, precision=precision)
    plan = AdaptivePlan.of(config, GRID, CPU)
    output, density, _ = plan.attend(*qkv, (draw_table(config, 0, 2)[0],))
    exact = dense(*qkv)
    torch.testing.assert_close(output[:, VIDEO:], exact[:, VIDEO:])
    assert (output - exact)[:, :VIDEO].abs().max() > 0.1
    assert 0.2 < density < 0.6


def test_patterns_with_orders_of_their_own_leave_text_exact(qkv):
    table = PatternTable(
        patterns=(HeadPattern(kind="diagonal", frames=0.5), HeadPattern(kind="diagonal", frames=0.5, order="gilbert")),
        assignment=[[[0, 1]]],
        block_size=8,
    )
    config = BladeConfig(attention="patterns", patterns=table, asa=DETAILS)
    rows = tuple(rows[0] for rows in pattern_tables(config, 0, 2, 1))
    output, density, _ = PatternPlan.of(config, GRID, CPU).attend(*qkv, rows)
    plain, plain_density, _ = PatternPlan.of(config, PLAIN, CPU).attend(*qkv, rows)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(density, plain_density)
    torch.testing.assert_close(output[:, VIDEO:], dense(*qkv)[:, VIDEO:])


def test_gradients_pass_through_both_calls(qkv):
    leaves = [tensor.detach().requires_grad_() for tensor in qkv]
    config = BladeConfig(attention="asa-gt", sparsity=0.6, asa=DETAILS)
    plan = AdaptivePlan.of(config, GRID, CPU)
    output, _, _ = plan.attend(*leaves, (draw_table(config, 0, 2)[0],))
    output[:, VIDEO:].square().sum().backward()
    gradients = [leaf.grad.clone() for leaf in leaves]
    plain = [tensor.detach().requires_grad_() for tensor in qkv]
    dense(*plain)[:, VIDEO:].square().sum().backward()
    for own, expected in zip(gradients, plain):
        torch.testing.assert_close(own, expected.grad)


@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
def test_the_budget_pays_no_pooled_tokens_for_text(pooled):
    options = {"block_size": 8, "pooled_tokens": pooled, "pooled_window": 4}
    own, plain = plan_budget(GRID, 0.5, **options), plan_budget(PLAIN, 0.5, **options)
    saved = 27 * 13 / TOKENS**2 if pooled == "all" else 0.0  # 27 pooled tokens for 13 rows of text
    assert own.density <= 0.5 and own.kept_blocks >= plain.kept_blocks
    if own.kept_blocks == plain.kept_blocks:
        assert own.density == pytest.approx(plain.density - saved)


def test_first_rows_keep_their_blocks_and_an_order():
    keep = torch.tensor([[[[True, False, False], [True, True, False], [True, True, True]]]])
    first = BlockMask.from_dense(keep, (16, 16)).longest_rows_first().first_rows(2)
    first.check_values()
    assert first.keep.tolist() == keep[:, :, :2].tolist() and first.order.tolist() == [[[1, 0]]]
    with pytest.raises(ValueError, match="`count` must be from 1 to 2 query blocks, got 3"):
        first.first_rows(3)


def test_text_before_the_video_is_refused():
    with pytest.raises(ValueError, match="`dense_text` takes text after the video alone, got `text_before` 4"):
        TokenGrid(1, 2, 3, text_before=4, dense_text=True)


def test_a_saved_grid_names_the_field_where_it_is_on():
    assert TokenGrid(**GRID.to_dict()) == GRID
    assert "dense_text" not in PLAIN.to_dict()


def test_block_sparse_attention_takes_fewer_queries_than_keys(qkv):
    query, key, value = qkv
    mask = BlockMask.from_dense(torch.ones(1, 1, 14, 15, dtype=torch.bool), (8, 8))
    output = block_sparse_attention(query[:, :VIDEO], key, value, mask)
    torch.testing.assert_close(output, dense(query[:, :VIDEO], key, value))
