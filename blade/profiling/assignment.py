"""Choice of a pattern for every head: by the published rule, or for the least error under one shared budget."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from blade.common.checks import check_number

MOST_STATES = 20_000
"""Most pairs of total cost and error that the exact search keeps at a time."""

CORE = 64
"""Heads whose choice is refined exactly when there are too many to do so for all."""


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
    """Lower bound: no choice within the budget has a smaller error."""

    @property
    def gap(self) -> float:
        """Upper bound on the share by which the error exceeds the smallest possible one; 0: it is the smallest."""
        return 0.0 if self.error <= self.bound else (self.error - self.bound) / max(self.bound, 1e-300)


@dataclass(frozen=True, kw_only=True)
class GreedyRule:
    """The published rule, which decides on every head independently.

    Loss = error / scale + weight * (1 - sparsity). If no pattern but the full one has a loss of at most the threshold,
    the head stays full; otherwise it takes the pattern of the least loss. The paper does not give the scale of its
    errors; here it is the mean energy of the layer's heads, so that 1 is the error of a layer without attention.

    Source: Sparse-vDiT, arXiv 2506.03065, eq. 2 and algorithm 1, with the sign of eq. 2.
    """

    weight: float = 0.5
    """lambda: the penalty for computing everything."""
    threshold: float = 1.0
    """epsilon: the largest loss that a pattern may have."""

    def __post_init__(self) -> None:
        check_number("weight", self.weight, "at least 0", lambda x: x >= 0)
        check_number("threshold", self.threshold, "at least 0", lambda x: x >= 0)

    def losses(self, errors: np.ndarray, densities: np.ndarray) -> np.ndarray:
        """Return the losses of all candidates.

        Args:
            errors: (..., candidates, heads), mean squared errors of each head's output. Candidate 0 is the full
                pattern, candidate 1 the skipped head, whose error is the head's energy.
            densities: (candidates,), share of all pairs that each computes.

        Returns:
            (..., candidates, heads).
        """
        scale = errors[..., 1:2, :].mean(-1, keepdims=True)
        losses: np.ndarray = errors / np.maximum(scale, 1e-30) + self.weight * densities[:, None]
        return losses

    def decide(self, losses: np.ndarray) -> np.ndarray:
        """Return the candidate of every head, (..., heads) int, given the result of `losses`."""
        best = losses[..., 1:, :].argmin(-2) + 1
        least = np.take_along_axis(losses, best[..., None, :], -2)[..., 0, :]
        return np.where(least > self.threshold, 0, best)

    def choose(self, errors: np.ndarray, densities: np.ndarray) -> np.ndarray:
        """Return the candidate of every head, (..., heads) int; see `losses` for the arguments."""
        return self.decide(self.losses(errors, densities))


def least_error(errors: np.ndarray, costs: np.ndarray, budget: float) -> Assignment:
    """Choose a candidate for every item so that the total error is small and the total cost is within a budget.

    Args:
        errors: (items, candidates), not negative.
        costs: (items, candidates), not negative.
        budget: limit of the total cost.

    Returns:
        The choice, with a lower bound on the error of any other: the bound of the linear relaxation, in which an item
        may mix candidates. For few items the choice is exact.

    Raises:
        ValueError: if even the cheapest choice exceeds the budget.
    """
    errors, costs = np.asarray(errors, dtype=np.float64), np.asarray(costs, dtype=np.float64)
    least = costs.min(1).sum()
    if least > budget * (1 + 1e-9):
        raise ValueError(f"`budget` must be at least {least:.6g}, the cost of the cheapest choice, got {budget:.6g}.")
    hulls = [_hull(error, cost) for error, cost in zip(errors, costs)]
    choice = np.array([hull[0] for hull in hulls])
    spent = costs[np.arange(len(costs)), choice].sum()
    upgrades = []  # (error saved per unit of cost, item, index in its hull, extra cost)
    for item, hull in enumerate(hulls):
        for index, (cheaper, better) in enumerate(pairwise(hull), start=1):
            extra = costs[item, better] - costs[item, cheaper]
            upgrades.append(((errors[item, cheaper] - errors[item, better]) / extra, item, index, extra))
    upgrades.sort(key=lambda upgrade: -upgrade[0])
    bound, slopes = None, np.zeros(len(costs))
    blocked = np.zeros(len(costs), dtype=bool)
    remaining = budget - spent
    for slope, item, index, extra in upgrades:
        if bound is None and extra > remaining + 1e-12:
            bound = _total(errors, choice) - slope * remaining
        if blocked[item] or extra > remaining + 1e-12:
            # the item's later upgrades build on this one
            slopes[item] = max(slopes[item], slope)
            blocked[item] = True
            continue
        choice[item] = hulls[item][index]
        remaining -= extra
    bound = _total(errors, choice) if bound is None else max(bound, 0.0)
    # the greedy choice is least certain for the items that barely missed an upgrade: choose those again, together
    core = np.argsort(-slopes, kind="stable")[: CORE if len(costs) > 4 * CORE else len(costs)]
    room = remaining + costs[core, choice[core]].sum()
    refined, exact = _pareto(errors[core], costs[core], room)
    if refined is not None and errors[core, refined].sum() < errors[core, choice[core]].sum():
        choice[core] = refined
    error = _total(errors, choice)
    if exact and len(core) == len(costs):
        bound = error
    return Assignment(choice=choice, error=error, cost=_total(costs, choice), bound=min(bound, error))


def least_cost(errors: np.ndarray, costs: np.ndarray, most_error: float) -> Assignment:
    """Choose a candidate for every item so that the total cost is small and the total error is within a limit.

    Args:
        errors: (items, candidates), not negative.
        costs: (items, candidates), not negative.
        most_error: limit of the total error.

    Returns:
        The choice. Its `bound` is its own error, since here the cost is minimized.

    Raises:
        ValueError: if even the choice of the least error exceeds the limit.
    """
    swapped = least_error(costs, errors, most_error)
    return Assignment(choice=swapped.choice, error=swapped.cost, cost=swapped.error, bound=swapped.cost)


def _total(values: np.ndarray, choice: np.ndarray) -> float:
    return float(values[np.arange(len(values)), choice].sum())


def _hull(errors: np.ndarray, costs: np.ndarray) -> list[int]:
    """Return the candidates on the lower convex hull, from the cheapest to the one of the least error."""
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
    """Search all choices, keeping only Pareto-optimal partial sums of cost and error.

    Returns:
        The best choice, None if none is within the budget; and whether no partial sum had to be dropped.
    """
    sum_cost, sum_error = np.zeros(1), np.zeros(1)
    fronts, exact = [], True
    reserved = np.concatenate((np.cumsum(costs.min(1)[::-1])[::-1][1:], [0.0]))  # least cost of all later items
    for item in range(len(costs)):
        cost = (sum_cost[:, None] + costs[item]).ravel()
        error = (sum_error[:, None] + errors[item]).ravel()
        order = np.lexsort((error, cost))
        order = order[cost[order] <= (budget - reserved[item]) * (1 + 1e-12) + 1e-12]
        if not len(order):
            return None, False
        lowest = np.minimum.accumulate(error[order])
        front = order[np.concatenate(([True], lowest[1:] < lowest[:-1]))]
        if len(front) > MOST_STATES:
            exact = False
            front = front[np.linspace(0, len(front) - 1, MOST_STATES).astype(int)]
        fronts.append(front)
        sum_cost, sum_error = cost[front], error[front]
    state, width = int(sum_error.argmin()), costs.shape[1]
    choice = np.zeros(len(costs), dtype=int)
    for item in range(len(costs) - 1, -1, -1):
        state, choice[item] = divmod(int(fronts[item][state]), width)
    return choice, exact
