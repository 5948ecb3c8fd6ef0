"""Choosing a pattern for every head: the published rule, and the least error under one budget for all."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from blade.common.checks import check_number

MOST_STATES = 20_000
"""Sums of cost and error that are kept at a time where the choice is made exact."""

CORE = 64
"""Heads whose choice is made exact where there are too many to do so for all."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A choice of one candidate for every item."""

    choice: np.ndarray
    """(items,) int, the candidate of each."""
    error: float
    """Sum of their errors."""
    cost: float
    """Sum of their costs."""
    bound: float
    """No choice within the budget has a smaller error."""

    @property
    def gap(self) -> float:
        """By how much the error may exceed the smallest one, as a share of it; 0: it is the smallest."""
        return 0.0 if self.error <= self.bound else (self.error - self.bound) / max(self.bound, 1e-300)


@dataclass(frozen=True, kw_only=True)
class GreedyRule:
    """The published rule: every head by itself.

    Loss = error / scale + weight * (1 - sparsity). If no pattern but the full one has a loss of at most the threshold,
    the head stays full; else it takes the pattern of the least loss. The paper does not say on which scale its errors
    are; here it is the mean energy of the layer's heads, so that an error of 1 is that of a layer without attention.

    Source: Sparse-vDiT, arXiv 2506.03065, eq. 2 and algorithm 1, with the sign of eq. 2.
    """

    weight: float = 0.5
    """lambda: what computing everything counts."""
    threshold: float = 1.0
    """epsilon: the largest loss that a pattern may have."""

    def __post_init__(self) -> None:
        check_number("weight", self.weight, "at least 0", lambda x: x >= 0)
        check_number("threshold", self.threshold, "at least 0", lambda x: x >= 0)

    def losses(self, errors: np.ndarray, densities: np.ndarray) -> np.ndarray:
        """The losses of all candidates.

        Args:
            errors: (..., candidates, heads), mean squared errors of each head's output. Candidate 0 is the full
                pattern, candidate 1 the skipped head, whose error is the head's energy.
            densities: (candidates,), share of the pairs that each computes.

        Returns:
            (..., candidates, heads).
        """
        scale = errors[..., 1:2, :].mean(-1, keepdims=True)
        losses: np.ndarray = errors / np.maximum(scale, 1e-30) + self.weight * densities[:, None]
        return losses

    def decide(self, losses: np.ndarray) -> np.ndarray:
        """The candidate of every head, (..., heads) int, from `losses`."""
        best = losses[..., 1:, :].argmin(-2) + 1
        least = np.take_along_axis(losses, best[..., None, :], -2)[..., 0, :]
        return np.where(least > self.threshold, 0, best)

    def choose(self, errors: np.ndarray, densities: np.ndarray) -> np.ndarray:
        """The candidate of every head, (..., heads) int. See `losses`."""
        return self.decide(self.losses(errors, densities))


def least_error(errors: np.ndarray, costs: np.ndarray, budget: float) -> Assignment:
    """Choose a candidate for every item, so that the costs sum up to no more than a budget and the errors to little.

    Args:
        errors: (items, candidates), not negative.
        costs: (items, candidates), not negative.
        budget: for the sum of the costs.

    Returns:
        The choice, with a bound on what any other could reach: that of the problem in which candidates may be mixed.
        For few items the choice is exact.

    Raises:
        ValueError: if even the cheapest choice costs more.
    """
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    least = costs.min(1).sum()
    if least > budget * (1 + 1e-9):
        raise ValueError(f"`budget` must be at least {least:.6g}, the cost of the cheapest choice, got {budget:.6g}.")
    hulls = [_hull(error, cost) for error, cost in zip(errors, costs)]
    choice = np.array([hull[0] for hull in hulls])
    spent = costs[np.arange(len(costs)), choice].sum()
    moves = []  # (error saved for a unit of cost, item, place in its hull, cost)
    for item, hull in enumerate(hulls):
        for place, (one, other) in enumerate(pairwise(hull), start=1):
            more = costs[item, other] - costs[item, one]
            moves.append(((errors[item, one] - errors[item, other]) / more, item, place, more))
    moves.sort(key=lambda move: -move[0])
    bound, slopes = None, np.zeros(len(costs))
    blocked = np.zeros(len(costs), dtype=bool)
    left = budget - spent
    for slope, item, place, more in moves:
        if bound is None and more > left + 1e-12:
            bound = _total(errors, choice) - slope * left
        if blocked[item] or more > left + 1e-12:
            # the item's later moves build on this one
            slopes[item] = max(slopes[item], slope)
            blocked[item] = True
            continue
        choice[item] = hulls[item][place]
        left -= more
    bound = _total(errors, choice) if bound is None else max(bound, 0.0)
    # the items that were nearly given more, or nearly less, are chosen anew together
    core = np.argsort(-slopes, kind="stable")[: CORE if len(costs) > 4 * CORE else len(costs)]
    room = left + costs[core, choice[core]].sum()
    better, exact = _pareto(errors[core], costs[core], room)
    if better is not None and errors[core, better].sum() < errors[core, choice[core]].sum():
        choice[core] = better
    error = _total(errors, choice)
    if exact and len(core) == len(costs):
        bound = error
    return Assignment(choice=choice, error=error, cost=_total(costs, choice), bound=min(bound, error))


def least_cost(errors: np.ndarray, costs: np.ndarray, most_error: float) -> Assignment:
    """Choose a candidate for every item, so that the errors sum up to no more than a limit and the costs to little.

    Args:
        errors: (items, candidates), not negative.
        costs: (items, candidates), not negative.
        most_error: for the sum of the errors.

    Returns:
        The choice; its `bound` is on the error, as it is the other way around: that of the choice itself.

    Raises:
        ValueError: if even the choice of the least error has more.
    """
    found = least_error(costs, errors, most_error)
    return Assignment(choice=found.choice, error=found.cost, cost=found.error, bound=found.cost)


def _total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(values[np.arange(len(values)), choice].sum())


def _hull(errors: np.ndarray, costs: np.ndarray) -> list[int]:
    """Candidates that some price makes the best, from the cheapest to the one of the least error."""
    order = np.lexsort((errors, costs))
    hull: list[int] = []
    for candidate in order:
        if hull and errors[candidate] >= errors[hull[-1]]:
            continue
        if hull and costs[candidate] <= costs[hull[-1]]:
            continue
        while len(hull) > 1:
            first, second = hull[-2], hull[-1]
            before = (errors[first] - errors[second]) / (costs[second] - costs[first])
            after = (errors[second] - errors[candidate]) / (costs[candidate] - costs[second])
            if after < before:
                break
            hull.pop()
        hull.append(int(candidate))
    return hull


def _pareto(errors: np.ndarray, costs: np.ndarray, budget: float) -> tuple[np.ndarray | None, bool]:
    """The best choice by keeping every sum of cost and error that no other one beats; whether none was let go."""
    sum_cost, sum_error = np.zeros(1), np.zeros(1)
    trails, exact = [], True
    rest = np.concatenate((np.cumsum(costs.min(1)[::-1])[::-1][1:], [0.0]))  # what later items take at least
    for item in range(len(costs)):
        cost = (sum_cost[:, None] + costs[item]).ravel()
        error = (sum_error[:, None] + errors[item]).ravel()
        order = np.lexsort((error, cost))
        order = order[cost[order] <= (budget - rest[item]) * (1 + 1e-12) + 1e-12]
        if not len(order):
            return None, False
        lowest = np.minimum.accumulate(error[order])
        kept = order[np.concatenate(([True], lowest[1:] < lowest[:-1]))]
        if len(kept) > MOST_STATES:
            exact = False
            kept = kept[np.linspace(0, len(kept) - 1, MOST_STATES).astype(int)]
        trails.append(kept)
        sum_cost, sum_error = cost[kept], error[kept]
    place, width = int(sum_error.argmin()), costs.shape[1]
    choice = np.zeros(len(costs), dtype=int)
    for item in range(len(costs) - 1, -1, -1):
        place, choice[item] = divmod(int(trails[item][place]), width)
    return choice, exact
