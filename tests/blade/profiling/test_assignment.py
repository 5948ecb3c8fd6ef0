"""The published rule, and the least error under a budget against trying everything."""

import itertools

import numpy as np
import pytest

from blade.profiling.assignment import GreedyRule, least_cost, least_error


def instance(rng, items, candidates):
    """Errors and costs; candidate 0 is the full pattern."""
    errors, costs = rng.random((items, candidates)) ** 3, rng.random((items, candidates))
    errors[:, 0], costs[:, 0] = 0.0, 1.0
    return errors, costs


def greedy(errors, densities, weight=0.5, threshold=1.0):
    """The published rule's choice, with errors as they are."""
    rule = GreedyRule(weight=weight, threshold=threshold)
    return rule.decide((errors + weight * densities).T)


@pytest.mark.slow
def test_nothing_within_the_budget_has_a_smaller_error():
    rng = np.random.default_rng(0)
    for _ in range(100):
        errors, costs = instance(rng, *rng.integers(2, 7, 2))
        low, high = costs.min(1).sum(), costs.max(1).sum()
        budget = low + rng.random() * (high - low)
        every = itertools.product(range(errors.shape[1]), repeat=len(errors))
        rows = np.arange(len(errors))
        best = min(errors[rows, list(one)].sum() for one in every if costs[rows, list(one)].sum() <= budget)
        found = least_error(errors, costs, budget)
        assert found.cost <= budget + 1e-9
        assert found.error == pytest.approx(best) and found.gap == 0
        assert least_cost(errors, costs, found.error + 1e-12).cost <= found.cost + 1e-9


@pytest.mark.parametrize("threshold", [0.2, 0.6, 1.0])
def test_it_is_never_worse_than_the_published_rule_at_its_cost(threshold):
    rng = np.random.default_rng(1)
    for items in (5, 60, 3000):
        errors = rng.random((items, 8)) ** 2 * 2 * rng.random((items, 1))
        densities = np.linspace(1, 0, 8)
        errors[:, 0] = 0.0
        choice = greedy(errors, densities, threshold=threshold)
        rows = np.arange(items)
        found = least_error(errors, np.broadcast_to(densities, errors.shape), densities[choice].sum())
        assert found.error <= errors[rows, choice].sum() + 1e-9
        assert found.gap < 0.01


def test_a_larger_threshold_never_keeps_more():
    rng = np.random.default_rng(2)
    errors, densities = rng.random((200, 5)) * 2, np.array([1.0, 0.6, 0.3, 0.2, 0.0])
    errors[:, 0] = 0.0
    kept = [densities[greedy(errors, densities, threshold=t)].sum() for t in (0.0, 0.2, 0.5, 1.0, 2.0, 9.0)]
    assert kept == sorted(kept, reverse=True) and kept[0] == 200 and kept[-1] < 120
    # without a cost, and with nothing too bad, no head stays full
    assert (greedy(errors, densities, weight=0.0, threshold=1e30) > 0).all()


def test_a_budget_below_the_cheapest_choice_is_refused_with_that():
    with pytest.raises(ValueError, match=r"`budget` must be at least 0\.5, the cost of the cheapest choice, got 0\.4"):
        least_error(np.zeros((1, 2)), np.array([[1.0, 0.5]]), 0.4)
