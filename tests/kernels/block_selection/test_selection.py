import pytest
import torch
from blade_kernels.block_selection import local_blocks, random_blocks, select_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


def rows(*values):
    """One head with these rows of importance."""
    return torch.tensor(values, dtype=torch.float32)[None, None]


def kept(mask):
    """The kept blocks of each row of the first head."""
    assert torch.equal(mask.to_dense(), mask.keep)
    return [row.nonzero().flatten().tolist() for row in mask.keep[0, 0]]


def test_without_a_mass_the_best_blocks_are_kept():
    assert kept(select_blocks(rows([1, 5, 2, 4], [9, 0, 0, 1]), max_blocks=2)) == [[1, 3], [0, 3]]


def test_ties_go_to_the_lower_index():
    assert kept(select_blocks(rows([1, 2, 2, 2], [3, 3, 3, 3]), max_blocks=2)) == [[1, 2], [0, 1]]


def test_zeros_of_either_sign_are_ties_and_the_smallest_difference_is_none():
    least = torch.finfo(torch.float32).smallest_normal
    assert kept(select_blocks(rows([-0.0, 0.0, least, 0.0], [1, -0.0, 0, 0]), max_blocks=2)) == [[0, 2], [0, 1]]


def test_the_block_that_crosses_the_mass_is_kept():
    importance = rows([4, 3, 2, 1], [10, 0, 0, 0])
    assert kept(select_blocks(importance, cumulative_mass=0.6)) == [[0, 1], [0]]
    assert kept(select_blocks(importance, cumulative_mass=0.75)) == [[0, 1, 2], [0]]


def test_a_mass_that_is_met_exactly_is_enough():
    assert kept(select_blocks(rows([4, 2, 1, 1]), cumulative_mass=0.75)) == [[0, 1]]
    assert kept(select_blocks(rows([4, 2, 1, 1]), cumulative_mass=0.5)) == [[0]]
    assert kept(select_blocks(rows([4, 2, 1, 1]), cumulative_mass=1.0)) == [[0, 1, 2, 3]]


def test_equal_rows_need_their_share_of_blocks():
    assert kept(select_blocks(torch.ones(1, 1, 1, 16), cumulative_mass=0.5)) == [list(range(8))]
    assert kept(select_blocks(torch.ones(1, 1, 1, 16), cumulative_mass=0.51)) == [list(range(9))]


def test_one_dominant_block_is_enough_alone():
    importance = torch.full((1, 1, 1, 300), 1e-6)
    importance[..., 123] = 1.0
    assert kept(select_blocks(importance, cumulative_mass=0.95)) == [[123]]


def test_a_row_of_zeros_keeps_a_block():
    assert kept(select_blocks(torch.zeros(1, 1, 1, 4), cumulative_mass=0.9)) == [[0]]


def test_the_clamps():
    importance = rows([100, 1, 1, 1, 1], [1, 1, 1, 1, 1])
    mask = select_blocks(importance, cumulative_mass=0.9, min_blocks=2, max_blocks=3)
    assert kept(mask) == [[0, 1], [0, 1, 2]] and mask.capacity == 3
    assert select_blocks(importance, max_blocks=9).capacity == 5  # there are no more


def test_masses_are_summed_in_single_precision():
    """In float16 this sum would be infinite."""
    importance = torch.full((1, 1, 1, 1024), 100.0, dtype=torch.float16)
    assert select_blocks(importance, cumulative_mass=0.75).counts.item() == 768


def test_forced_key_blocks_are_paid_from_the_budget():
    importance = rows([4, 3, 2, 1, 0])
    forced = torch.tensor([False, False, False, True, True])
    assert kept(select_blocks(importance, max_blocks=3, forced_key_blocks=forced)) == [[0, 3, 4]]
    assert kept(select_blocks(importance, max_blocks=1, forced_key_blocks=forced)) == [[3, 4]]


def test_the_mass_of_forced_blocks_counts():
    importance = rows([1, 5, 2, 2])
    forced = torch.tensor([True, False, False, False])
    assert kept(select_blocks(importance, cumulative_mass=0.6, forced_key_blocks=forced)) == [[0, 1]]
    forced = torch.tensor([False, True, False, False])
    assert kept(select_blocks(importance, cumulative_mass=0.5, forced_key_blocks=forced)) == [[1]]


def test_forced_query_blocks_keep_everything():
    importance = rows([4, 3, 2, 1], [1, 2, 3, 4])
    mask = select_blocks(importance, max_blocks=1, forced_query_blocks=torch.tensor([False, True]))
    assert kept(mask) == [[0], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("block_size", "shape", "radius", "expected"),
    [
        ((8, 8), (3, 3), 0, [[0], [1], [2]]),
        ((8, 8), (3, 3), 1, [[0, 1], [0, 1, 2], [1, 2]]),
        ((16, 8), (2, 4), 0, [[0, 1], [2, 3]]),
        ((8, 16), (4, 2), 0, [[0], [0], [1], [1]]),
        ((12, 8), (3, 5), 0, [[0, 1], [1, 2], [3, 4]]),
    ],
)
def test_local_blocks_share_the_positions_of_the_queries(block_size, shape, radius, expected):
    mask = select_blocks(torch.zeros(1, 1, *shape), block_size, max_blocks=1, local_radius=radius)
    assert kept(mask) == expected
    assert mask.capacity <= max(len(row) for row in expected) + 1


def test_nothing_waits_for_the_device():
    """On a device without data every step that would read a value fails."""
    importance = torch.rand(2, 3, 5, 7, device="meta")
    flags = torch.zeros(7, dtype=torch.bool, device="meta")
    mask = select_blocks(importance, cumulative_mass=0.9, max_blocks=3, forced_key_blocks=flags, local_radius=1)
    assert mask.keep.shape == (2, 3, 5, 7)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 12)),
    st.integers(1, 14),
    st.integers(1, 14),
    st.none() | st.floats(0.01, 1),
    st.booleans(),
    st.none() | st.integers(0, 2),
    st.integers(0, 99),
)
def test_invariants(shape, first, second, mass, force, radius, seed):
    """Every row keeps a block; no more than asked for, but for forced blocks; and those are kept."""
    most, fewest = max(first, second), min(first, second, shape[-1])
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(shape, generator=generator)
    flags = torch.rand(shape[-1], generator=generator) < 0.3 if force else None
    extra = seed % shape[2]
    mask = select_blocks(
        importance,
        (8, 8),
        max_blocks=most,
        extra_blocks=extra,
        min_blocks=fewest,
        cumulative_mass=mass,
        forced_key_blocks=flags,
        local_radius=radius,
    )
    forced = torch.zeros(shape[2:], dtype=torch.bool) if flags is None else flags.expand(shape[2:]).clone()
    if radius is not None:
        near = (torch.arange(shape[2]).unsqueeze(1) - torch.arange(shape[3])).abs() <= radius
        forced |= near
    assert bool((mask.keep | ~forced).all())
    assert bool((mask.counts >= min(fewest, shape[3])).all())
    allowed = most + torch.tensor([(row + 1) * extra // shape[2] - row * extra // shape[2] for row in range(shape[2])])
    assert bool((mask.counts <= torch.maximum(forced.sum(-1), allowed)).all())
    if mass is None and not force and radius is None:
        assert torch.equal(mask.counts, allowed.clamp(max=shape[3]).expand_as(mask.counts).to(torch.int32))
    assert torch.equal(mask.to_dense(), mask.keep)
    better = torch.where(mask.keep & ~forced, importance, 2.0).amin(-1)
    worse = torch.where(mask.keep, -1.0, importance).amax(-1)
    assert bool((better >= worse).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_blocks": 0}, "got 1 and 0"),
        ({"min_blocks": 3, "max_blocks": 2}, "1 <= min_blocks <= max_blocks, .* got 3 and 2"),
        ({"extra_blocks": 1}, "`extra_blocks` must be from 0 to 0, less than rows, got 1"),
        ({"min_blocks": 9}, "at most the 4 key blocks, got 9 and None"),
        ({"cumulative_mass": 0.0}, r"`cumulative_mass` must be in \(0, 1\] or None, got 0.0"),
        ({"cumulative_mass": 1.1}, "got 1.1"),
        ({"local_radius": -1}, "`local_radius` must be at least 0 blocks or None, got -1"),
        ({"forced_key_blocks": torch.ones(4)}, r"`forced_key_blocks` must be bool of shape \(4,\)"),
        (
            {"forced_query_blocks": torch.ones(4, dtype=torch.bool)},
            r"`forced_query_blocks` must be bool of shape \(1,\)",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        select_blocks(rows([4, 3, 2, 1]), **arguments)


def test_importance_of_another_shape_is_refused():
    with pytest.raises(
        ValueError, match=r"`importance` must be floating point .* got torch.float32 of shape \(2, 2\)"
    ):
        select_blocks(torch.rand(2, 2))


def test_random_blocks_are_drawn_in_every_row_by_themselves():
    shape, forced = (2, 3, 20, 20), torch.zeros(20, dtype=torch.bool)
    forced[19] = True
    first, again = (
        random_blocks(shape, 5, generator=torch.Generator().manual_seed(0), forced_key_blocks=forced) for _ in range(2)
    )
    assert torch.equal(first.keep, again.keep)
    assert bool((first.counts == 5).all()) and bool(first.keep[..., 19].all())
    assert len({tuple(row.tolist()) for row in first.keep.view(-1, 20)}) > 100


def test_local_blocks_keep_as_many_at_the_ends():
    assert kept(local_blocks(5, 5, 3, (8, 8))) == [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]
    assert kept(local_blocks(2, 4, 2, (16, 8))) == [[0, 1], [2, 3]]


def test_with_a_budget_for_the_layer_rows_and_heads_compete():
    importance = torch.tensor([[[9, 8, 7, 0], [1, 0, 0, 0]], [[2, 1, 0, 0], [6, 5, 0, 3]]], dtype=torch.float32)
    mask = select_blocks(importance[None], max_blocks=2, budget="layer")
    assert [[row.nonzero().flatten().tolist() for row in head] for head in mask.keep[0]] == [
        [[0, 1, 2], [0]],
        [[0], [0, 1, 3]],
    ]
    assert torch.equal(mask.to_dense(), mask.keep)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(2, 20)),
    st.integers(1, 19),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 1),
    st.sampled_from([1, 3, 4096]),
    st.integers(0, 99),
)
def test_a_layer_keeps_what_the_specification_keeps(shape, blocks, keys, queries, radius, values, seed):
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, values, shape, generator=generator) / 4096
    limit = min(blocks, shape[-1] - 1)
    options = {
        "max_blocks": limit,
        "extra_blocks": seed % shape[-2],
        "min_blocks": 1 + seed % limit,
        "forced_key_blocks": torch.rand(shape[-1], generator=generator) < 0.2 if keys else None,
        "forced_query_blocks": torch.rand(shape[-2], generator=generator) < 0.2 if queries else None,
        "local_radius": radius,
        "budget": "layer",
    }
    masks = [select_blocks(importance, (8, 8), **options, implementation=name) for name in ("cpu", "naive")]
    assert torch.equal(masks[0].keep, masks[1].keep) and torch.equal(masks[0].indices, masks[1].indices)
    if not keys and not queries and radius is None:
        asked = shape[1] * (limit * shape[2] + options["extra_blocks"])
        assert masks[0].counts.sum((1, 2)).tolist() == [asked] * shape[0]


def test_a_budget_for_the_layer_needs_no_mass():
    with pytest.raises(ValueError, match=r'`cumulative_mass` must be None with `budget="layer"`, got 0.9'):
        select_blocks(rows([1, 2]), cumulative_mass=0.9, budget="layer")
    with pytest.raises(ValueError, match="`budget` must be one of row, layer, got 'head'"):
        select_blocks(rows([1, 2]), budget="head")
