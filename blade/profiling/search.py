"""From an attention profile to a table of head patterns: a budget for all heads, layers and steps together."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from blade.attention.pattern_table import PatternTable
from blade.attention.patterns import HeadPattern
from blade.common.checks import check_integer
from blade.profiling.assignment import GreedyRule
from blade.profiling.costs import AttentionCosts
from blade.profiling.objectives import Budget, SearchProblem
from blade.profiling.profile import AttentionProfile
from blade.profiling.recording_plan import most_attended_blocks

CURVE_POINTS = 16
"""Budgets at which the least error is worked out for a curve."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A pattern for every head, and what it comes to."""

    candidates: np.ndarray
    """int (groups, layers, heads), numbers of the profile's candidates."""
    group_starts: tuple[int, ...]
    """First step of each group."""
    density: float
    """Share of all pairs that the run computes."""
    error: float
    """Squared error of the attention layers' outputs as a share of their energy, as measured, by its influence."""
    cost: float
    """Cost of attention as a share of dense attention's."""
    gap: float
    """By how much the error, or with `max_error` the cost, may exceed the least one, as a share; 0: not at all."""


class PatternSearch:
    """The errors and costs of every head's candidates, ready for budgets."""

    def __init__(
        self,
        profile: AttentionProfile,
        *,
        groups: int | None = None,
        costs: AttentionCosts | None = None,
        influences: np.ndarray | None = None,
    ) -> None:
        """Put together what heads are chosen by.

        Args:
            profile: what was measured.
            groups: groups of steps that get an assignment each, of equal lengths; None: every step its own.
            costs: of the candidates; None: their densities.
            influences: (steps, layers), how much an error counts there, 1 on average; None: all the same.

        Raises:
            ValueError: if there are more groups than steps.
        """
        source = profile.source
        steps = source.steps
        groups = steps if groups is None else groups
        check_integer("groups", groups, 1)
        if groups > steps:
            raise ValueError(f"`groups` must be at most the number of steps, which is {steps}, got {groups}.")
        self.profile = profile
        self.group_starts = tuple(int(start) for start in np.arange(groups) * steps // groups)
        self.lengths = np.diff((*self.group_starts, steps))
        self.densities = np.array(source.densities)
        self.costs = costs or AttentionCosts.of_operations(source.densities)
        shape = (steps, profile.layers)
        self.influences = np.ones(shape) if influences is None else influences
        if self.influences.shape != shape:
            raise ValueError(f"`influences` must have the shape {shape}, got {self.influences.shape}.")
        errors = relative_errors(profile) * self.influences[:, :, None, None]
        summed = np.add.reduceat(errors, self.group_starts, axis=0)  # (groups, layers, candidates, heads)
        self._shape = (groups, profile.layers, profile.heads)
        self._shares = np.repeat(
            self.lengths / (steps * profile.layers * profile.heads), profile.layers * profile.heads
        )
        self.problem = SearchProblem(
            errors=np.moveaxis(summed, 2, 3).reshape(-1, len(self.densities)) / (steps * profile.layers),
            densities=self._shares[:, None] * self.densities,
            costs=self._shares[:, None] * self.costs.candidates,
            step=self.costs,
        )

    @property
    def least_density(self) -> float:
        """Density of the choice that computes the least."""
        return self.problem.least_density

    def within(self, budget: Budget) -> Choice:
        """The best choice within a budget; of what is best, see `blade.profiling.objectives`.

        Raises:
            ValueError: if no choice is within it; says the nearest one that can be met.
        """
        assignment = budget.meet(self.problem)
        chosen = assignment.choice
        return Choice(
            candidates=chosen.reshape(self._shape),
            group_starts=self.group_starts,
            density=float((self.densities[chosen] * self._shares).sum()),
            error=float(self.problem.errors[np.arange(len(chosen)), chosen].sum()),
            cost=float((self.costs.candidates[chosen] * self._shares).sum()),
            gap=assignment.gap,
        )

    def by_rule(self, rule: GreedyRule, losses: np.ndarray | None = None) -> Choice:
        """What the published rule chooses, every head by itself; steps of a group by the mean of their losses.

        Args:
            rule: the rule.
            losses: (steps, layers, candidates, heads), mean over samples; None: from the profile's errors.
        """
        if losses is None:
            losses = self.losses(rule)
        summed = np.add.reduceat(losses, self.group_starts, axis=0) / self.lengths[:, None, None, None]
        candidates = rule.decide(summed)
        rows = np.arange(candidates.size)
        chosen = candidates.ravel()
        return Choice(
            candidates=candidates,
            group_starts=self.group_starts,
            density=float((self.densities[chosen] * self._shares).sum()),
            error=float(self.problem.errors[rows, chosen].sum()),
            cost=float((self.costs.candidates[chosen] * self._shares).sum()),
            gap=0.0,
        )

    def losses(self, rule: GreedyRule) -> np.ndarray:
        """The published rule's losses, (steps, layers, candidates, heads), of the profile's mean errors."""
        errors = self.profile.head_error[:, :, : len(self.densities)]
        return rule.losses(errors, self.densities)

    def curve(self) -> np.ndarray:
        """(points, 2): densities, rising, and the least error at each."""
        points = np.linspace(max(self.least_density, 0.02), 1.0, CURVE_POINTS)
        return np.array([[one.density, one.error] for one in (self.within(Budget(target_density=p)) for p in points)])

    def head_errors(self, choice: Choice) -> np.ndarray:
        """(groups, layers, heads): squared error of each head's pattern, as a share of its layer's energy."""
        errors = np.add.reduceat(relative_errors(self.profile), self.group_starts, axis=0)
        errors /= self.lengths[:, None, None, None]
        return np.take_along_axis(errors, choice.candidates[:, :, None], 2)[:, :, 0]

    def table(self, choice: Choice, *, calibrated: bool = True) -> PatternTable:
        """The table of a choice.

        Args:
            choice: the choice.
            calibrated: whether vertical stripes go to the key blocks that each head attends to most in its steps,
                instead of being evenly spaced.
        """
        source, profile = self.profile.source, self.profile
        columns = np.add.reduceat(profile.columns, self.group_starts, axis=0)
        text = np.array(source.grid.text_blocks(source.block_size))
        patterns: dict[HeadPattern, int] = {}
        assignment = np.zeros(self._shape, dtype=np.int32)
        for place in np.ndindex(*self._shape):
            pattern = source.candidates[choice.candidates[place]]
            if pattern.share is not None and calibrated:
                blocks = most_attended_blocks(columns[place], pattern.share, text)
                pattern = replace(pattern, share=None, key_blocks=blocks)
            assignment[place] = patterns.setdefault(pattern, len(patterns))
        single = len(self.group_starts) == 1
        has_stripes = any(pattern.key_blocks is not None for pattern in patterns)
        return PatternTable(
            patterns=tuple(patterns),
            assignment=assignment,
            block_size=source.block_size,
            token_order=source.token_order,
            group_starts=self.group_starts,
            steps=None if single and not has_stripes else source.steps,
            grid=source.grid,
            model=source.model,
        )


def relative_errors(profile: AttentionProfile) -> np.ndarray:
    """(steps, layers, candidates, heads) float64: mean errors over samples, as shares of their layers' energies.

    The energy of a layer is the sum of its heads', so that heads and layers of one step are on one scale, and a layer
    counts the same however large its output is.
    """
    count = len(profile.source.candidates)
    errors = profile.error[:, :, :, :count].mean(0, dtype=np.float64)
    errors[:, :, 0] = 0  # the full pattern's is rounding
    energies = profile.energy.mean(0, dtype=np.float64).sum(-1)
    relative: np.ndarray = errors / np.maximum(energies, 1e-30)[:, :, None, None]
    return relative


def prompt_dependence(profile: AttentionProfile, choice: Choice, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether heads would rather have other patterns for other prompts.

    Args:
        profile: what was measured.
        choice: the patterns for all prompts.
        costs: (candidates,), of each.

    Returns:
        Two arrays (layers, heads): the share of prompts, over steps, for which another pattern of no higher cost has
        a smaller error by more than a tenth; and the error that a choice for every prompt would save, as a share.
    """
    source = profile.source
    branches = len(profile.error) // len(source.prompts)
    count, steps = len(source.candidates), source.steps
    errors = profile.error[:, :, :, :count].reshape(
        len(source.prompts), branches, *profile.error.shape[1:3], count, -1
    )
    errors = errors.mean(1, dtype=np.float64)  # (prompts, steps, layers, candidates, heads)
    groups = np.searchsorted(choice.group_starts, np.arange(steps), side="right") - 1
    chosen = choice.candidates[groups][:, :, None]  # (steps, layers, 1, heads)
    own = np.take_along_axis(errors, np.broadcast_to(chosen, (len(errors), *chosen.shape)), 3)[:, :, :, 0]
    affordable = costs[:, None] <= costs[chosen] * (1 + 1e-9)  # (steps, layers, candidates, heads)
    best = np.where(affordable, errors, np.inf).min(3)
    disagreement = (best < 0.9 * own).mean((0, 1))
    regret = 1 - best.sum((0, 1)) / np.maximum(own.sum((0, 1)), 1e-30)
    return disagreement, regret
