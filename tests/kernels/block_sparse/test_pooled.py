import math

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from blade_kernels.block_sparse import PooledTokens, pool_tokens


def tokens(count, seed=0):
    return torch.randn(2, count, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def windows(start, stop, size):
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def assert_pools(pooled, k, v, expected):
    assert len(pooled) == len(expected)
    for index, window in enumerate(expected):
        torch.testing.assert_close(pooled.k[:, index], k[:, window].mean(1))
        torch.testing.assert_close(pooled.v[:, index], v[:, window].mean(1))
        assert float(pooled.log_weight[index]) == pytest.approx(math.log(len(window)))


@pytest.mark.parametrize(("start", "stop"), [(0, 23), (3, 23), (0, 17), (4, 20), (5, 6)])
@pytest.mark.parametrize("window", [1, 4, 30])
def test_windows_run_over_the_range_and_the_last_is_weighted_by_what_it_holds(start, stop, window):
    k, v = tokens(23), tokens(23, 1)
    pooled = pool_tokens(k, v, window, start=start, stop=stop)
    assert pooled.key_block is None
    assert_pools(pooled, k, v, windows(start, stop, window))


@pytest.mark.parametrize(("start", "stop"), [(0, 23), (3, 23), (8, 23), (0, 17), (0, 16), (9, 22)])
@pytest.mark.parametrize("window", [1, 3, 4, 8, 30])
def test_windows_for_dropped_blocks_restart_in_each_and_leave_out_blocks_with_text(start, stop, window):
    k, v = tokens(23), tokens(23, 1)
    pooled = pool_tokens(k, v, window, start=start, stop=stop, block_size=8)
    expected, owners = [], []
    for block in range(3):
        first, last = block * 8, min(block * 8 + 8, 23)
        if start <= first and last <= stop:
            expected += windows(first, last, window)
            owners += [block] * len(windows(first, last, window))
    assert_pools(pooled, k, v, expected)
    assert pooled.key_block is not None and pooled.key_block.tolist() == owners


def test_an_empty_range_gives_no_tokens():
    k, v = tokens(23), tokens(23, 1)
    assert len(pool_tokens(k, v, 4, start=9, stop=9)) == 0
    assert len(pool_tokens(k, v, 4, start=9, stop=15, block_size=8)) == 0


def test_pooling_is_differentiable():
    k, v = tokens(11).requires_grad_(), tokens(11, 1).requires_grad_()

    def pool(k, v):
        pooled = pool_tokens(k, v, 3, start=1, stop=10)
        return pooled.k, pooled.v

    assert torch.autograd.gradcheck(pool, (k, v))


def test_half_precision_is_summed_in_single():
    k = tokens(4096).to(torch.float16) + 8.0
    pooled = pool_tokens(k, k, 4096)
    assert pooled.k.dtype == torch.float16
    torch.testing.assert_close(pooled.k[:, 0].double(), k.double().mean(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("block_size", [None, 8])
def test_visible_and_pairs(block_size):
    k = tokens(23)
    keep = torch.rand(2, 3, 5, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_dense(keep, (5, 8))
    pooled = pool_tokens(k, k, 3, start=2, block_size=block_size)
    visible = pooled.visible(mask)
    assert visible.shape == (2, 3, 5, len(pooled))
    for index in range(len(pooled)):
        seen = torch.ones(2, 3, 5, dtype=torch.bool)
        if pooled.key_block is not None:
            seen = ~keep[..., int(pooled.key_block[index])]
        assert torch.equal(visible[..., index], seen)
    rows = torch.tensor([5, 5, 5, 5, 3])
    for length, held in ((23, rows), (None, 5)):
        assert (torch.as_tensor(pooled.pairs(mask, length)) == (visible.sum(-1) * held).sum(-1)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "`window` must be at least 1 token, got 0"),
        ({"window": 2, "start": 5, "stop": 4}, "0 <= start <= stop <= 23 tokens, got 5 and 4"),
        ({"window": 2, "stop": 24}, "got 0 and 24"),
        ({"window": 2, "block_size": 0}, "`block_size` must be at least 1 token or None, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        pool_tokens(tokens(23), tokens(23), **arguments)


def test_parts_that_do_not_match_are_refused():
    k = tokens(4)
    with pytest.raises(ValueError, match=r"got \(2, 4, 3, 4\) and \(2, 3, 3, 4\)"):
        pool_tokens(k, k[:, :3], 2)
    with pytest.raises(ValueError, match=r"`log_weight` must be float32 of shape \(4,\)"):
        PooledTokens(k, k, torch.zeros(3))
    with pytest.raises(ValueError, match="`key_block` must be None or int32"):
        PooledTokens(k, k, torch.zeros(4), torch.zeros(4, dtype=torch.int64))
