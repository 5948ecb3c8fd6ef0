"""Budgets of the objectives in the table, and of one that a module declares."""

import numpy as np
import pytest

from blade.profiling.assignment import least_error
from blade.profiling.objectives import OBJECTIVES, Budget, Objective, density_objectives, register_objective
from blade.profiling.search import PatternSearch


def test_budgets_say_what_they_bound():
    assert [str(Budget(**{name: 1.25 if name == "target_speedup" else 0.35})) for name in OBJECTIVES] == [
        "target density 0.35",
        "target speedup 1.25",
        "max error 0.35",
    ]
    assert Budget(max_error=0.5, target_density=None) == Budget(max_error=0.5) != Budget(target_density=0.5)
    assert density_objectives() == "`target_density`"
    with pytest.raises(ValueError, match="one of `target_density`, `target_speedup` and `max_error`, got `speed`"):
        Budget(speed=2.0)


def test_a_declared_objective_is_searched_for(import_temporary, make_profile):
    objective = Objective(
        name="least_heads",
        bounds="heads that keep everything",
        wanted="at least 0",
        is_valid=lambda heads: heads >= 0,
        meet=lambda problem, heads: least_error(
            problem.errors, np.eye(len(problem.errors[0]))[:1].repeat(len(problem.errors), 0), heads
        ),
        report="{:g} full heads",
    )
    register_objective(objective)
    search = PatternSearch(make_profile(), groups=1)
    budget = Budget(least_heads=5)
    choice = search.within(budget)
    assert str(budget) == "5 full heads" and (choice.candidates == 0).sum() == 5
    budget.foresee(search.costs)
    with pytest.raises(ValueError, match="`least_heads` must be at least 0, got -1"):
        Budget(least_heads=-1)
    with pytest.raises(ValueError, match=r"`name` must be new in the table, which .*got 'max_error'"):
        register_objective(Objective(**{**vars(objective), "name": "max_error"}))
