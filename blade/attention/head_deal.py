"""The deal of a layer's heads to ranks, so that ranks whose heads cost unequally finish together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

from blade.common.checks import check_integer

Deal = tuple[tuple[int, ...], ...]
"""Numbers of the heads of each rank, ascending."""

TOLERANCE = 0.02
"""Excess of the slowest rank over the mean cost below which no better deal is looked for."""

MOST_STATES = 50_000
"""Partial deals that the search for a better one looks at."""


def shares(count: int, ranks: int) -> tuple[int, ...]:
    """Return the sizes of the pieces that `torch.tensor_split` cuts so many things into: the first are larger by one.

    Raises:
        ValueError: if there is no rank.
    """
    check_integer("ranks", ranks, least=1)
    size, larger = divmod(count, ranks)
    return tuple(size + (rank < larger) for rank in range(ranks))


def equal_deal(heads: int, ranks: int) -> Deal:
    """Deal heads that cost the same: neighbours together, and one more to the first ranks where they do not divide."""
    return tuple(tuple(range(*ends)) for ends in pairwise(accumulate(shares(heads, ranks), initial=0)))


@cache
def deal_heads(costs: tuple[float, ...], ranks: int) -> Deal:
    """Deal heads by cost, so that the slowest rank has as little as possible.

    The longest processing time goes first, to the rank that has least so far. Where the slowest rank then has more
    than `TOLERANCE` above the mean, a depth-first search with bounds looks for a better deal. It is exact for few
    heads; for many it stops after `MOST_STATES` partial deals, with the best so far.

    Args:
        costs: cost of each head, at least 0, in any unit.
        ranks: number of ranks.

    Returns:
        The heads of each rank. Equal costs give `equal_deal`. Of ranks with the same load, one with fewer heads comes
        first.

    Source: R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969, for the first rule.
    """
    if len(set(costs)) <= 1:
        return equal_deal(len(costs), ranks)
    order = sorted(range(len(costs)), key=lambda head: -costs[head])
    placed = _longest_first(costs, order, ranks)
    bound = max(sum(costs) / ranks, max(costs))
    if slowest(placed, costs) > bound * (1 + TOLERANCE):
        placed = _Search(costs, order, ranks, placed).run()
    return tuple(tuple(sorted(heads)) for heads in placed)


def slowest(deal: Sequence[Sequence[int]], costs: Sequence[float]) -> float:
    """Return the cost of the rank that has most."""
    return max(sum(costs[head] for head in heads) for heads in deal)


def _longest_first(costs: Sequence[float], order: Sequence[int], ranks: int) -> list[list[int]]:
    placed: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for head in order:
        rank = min(range(ranks), key=lambda rank: (loads[rank], len(placed[rank])))
        placed[rank].append(head)
        loads[rank] += costs[head]
    return placed


class _Search:
    """Depth-first search for a deal whose slowest rank has less, the heads that cost most first."""

    def __init__(self, costs: Sequence[float], order: Sequence[int], ranks: int, placed: list[list[int]]) -> None:
        self.costs, self.order, self.ranks = costs, order, ranks
        self.best, self.least = [list(heads) for heads in placed], slowest(placed, costs)
        self.goal = max(sum(costs) / ranks, max(costs)) * (1 + TOLERANCE)
        self.loads = [0.0] * ranks
        self.placed: list[list[int]] = [[] for _ in range(ranks)]
        self.states = 0

    def run(self) -> list[list[int]]:
        """Return the best deal that was seen."""
        self._place(0)
        return self.best

    def _place(self, number: int) -> bool:
        """Deal the heads from a number on; return True if the search is over."""
        if number == len(self.order):
            load = max(self.loads)
            if load < self.least:
                self.best, self.least = [list(heads) for heads in self.placed], load
            return self.least <= self.goal
        self.states += 1
        if self.states > MOST_STATES:
            return True
        head = self.order[number]
        tried = set()
        for rank in sorted(range(self.ranks), key=self.loads.__getitem__):
            load = self.loads[rank]
            if load in tried or load + self.costs[head] >= self.least * (1 - 1e-9):
                continue
            tried.add(load)
            self.placed[rank].append(head)
            self.loads[rank] = load + self.costs[head]
            over = self._place(number + 1)
            self.loads[rank] = load
            self.placed[rank].pop()
            if over:
                return True
        return False
