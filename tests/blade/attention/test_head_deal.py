"""The deal of heads to ranks."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blade.attention.head_deal import TOLERANCE, deal_heads, equal_deal, slowest


def least_possible(costs, ranks):
    """The cost of the slowest rank in the best of all deals."""
    deals = product(range(ranks), repeat=len(costs))
    return min(max(np.bincount(deal, weights=costs, minlength=ranks)) for deal in deals)


def assert_each_once(deal, heads, ranks):
    assert len(deal) == ranks
    assert sorted(head for share in deal for head in share) == list(range(heads))
    assert all(list(share) == sorted(share) for share in deal)


@settings(max_examples=150, deadline=None)
@given(
    costs=st.lists(st.one_of(st.floats(0.1, 1.0), st.sampled_from([0.1, 0.2, 1.0])), min_size=1, max_size=7),
    ranks=st.integers(1, 4),
)
def test_the_deal_is_as_good_as_the_best_of_all(costs, ranks):
    """Costs differ by up to ten times; what is within the tolerance of the mean is not improved."""
    deal = deal_heads(tuple(costs), ranks)
    assert_each_once(deal, len(costs), ranks)
    best = least_possible(costs, ranks)
    assert slowest(deal, costs) <= max(best, (1 + TOLERANCE) * sum(costs) / ranks) * (1 + 1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("heads", [12, 24, 40, 56])
def test_costs_that_differ_by_ten_times_end_within_a_tenth_of_the_mean(heads, ranks):
    """Wherever that is possible: a head that costs more than the mean of a rank bounds any deal."""
    generator = np.random.default_rng([heads, ranks])
    checked = 0
    for _ in range(40):
        costs = tuple(generator.choice([0.1, 0.15, 0.3, 0.6, 1.0], heads, p=[0.3, 0.2, 0.2, 0.2, 0.1]))
        mean = sum(costs) / ranks
        deal = deal_heads(costs, ranks)
        assert_each_once(deal, heads, ranks)
        if heads >= 5 * ranks and max(costs) <= mean:
            checked += 1
            assert slowest(deal, costs) <= 1.1 * mean, costs
    assert checked or heads < 5 * ranks


def test_equal_costs_keep_neighbours_together():
    assert deal_heads((0.5,) * 7, 3) == equal_deal(7, 3) == ((0, 1, 2), (3, 4), (5, 6))
    assert equal_deal(2, 4) == ((0,), (1,), (), ())


def test_the_longest_first_rule_is_improved_upon():
    """Heads of 3, 3, 2, 2, 2 on two ranks: the rule gives 7 and 5, and 6 and 6 is possible."""
    assert slowest(deal_heads((3.0, 3.0, 2.0, 2.0, 2.0), 2), (3, 3, 2, 2, 2)) == 6
