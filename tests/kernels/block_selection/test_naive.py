"""The specification of block selection against values worked out by hand, and the CPU's choice against it."""

import pytest
import torch
from blade_kernels.block_selection import sampled_importance, select_blocks
from hypothesis import given, settings
from hypothesis import strategies as st


def score(queries, weights, query_offsets, key_offsets, **options):
    """Scores of blocks of two tokens, of keys that have these softmax weights for a query of 1."""
    q = torch.tensor(queries).view(1, -1, 1, 1)
    k = torch.tensor(weights).log().view(1, -1, 1, 1)
    offsets = torch.tensor(query_offsets), torch.tensor(key_offsets)
    return sampled_importance(q, k, *offsets, (2, 2), scale=1.0, implementation="naive", **options)[0, 0]


def test_a_short_block_has_its_offsets_scaled():
    """The second key of every block, and the only one of the last."""
    found = score([1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0], [1])
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0, 5.0]]) / 11)
    found = score([1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0], [1], softmax_denominator=False)
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0, 5.0]]) / 5)


def test_a_token_that_is_met_twice_counts_once():
    found = score([1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0], [0, 1])
    torch.testing.assert_close(found, torch.tensor([[2.0, 4.0, 5.0]]) / 15)


def test_the_best_of_the_sampled_queries_counts():
    """Queries of 1 and of 2, to which the weights are squares; the last block holds another query of 1."""
    weights = [1.0, 2.0, 3.0, 4.0]
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]) / 10, torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    both = torch.maximum(first, second)
    found = score([1.0, 2.0, 1.0], weights, [0, 1], [0, 1])
    torch.testing.assert_close(found, torch.stack((both, first)).unflatten(1, (2, 2)).amax(-1))
    found = score([1.0, 2.0, 1.0], weights, [1], [0, 1])
    torch.testing.assert_close(found, torch.stack((second, first)).unflatten(1, (2, 2)).amax(-1))


@pytest.mark.parametrize(("statistic", "power"), [("mean", 1), ("rms", 2)])
def test_the_mass_of_a_block_is_averaged_over_the_sampled_queries(statistic, power):
    """Queries of 1 and of 2; of the last block's only query, another 1, both offsets are drawn."""
    first, second = torch.tensor([3.0, 7.0]) / 10, torch.tensor([5.0, 25.0]) / 30
    both = ((first**power + second**power) / 2) ** (1 / power)
    found = score([1.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [0, 1], [0, 1], statistic=statistic)
    torch.testing.assert_close(found, torch.stack((both, first)))


@pytest.mark.parametrize(("length", "expected"), [(5, [2 / 11, 4 / 11, 5 / 11]), (3, [0.4, 0.6, 0.0]), (0, [0.0] * 3)])
def test_absent_keys_score_nothing_and_take_no_part(length, expected):
    found = score([1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0], [0], [1], key_lengths=torch.tensor([length]))
    torch.testing.assert_close(found, torch.tensor([expected]))


def test_precision_and_gradients():
    q = torch.randn(1, 9, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16).requires_grad_()
    offsets = torch.arange(2)
    found = sampled_importance(q, q, offsets, offsets, (4, 4), implementation="naive")
    assert found.dtype == torch.float32 and not found.requires_grad
    exact = sampled_importance(q.double(), q.double(), offsets, offsets, (4, 4), implementation="naive")
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_blocks": 2}, [0, 2]),
        ({"max_blocks": 3}, [0, 1, 2]),  # of equals, the first
        ({"cumulative_mass": 0.5}, [0, 2]),  # 4 of 10 are too few
        ({"cumulative_mass": 0.4}, [0]),  # and here just enough
        ({"cumulative_mass": 0.4, "min_blocks": 2}, [0, 2]),
        ({"cumulative_mass": 0.9, "max_blocks": 2}, [0, 2]),
        ({"max_blocks": 2, "forced_key_blocks": torch.tensor([0, 0, 0, 0, 1]).bool()}, [0, 4]),
        ({"max_blocks": 1, "forced_key_blocks": torch.tensor([0, 1, 0, 0, 1]).bool()}, [1, 4]),
        ({"cumulative_mass": 0.4, "forced_key_blocks": torch.tensor([0, 0, 0, 0, 1]).bool()}, [0, 4]),
        ({"max_blocks": 1, "forced_query_blocks": torch.tensor([True])}, [0, 1, 2, 3, 4]),
        ({"max_blocks": 1, "local_radius": 1}, [0, 1]),
    ],
)
def test_choices_worked_out_by_hand(options, expected):
    importance = torch.tensor([4.0, 1.5, 3.0, 1.5, 0.0])[None, None, None]
    mask = select_blocks(importance, (8, 8), implementation="naive", **options)
    assert mask.keep[0, 0, 0].nonzero().flatten().tolist() == expected
    assert torch.equal(mask.to_dense(), mask.keep)


def test_extra_blocks_are_spread_over_the_rows():
    mask = select_blocks(torch.rand(1, 2, 5, 9), (8, 8), max_blocks=3, extra_blocks=2, implementation="naive")
    assert mask.counts[0].tolist() == [[3, 3, 4, 3, 4]] * 2


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 5), st.integers(1, 40)),
    st.integers(1, 44),
    st.integers(1, 44),
    st.none() | st.sampled_from([0.125, 0.5, 0.75, 0.9375, 1.0]),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 2),
    st.sampled_from([(8, 16), (16, 8), (12, 8)]),
    st.sampled_from([2, 4096]),
    st.integers(0, 99),
)
def test_cpu_chooses_what_is_specified(shape, first, second, mass, keys, queries, radius, block_size, values, seed):
    """Many ties and none; importance in multiples of 1/4096, so that sums do not depend on their order."""
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, values, shape, generator=generator) / 4096
    options = {
        "max_blocks": max(first, second),
        "extra_blocks": seed % shape[-2],
        "min_blocks": min(first, second, shape[-1]),
        "cumulative_mass": mass,
        "forced_key_blocks": torch.rand(shape[-1], generator=generator) < 0.2 if keys else None,
        "forced_query_blocks": torch.rand(shape[-2], generator=generator) < 0.2 if queries else None,
        "local_radius": radius,
    }
    found, exact = (select_blocks(importance, block_size, **options, implementation=name) for name in ("cpu", "naive"))
    assert torch.equal(found.keep, exact.keep)
    assert torch.equal(found.counts, exact.counts)
    assert torch.equal(found.indices, exact.indices)
