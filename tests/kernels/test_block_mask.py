from dataclasses import replace

import pytest
import torch
from blade_kernels.block_mask import BlockMask
from hypothesis import given, settings
from hypothesis import strategies as st


def random_keep(shape, density, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_lists_and_bits_say_the_same(shape, density, seed):
    keep = random_keep(shape, density, seed)
    mask = BlockMask.from_dense(keep, (32, 16))
    assert torch.equal(mask.to_dense(), keep)
    assert torch.equal(mask.counts.long(), keep.sum(-1))
    for place in [(b, h, q) for b in range(shape[0]) for h in range(shape[1]) for q in range(shape[2])]:
        count = int(mask.counts[place])
        assert mask.indices[place][:count].tolist() == keep[place].nonzero().flatten().tolist()
        assert not mask.indices[place][count:].any()


def test_lists_of_equal_length_make_the_mask_that_their_bits_make():
    blocks = torch.rand(2, 3, 5, 9, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    mask = BlockMask.from_lists(blocks, 9, (16, 32))
    same = BlockMask.from_dense(torch.zeros(2, 3, 5, 9, dtype=torch.bool).scatter(-1, blocks, True), (16, 32), 4)
    for name in ("keep", "counts", "indices"):
        assert torch.equal(getattr(mask, name), getattr(same, name)), name
    assert mask.block_size == same.block_size


def test_rows_are_ordered_from_the_longest_ties_by_place():
    keep = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0], [0, 1, 0]], dtype=torch.bool)[None, None]
    mask = BlockMask.from_dense(keep).longest_rows_first()
    assert mask.order.tolist() == [[[1, 0, 3, 2]]]
    assert mask.to("cpu").order.dtype == torch.int32


def test_capacity_narrows_the_lists():
    keep = torch.zeros(1, 1, 2, 8, dtype=torch.bool)
    keep[0, 0, 0, [1, 5, 7]] = True
    mask = BlockMask.from_dense(keep, capacity=3)
    assert mask.capacity == 3 and mask.indices[0, 0, 0].tolist() == [1, 5, 7]
    assert torch.equal(mask.to_dense(), keep)


def test_a_row_beyond_the_capacity_is_cut_in_bits_and_lists_alike():
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 8, dtype=torch.bool), capacity=3)
    assert mask.counts.tolist() == [[[3, 3]]]
    assert torch.equal(mask.to_dense(), mask.keep)
    assert mask.keep[0, 0, 0].tolist() == [True] * 3 + [False] * 5


def test_shapes_do_not_depend_on_the_data():
    """So that the graph of a model is compiled once."""

    def lists(keep):
        mask = BlockMask.from_dense(keep, (16, 16), 4)
        return mask.counts, mask.indices, mask.density(75, 110)

    compiled = torch.compile(lists, backend="aot_eager", fullgraph=True)
    for density in (0.0, 0.3, 1.0):
        keep = random_keep((2, 2, 5, 7), density)
        for found, expected in zip(compiled(keep), lists(keep)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("tokens", [(64, 96), (49, 65), (50, 96)])
def test_density_counts_pairs_of_real_tokens(tokens):
    queries, keys = tokens
    keep = random_keep((2, 3, 4, 3), 0.5)
    mask = BlockMask.from_dense(keep, (16, 32))
    pairs = keep.repeat_interleave(16, 2).repeat_interleave(32, 3)[:, :, :queries, :keys]
    assert torch.equal(mask.pairs(queries, keys), pairs.sum((2, 3)))
    torch.testing.assert_close(mask.density(queries, keys), pairs.float().mean())
    more = mask.density(queries, keys, pooled_pairs=queries * 7)
    torch.testing.assert_close(more, pairs.float().mean() + 7 / keys)


def test_density_takes_full_blocks_where_no_length_is_given():
    keep = random_keep((1, 2, 3, 5), 0.5)
    torch.testing.assert_close(BlockMask.from_dense(keep).density(), keep.float().mean())


@pytest.mark.parametrize(
    ("keep", "arguments", "message"),
    [
        (torch.ones(1, 1, 2, 2), {}, "`keep` must be bool"),
        (torch.ones(2, 2, dtype=torch.bool), {}, r"got torch.bool of shape \(2, 2\)"),
        (
            torch.ones(1, 1, 2, 2, dtype=torch.bool),
            {"capacity": 0},
            "`capacity` must be at least 1 block or None, got 0",
        ),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), {"block_size": (0, 64)}, r"`block_size` .* got \(0, 64\)"),
    ],
)
def test_bad_maps_are_refused(keep, arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockMask.from_dense(keep, **arguments)


def test_parts_that_do_not_match_are_refused():
    mask = BlockMask.from_dense(torch.ones(1, 2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`counts` must be int32 of shape \(1, 2, 3\)"):
        BlockMask(mask.keep, mask.counts[:, :1], mask.indices, (64, 64))
    with pytest.raises(ValueError, match="`indices` must be int32"):
        BlockMask(mask.keep, mask.counts, mask.indices.long(), (64, 64))
    with pytest.raises(ValueError, match=r"`order` must be None or int32 of shape \(1, 2, 3\) .* got torch.int64"):
        BlockMask(mask.keep, mask.counts, mask.indices, (64, 64), mask.counts.long())


@pytest.mark.parametrize("tokens", [0, 64, 129])
def test_a_length_that_is_not_the_masks_is_refused(tokens):
    mask = BlockMask.from_dense(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=f"`query_tokens` must end in the last of 2 blocks .* from 65 to 128, got {tokens}"
    ):
        mask.density(tokens, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [[[3, 2]]]}, "`counts` must be from 0 to the capacity, 2, .* row 0 does not"),
        ({"counts": [[[-1, 2]]]}, "`counts` must be from 0 to the capacity, 2, .* row 0 does not"),
        (
            {"indices": [[[[1, 0], [0, 3]]]]},
            "`indices` must be from 0 to 2, which batch item 0, head 0, row 1 does not",
        ),
        (
            {"indices": [[[[1, 0], [2, 0]]]]},
            "`indices` of a row must ascend, which batch item 0, head 0, row 1 does not",
        ),
        (
            {"indices": [[[[1, 0], [2, 2]]]]},
            "`indices` of a row must ascend, which batch item 0, head 0, row 1 does not",
        ),
        ({"indices": [[[[1, 0], [0, 1]]]]}, "must hold the same blocks, but differ in .* row 1, key block 1"),
        ({"order": [[[1, 1]]]}, "`order` must hold every row once, which batch item 0, head 0, row 0 does not"),
    ],
)
def test_values_that_kernels_rely_on_are_checked_when_asked_for(change, message):
    keep = torch.tensor([[[[False, True, False], [True, False, True]]]])
    mask = BlockMask.from_dense(keep, (16, 16), capacity=2).longest_rows_first()
    mask.check_values()
    assert mask.indices.tolist() == [[[[1, 0], [0, 2]]]]
    wrong = replace(mask, **{name: torch.tensor(value, dtype=torch.int32) for name, value in change.items()})
    with pytest.raises(ValueError, match=message):
        wrong.check_values()
