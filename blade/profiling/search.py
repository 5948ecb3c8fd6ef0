"""Search for a table of head patterns in an attention profile, under one budget for all heads, layers and steps."""

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
"""Points of the curve of the least error over density."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """A pattern for every head, with its density, error and cost."""

    candidates: np.ndarray
    """(groups, layers, heads) int, indices of the profile's candidates."""
    group_starts: tuple[int, ...]
    """First step of each group."""
    density: float
    """Share of all pairs that the run computes."""
    error: float
    """Measured squared error of the attention layers' outputs as a share of their energy, weighted by influence."""
    cost: float
    """Cost of attention as a share of dense attention's."""
    gap: float
    """Upper bound on the share by which the error, or with `max_error` the cost, exceeds the smallest possible one."""


class PatternSearch:
    """The errors and costs of every head's candidates, from which choices are made."""

    def __init__(
        self,
        profile: AttentionProfile,
        *,
        groups: int | None = None,
        costs: AttentionCosts | None = None,
        influences: np.ndarray | None = None,
    ) -> None:
        """Prepare the errors and costs of a profile.

        Args:
            profile: the measurements.
            groups: number of equally long groups of steps with one assignment each; None: one per step.
            costs: the costs of the candidates; None: their densities.
            influences: (steps, layers), the weight of an error there, 1 on average; None: 1 everywhere.

        Raises:
            ValueError: if there are more groups than steps.
        """
        source = profile.source
        steps = source.steps
        groups = steps if groups is None else groups
        check_groups(groups, steps)
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
        """Return the best choice within a budget, in the sense of its objective in `blade.profiling.objectives`.

        Raises:
            ValueError: if no choice is within the budget; names the nearest feasible one.
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
        """Return the choice of the published rule, which decides on every head independently.

        Args:
            rule: the rule; it sees the mean loss over the steps of a group.
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
        """Return the published rule's losses, (steps, layers, candidates, heads), of the profile's mean errors."""
        errors = self.profile.head_error[:, :, : len(self.densities)]
        return rule.losses(errors, self.densities)

    def curve(self) -> np.ndarray:
        """Return ascending densities and the least error at each: (points, 2)."""
        targets = np.linspace(max(self.least_density, 0.02), 1.0, CURVE_POINTS)
        choices = [self.within(Budget(target_density=target)) for target in targets]
        return np.array([[choice.density, choice.error] for choice in choices])

    def head_errors(self, choice: Choice) -> np.ndarray:
        """Return the squared error of each head's pattern over its layer's energy: (groups, layers, heads)."""
        errors = np.add.reduceat(relative_errors(self.profile), self.group_starts, axis=0)
        errors /= self.lengths[:, None, None, None]
        return np.take_along_axis(errors, choice.candidates[:, :, None], 2)[:, :, 0]

    def table(self, choice: Choice, *, calibrated: bool = True) -> PatternTable:
        """Make the pattern table of a choice.

        Args:
            choice: the choice.
            calibrated: put vertical stripes at the key blocks that each head attends to most in its steps, instead of
                spacing them evenly.
        """
        source, profile = self.profile.source, self.profile
        columns = np.add.reduceat(profile.columns, self.group_starts, axis=0)
        text = np.array(source.grid.text_blocks(source.block_size))
        patterns: dict[HeadPattern, int] = {}
        assignment = np.zeros(self._shape, dtype=np.int32)
        for index in np.ndindex(*self._shape):
            pattern = source.candidates[choice.candidates[index]]
            if pattern.share is not None and calibrated:
                blocks = most_attended_blocks(columns[index], pattern.share, text)
                pattern = replace(pattern, share=None, key_blocks=blocks)
            assignment[index] = patterns.setdefault(pattern, len(patterns))
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


def check_groups(groups: int, steps: int) -> None:
    """Check that so many steps can be put into groups.

    Raises:
        ValueError: if there are more groups than steps, or none.
    """
    check_integer("groups", groups, 1)
    if groups > steps:
        raise ValueError(f"`groups` must be at most the number of steps, which is {steps}, got {groups}.")


def relative_errors(profile: AttentionProfile) -> np.ndarray:
    """Return the mean errors over samples relative to their layers' energies: (steps, layers, candidates, heads).

    The energy of a layer is the sum over its heads, so that all heads of a step are on one scale and a layer counts
    the same however large its output is. The result is float64.
    """
    count = len(profile.source.candidates)
    errors = profile.error[:, :, :, :count].mean(0, dtype=np.float64)
    errors[:, :, 0] = 0  # only rounding errors for the full pattern
    energies = profile.energy.mean(0, dtype=np.float64).sum(-1)
    relative: np.ndarray = errors / np.maximum(energies, 1e-30)[:, :, None, None]
    return relative


def prompt_dependence(profile: AttentionProfile, choice: Choice, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Measure how much the best pattern of each head depends on the prompt.

    Args:
        profile: the measurements.
        choice: the patterns for all prompts.
        costs: (candidates,), cost of each.

    Returns:
        Two arrays (layers, heads): the share of prompts, over steps, for which another pattern of no higher cost has
        an error smaller by more than a tenth; and the share of the error that a choice per prompt would save.
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
    chosen_errors = np.take_along_axis(errors, np.broadcast_to(chosen, (len(errors), *chosen.shape)), 3)[:, :, :, 0]
    affordable = costs[:, None] <= costs[chosen] * (1 + 1e-9)  # (steps, layers, candidates, heads)
    best = np.where(affordable, errors, np.inf).min(3)
    disagreement = (best < 0.9 * chosen_errors).mean((0, 1))
    regret = 1 - best.sum((0, 1)) / np.maximum(chosen_errors.sum((0, 1)), 1e-30)
    return disagreement, regret
