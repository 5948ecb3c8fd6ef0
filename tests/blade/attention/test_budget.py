"""The budget spends what the sparsity leaves: never more, but for what is forced, and never a whole block less."""

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_selection import select_blocks
from blade_kernels.block_sparse.pooled import pool_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from blade.attention.budget import plan_budget
from blade.token_grid import TokenGrid

grids = st.builds(
    TokenGrid,
    frames=st.integers(1, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    text_before=st.integers(0, 20),
    text_after=st.integers(0, 20),
)


def realised_density(grid, budget, kept, block_size, window):
    """Density, as the kernels count it, of a mask with all text and the first `kept` blocks of video in every row."""
    text = torch.tensor(grid.text_blocks(block_size))
    video = torch.nonzero(~text).flatten()[:kept]
    keep = torch.zeros(len(text), len(text), dtype=torch.bool)
    keep[:, video] = True
    keep |= text | text[:, None]
    mask = BlockMask.from_dense(keep[None, None], (block_size, block_size))
    pairs = 0
    if budget.pooled_tokens != "none":
        k = torch.zeros(1, grid.sequence_length, 1, 1)
        restart = block_size if budget.pooled_tokens == "dropped" else None
        pooled = pool_tokens(k, k, window, start=grid.video_start, stop=grid.video_stop, block_size=restart)
        pairs = pooled.pairs(mask, grid.sequence_length)
    return mask.density(grid.sequence_length, grid.sequence_length, pooled_pairs=pairs).item()


@settings(max_examples=150, deadline=None)
@given(
    grids, st.floats(0, 0.98), st.sampled_from(["none", "all", "dropped"]), st.sampled_from([(4, 2), (8, 8), (16, 4)])
)
def test_density_is_never_above_the_request_but_for_what_is_forced(grid, sparsity, mode, sizes):
    block_size, window = sizes
    budget = plan_budget(grid, sparsity, block_size=block_size, pooled_tokens=mode, pooled_window=window)
    realised = realised_density(grid, budget, budget.kept_blocks, block_size, window)
    assert realised <= budget.density + 1e-6
    video_blocks = budget.blocks - budget.text_blocks
    assert min(1, video_blocks) <= budget.kept_blocks <= video_blocks
    if not budget.is_exceeded:
        assert realised <= 1 - sparsity + 1e-6
    else:
        assert budget.kept_blocks <= 1
    if not budget.is_full and not budget.is_exceeded:
        # one more block would be too much, unless it is the shorter last one
        more = realised_density(grid, budget, budget.kept_blocks + 1, block_size, window)
        assert more > 1 - sparsity - block_size / grid.sequence_length


@settings(max_examples=150, deadline=None)
@given(grids, st.floats(0.05, 0.98), st.sampled_from(["none", "dropped"]), st.integers(0, 99))
def test_a_budget_that_is_spread_is_met_on_average(grid, sparsity, mode, seed):
    size = 4
    budget = plan_budget(grid, sparsity, block_size=size, pooled_tokens=mode, pooled_window=size, rounding="spread")
    floored = plan_budget(grid, sparsity, block_size=size, pooled_tokens=mode, pooled_window=size)
    assert (budget.kept_blocks, budget.is_full) == (floored.kept_blocks, floored.is_full)
    assert floored.extra_blocks == 0 and 0 <= budget.extra_blocks < budget.blocks
    if budget.is_full or budget.is_exceeded:
        assert budget.extra_blocks == 0
        return
    text = torch.tensor(grid.text_blocks(size))
    mask = select_blocks(
        torch.rand(1, 1, budget.blocks, budget.blocks, generator=torch.Generator().manual_seed(seed)),
        (size, size),
        max_blocks=budget.text_blocks + budget.kept_blocks,
        extra_blocks=budget.extra_blocks,
        forced_key_blocks=text,
        forced_query_blocks=text,
    )
    video = mask.counts[0, 0][~text] - budget.text_blocks
    rows = len(video)
    whole = size - (mode == "dropped")  # tokens that a kept block costs more than a dropped one
    spent = budget.kept_blocks + budget.extra_blocks / budget.blocks
    assert abs(int(video.sum()) - spent * rows) < 1  # to one block of all
    assert budget.density <= 1 - sparsity + 1e-6
    assert budget.density > 1 - sparsity - whole / (budget.blocks * grid.sequence_length) - 1e-6


@pytest.mark.parametrize(
    ("sparsity", "mode", "window", "kept", "density"),
    [
        # Source: the released students' masks: 43 of 256 blocks and 1/30 for Wan.
        (0.798, "all", 30, 43, 43 * 128 / 32760 + 1 / 30),
        (0.5, "none", 32, 127, 127 * 128 / 32760),
        (0.0, "all", 32, 256, 1.0),
    ],
)
def test_wan_480p(sparsity, mode, window, kept, density):
    grid = TokenGrid(21, 30, 52)
    budget = plan_budget(grid, sparsity, block_size=128, pooled_tokens=mode, pooled_window=window)
    assert (budget.blocks, budget.text_blocks, budget.kept_blocks) == (256, 0, kept)
    assert budget.density == pytest.approx(density, abs=1e-12)


def test_cogvideox_text_is_paid_first():
    # 226 text tokens behind 17550 of video: blocks 137 and 138 hold text, and so do their rows.
    grid = TokenGrid(13, 30, 45, text_after=226)
    budget = plan_budget(grid, 0.85, block_size=128, pooled_tokens="none", pooled_window=15)
    assert (budget.blocks, budget.text_blocks) == (139, 2)
    without_text = plan_budget(TokenGrid(13, 30, 45), 0.85, block_size=128, pooled_tokens="none", pooled_window=15)
    assert budget.kept_blocks < without_text.kept_blocks
    assert budget.density <= 0.15


def test_text_and_pooled_tokens_may_exceed_the_budget():
    budget = plan_budget(TokenGrid(2, 4, 4, text_before=16), 0.9, block_size=8, pooled_tokens="none", pooled_window=8)
    assert budget.is_exceeded
    assert budget.kept_blocks == 1
    assert budget.density > budget.requested_density == pytest.approx(0.1)


def test_at_sparsity_zero_everything_is_kept_and_nothing_pooled():
    for mode in ("none", "all", "dropped"):
        budget = plan_budget(TokenGrid(3, 5, 7), 0.0, block_size=8, pooled_tokens=mode, pooled_window=4)
        assert budget.is_full
        assert budget.pooled_tokens == "none"
        assert budget.density == 1.0


def test_blocks_on_the_border_of_text_hold_text():
    grid = TokenGrid(1, 4, 4, text_before=5, text_after=3)  # video is tokens 5 to 20 of 24
    assert grid.text_blocks(4) == [True, True, False, False, False, True]
    assert TokenGrid(1, 4, 4).text_blocks(5) == [False] * 4
