"""The ways of making attention sparse, as `AppliedBlade` sees them."""

from __future__ import annotations

from typing import Protocol

import torch

from blade.attention.adaptive import DRAWN_STEPS, AdaptivePlan, draw_table
from blade.attention.config import BladeConfig
from blade.attention.layer import Plan
from blade.attention.pattern_plan import PatternPlan, pattern_tables
from blade.token_grid import TokenGrid

_ROUNDED_TO = 16  # steps that the adaptive method's tables have more from one size to the next


class Method(Protocol):
    """A way of making attention sparse."""

    def check(self, layers: int, heads: int) -> None:
        """Raise a `ValueError` if it is not for a model of this size."""
        ...

    def rows(self, total: int | None) -> int:
        """Number of rows that the layers' tables have for a run of `total` steps, None if that is unknown.

        Raises:
            ValueError: if it is not for runs of this length.
        """
        ...

    def tables(self, layer: int, heads: int, rows: int) -> tuple[torch.Tensor, ...]:
        """Return the tables that a layer reads: row i at step i, and past the end from the start again."""
        ...

    def plan(self, grid: TokenGrid, device: torch.device) -> Plan:
        """Return the plan that all layers share for one shape of latent.

        Raises:
            ValueError: if it is not for videos of this size.
        """
        ...

    def is_sparse(self, layer: int, row: int, rows: int) -> bool:
        """Return whether a layer leaves anything out in the step of a row, of `rows`."""
        ...

    def head_costs(self, layer: int, row: int, rows: int, plan: Plan) -> tuple[float, ...] | None:
        """Return the relative costs of a layer's heads in the step of a row, of `rows`; None if they are equal."""
        ...


class AdaptiveMethod:
    """Blocks are chosen anew at every step."""

    def __init__(self, config: BladeConfig) -> None:
        """Take the configuration in force."""
        self._config = config

    def check(self, layers: int, heads: int) -> None:
        """Every model will do."""

    def rows(self, total: int | None) -> int:
        """As many as are drawn: one a step, rounded up so that runs of nearly as many steps share compiled graphs."""
        return DRAWN_STEPS if total is None else min(DRAWN_STEPS, -(-total // _ROUNDED_TO) * _ROUNDED_TO)

    def tables(self, layer: int, heads: int, rows: int) -> tuple[torch.Tensor, ...]:
        """The draws of chance."""
        return (draw_table(self._config, layer, heads, rows),)

    def plan(self, grid: TokenGrid, device: torch.device) -> AdaptivePlan:
        """The budget of blocks."""
        return AdaptivePlan.of(self._config, grid, device)

    def is_sparse(self, layer: int, row: int, rows: int) -> bool:
        """Every layer at every step, if any."""
        return True

    def head_costs(self, layer: int, row: int, rows: int, plan: Plan) -> None:
        """Heads that choose anew share a budget, or have the same."""


class PatternMethod:
    """Every head has a pattern from a table."""

    def __init__(self, config: BladeConfig) -> None:
        """Take the configuration in force."""
        assert config.patterns is not None
        self._config, self._table = config, config.patterns
        self._sparse = self._table.sparse_layers()

    def check(self, layers: int, heads: int) -> None:
        """Raise a `ValueError` if the table is not for a model of this size."""
        found = self._table.differences(layers=layers, heads=heads, steps=None, grid=None)
        if found:
            raise ValueError(f"`patterns` must be a table for this model, which has {found[0]}.")

    def rows(self, total: int | None) -> int:
        """One a step."""
        if total is not None:
            self._refuse(
                self._table.differences(layers=self._table.layers, heads=self._table.heads, steps=total, grid=None)
            )
        return total or self._table.steps or DRAWN_STEPS

    def tables(self, layer: int, heads: int, rows: int) -> tuple[torch.Tensor, ...]:
        """The heads' patterns."""
        return pattern_tables(self._config, layer, heads, rows)

    def plan(self, grid: TokenGrid, device: torch.device) -> PatternPlan:
        """The patterns' masks."""
        self._refuse(
            self._table.differences(layers=self._table.layers, heads=self._table.heads, steps=None, grid=grid)
        )
        return PatternPlan.of(self._config, grid, device)

    def is_sparse(self, layer: int, row: int, rows: int) -> bool:
        """Return whether a head of the layer has another pattern than `full`."""
        return bool(self._sparse[self._table.by_step(rows)[row], layer])

    def head_costs(self, layer: int, row: int, rows: int, plan: Plan) -> tuple[float, ...]:
        """The costs of the heads' patterns."""
        assert isinstance(plan, PatternPlan)
        costs = plan.pattern_costs()
        return tuple(costs[pattern] for pattern in self._table.assignment[self._table.by_step(rows)[row], layer])

    def _refuse(self, differences: list[str]) -> None:
        if differences and not self._config.adapt_patterns:
            raise ValueError(
                f"`patterns` were found for other runs: this one has {'; '.join(differences)}. Search again, or set "
                "`adapt_patterns` to use what still applies."
            )


def method_of(config: BladeConfig) -> Method:
    """The method that a configuration names."""
    return PatternMethod(config) if config.attention == "patterns" else AdaptiveMethod(config)
