"""The objectives of a search for head patterns, declared in one table; a budget bounds one of them.

Nothing here needs PyTorch, so that a command's help can be made from the table without importing it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from blade.common.checks import check_number
from blade.common.declared import declare
from blade.profiling.assignment import Assignment, least_cost, least_error


class StepCosts(Protocol):
    """Costs of the candidates in a denoising step; `AttentionCosts` implements it."""

    @property
    def candidates(self) -> np.ndarray:
        """Costs (candidates,), as shares of dense attention's."""
        ...

    @property
    def step_share(self) -> float | None:
        """Dense attention's share of a step; None: not known."""
        ...

    def speedup(self, share: float) -> float:
        """Return the speedup of a step in which attention costs this share of dense attention."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchProblem:
    """A choice of patterns as an optimization problem; an item is a head of a layer in a group of steps."""

    errors: np.ndarray
    """(items, candidates), squared errors of the layers' outputs as shares of their energy."""
    densities: np.ndarray
    """(items, candidates), as shares of all query-key pairs of the run."""
    costs: np.ndarray
    """(items, candidates), as shares of the cost of dense attention in the run."""
    step: StepCosts
    """Costs of the candidates in a step."""

    @property
    def least_density(self) -> float:
        """Density of the choice that computes the least."""
        return float(self.densities.min(1).sum())

    @property
    def least_cost(self) -> float:
        """Cost of the cheapest choice."""
        return float(self.costs.min(1).sum())


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A quantity that a budget bounds, and how to meet the bound."""

    name: str
    """Name of the field, such as `target_density`; the option is the same in kebab-case."""
    bounds: str
    """Description of the bounded quantity, for the option's help."""
    wanted: str
    """Description of the valid values, such as "above 0"."""
    is_valid: Callable[[float], bool]
    """Returns true for a valid value."""
    meet: Callable[[SearchProblem, float], Assignment]
    """Returns the best choice that meets a value, or raises a `ValueError` that names the nearest feasible value."""
    report: str
    """Text in a report, with `{:g}` for the value."""
    foresee: Callable[[StepCosts, float], None] | None = None
    """Raises a `ValueError` if the costs alone, before anything is measured, show that a value cannot be met. None:
    they never do."""
    bounds_density: bool = False
    """If true, the value is the largest density, which the published method can meet too, by its threshold."""

    @property
    def help(self) -> str:
        """The option's help."""
        return f"A budget: {self.bounds}, {self.wanted}."


@dataclass(frozen=True, init=False)
class Budget:
    """The limit of a search: exactly one objective and its value."""

    objective: Objective
    value: float

    def __init__(self, **values: float | None) -> None:
        """Take the value of one objective by name, such as `Budget(target_density=0.35)`; None counts as not given.

        Raises:
            ValueError: if there is no such objective, not exactly one is given, or its value is out of range.
        """
        unknown = [name for name in values if name not in OBJECTIVES]
        if unknown:
            raise ValueError(f"a budget must be one of {_listed(OBJECTIVES)}, got `{unknown[0]}`.")
        limits = {name: value for name, value in values.items() if value is not None}
        if len(limits) != 1:
            named = " and ".join(f"`{name}`" for name in limits) or "none"
            raise ValueError(f"one of {_listed(OBJECTIVES)} must be given, got {named}.")
        ((name, value),) = limits.items()
        objective = OBJECTIVES[name]
        check_number(name, value, objective.wanted, objective.is_valid)
        object.__setattr__(self, "objective", objective)
        object.__setattr__(self, "value", value)

    def meet(self, problem: SearchProblem) -> Assignment:
        """Return the best choice within the budget; see `Objective.meet`."""
        return self.objective.meet(problem, self.value)

    def foresee(self, costs: StepCosts) -> None:
        """Raise a `ValueError` if the costs alone show that it cannot be met; see `Objective.foresee`."""
        if self.objective.foresee is not None:
            self.objective.foresee(costs, self.value)

    def __str__(self) -> str:
        return self.objective.report.format(self.value)


def density_objectives() -> str:
    """Return the names of the objectives that the published method can meet, for a message."""
    return _listed({name: objective for name, objective in OBJECTIVES.items() if objective.bounds_density})


def _listed(objectives: dict[str, Objective]) -> str:
    *first, last = (f"`{name}`" for name in objectives)
    return f"{', '.join(first)} and {last}" if first else last


def _meet_density(problem: SearchProblem, density: float) -> Assignment:
    least = problem.least_density
    if density < least:
        raise ValueError(f"`target_density` must be at least {least:.3g} with these patterns, got {density}.")
    return least_error(problem.errors, problem.densities, density)


def _meet_speedup(problem: SearchProblem, speedup: float) -> Assignment:
    limit = _share_for_speedup(problem.step, speedup, problem.least_cost)
    return least_error(problem.errors, problem.costs, limit)


def _foresee_speedup(costs: StepCosts, speedup: float) -> None:
    _share_for_speedup(costs, speedup, float(costs.candidates.min()))


def _share_for_speedup(costs: StepCosts, speedup: float, least: float) -> float:
    """Return the share of dense attention's cost at which a step reaches a speedup; `least` is the smallest one."""
    if costs.step_share is None:
        raise ValueError("`target_speedup` needs the share of attention in a step, which is not known here.")
    share = 1 - (1 - 1 / speedup) / costs.step_share
    if share < least:
        raise ValueError(
            f"`target_speedup` must be at most {costs.speedup(least):.3g} here, where attention is "
            f"{costs.step_share:.0%} of a step, got {speedup}."
        )
    return share


def _meet_error(problem: SearchProblem, most_error: float) -> Assignment:
    least = float(problem.errors.min(1).sum())
    if most_error < least:
        raise ValueError(f"`max_error` must be at least {least:.3g} with these patterns, got {most_error}.")
    return least_cost(problem.errors, problem.costs, most_error)


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective(
            name="target_density",
            bounds="share of all query-key pairs that a run computes",
            wanted="in (0, 1]",
            is_valid=lambda density: 0 < density <= 1,
            meet=_meet_density,
            report="target density {:g}",
            bounds_density=True,
        ),
        Objective(
            name="target_speedup",
            bounds="how many times faster one denoising step gets",
            wanted="above 1",
            is_valid=lambda speedup: speedup > 1,
            meet=_meet_speedup,
            report="target speedup {:g}",
            foresee=_foresee_speedup,
        ),
        Objective(
            name="max_error",
            bounds="squared error of attention's outputs, as a share of their energy",
            wanted="above 0",
            is_valid=lambda error: error > 0,
            meet=_meet_error,
            report="max error {:g}",
        ),
    )
}
"""The objectives by name, used by budgets and the command line."""


def register_objective(objective: Objective) -> Objective:
    """Declare an objective and return it.

    Raises:
        ValueError: if an objective of this name exists.
    """
    return declare(OBJECTIVES, objective)
