"""Summary of a run: densities as realised, and why layers stayed dense."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from blade.attention.adaptive import AdaptivePlan
from blade.attention.applied import AppliedBlade, applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import BladeConfig
from blade.families.transformers import find_transformers
from blade.token_grid import TokenGrid


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer since BLADE was applied."""

    index: int
    """Number of the layer."""
    dense_reason: str | None
    """Why it stays dense in every step; None if it doesn't."""
    sparse_calls: int
    """Forward passes in which it was sparse."""
    dense_calls: int
    """Forward passes in which it was dense."""
    density: float | None
    """Mean density over its sparse forward passes; None if there was none."""
    implementation: str | None
    """Implementation of the latest sparse call: "triton", "cute", "flex", "cpu" or "naive"; None before it."""


@dataclass(frozen=True)
class TransformerSummary:
    """One transformer since BLADE was applied."""

    name: str
    """Its name in the pipeline."""
    config: BladeConfig
    """The configuration in force."""
    grid: TokenGrid | None
    """Token grid of the latest forward pass; None before the first."""
    budget: BlockBudget | None
    """Budget on that grid; None with a table of patterns."""
    layers: tuple[LayerSummary, ...]
    """Its self-attention layers."""
    notes: tuple[str, ...]
    """Messages of the log: layers that had to stay dense, budgets that were too small."""

    def __str__(self) -> str:
        config, budget = self.config, self.budget
        method: str = config.attention
        if config.patterns is not None:
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in config.patterns.shares().items())
            method += f" ({shares} of the heads), {config.patterns.token_order} order"
        elif method != "dense":
            method += f", {config.asa.selector} selector, {config.asa.token_order} order"
            method += f", requested sparsity {config.sparsity:g}"
        lines = [f"{self.name}: {method}"]
        grid = self.grid
        if grid is not None and config.patterns is not None:
            lines.append(f"  {_tokens(grid)} in blocks of {config.patterns.block_size}")
        elif grid is not None and budget is not None:
            lines.append(
                f"  {_tokens(grid)} in {budget.blocks} blocks of "
                f"{config.asa.block_size}; a row keeps {'at most ' if config.asa.cumulative_mass else ''}"
                f"{budget.kept_blocks + budget.text_blocks + budget.extra_blocks / budget.blocks:.4g}, pooled tokens: "
                f"{budget.pooled_tokens}"
            )
        lines.append(f"  {_densities(self.layers)}")
        used = sorted({layer.implementation for layer in self.layers if layer.implementation is not None})
        if used:
            lines.append(f"  block-sparse attention by {', '.join(used)}")
        reasons = defaultdict(list)
        for layer in self.layers:
            if layer.dense_reason is not None:
                reasons[layer.dense_reason].append(layer.index)
        lines += [f"  dense {_named(indices)}: {reason}" for reason, indices in reasons.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _tokens(grid: TokenGrid) -> str:
    """Return the size of a grid, and that the token order runs inside each frame where the model needs that."""
    apart = ", ordered inside each frame," if grid.frames_apart else ""
    return f"{grid.frames} x {grid.height} x {grid.width} tokens{apart}"


@dataclass(frozen=True)
class BladeSummary:
    """All transformers of a pipeline since BLADE was applied; `print` it."""

    transformers: tuple[TransformerSummary, ...]
    """The transformers, in the order in which the pipeline uses them."""

    @property
    def layer_density(self) -> float | None:
        """Mean density over sparse layers and steps; None if there was none."""
        return _layer_density(self._layers())

    @property
    def run_density(self) -> float | None:
        """Mean density over all layers and steps, the dense ones included; None before the first forward pass."""
        return _run_density(self._layers())

    def _layers(self) -> list[LayerSummary]:
        return [layer for transformer in self.transformers for layer in transformer.layers]

    def __str__(self) -> str:
        return "\n".join(str(transformer) for transformer in self.transformers)


def blade_summary(pipe_or_transformer: Any) -> BladeSummary:
    """Sum up what BLADE did since it was applied. Reads the device's counters, and so waits for it.

    Args:
        pipe_or_transformer: what `apply_blade` was given.

    Returns:
        A dataclass that prints as a short text.

    Raises:
        ValueError: if BLADE isn't applied.

    Example:
        ```python
        from blade import apply_blade, blade_summary

        apply_blade(pipe)
        pipe("a red ball moving right", height=96, width=96, num_frames=9, num_inference_steps=2)
        print(blade_summary(pipe))
        ```
    """
    transformers = find_transformers(pipe_or_transformer)
    applied = {name: applied_to(transformer) for name, transformer in transformers.items()}
    if not any(applied.values()):
        raise ValueError("BLADE is not applied here; call `apply_blade` first.")
    return BladeSummary(tuple(_summarise(name, one) for name, one in applied.items() if one is not None))


def _summarise(name: str, applied: AppliedBlade) -> TransformerSummary:
    tallies = torch.stack([layer.tally.cpu() for layer in applied.layers]).tolist()
    layers = tuple(
        LayerSummary(
            index=layer.index,
            dense_reason=layer.dense_reason,
            sparse_calls=int(sparse_calls),
            dense_calls=int(dense_calls),
            density=density / sparse_calls if sparse_calls else None,
            implementation=layer.implementation,
        )
        for layer, (density, sparse_calls, dense_calls) in zip(applied.layers, tallies)
    )
    budget = applied.plan.budget if isinstance(applied.plan, AdaptivePlan) else None
    return TransformerSummary(name, applied.config, applied.grid, budget, layers, tuple(applied.notes))


def _layer_density(layers: Iterable[LayerSummary]) -> float | None:
    sparse = [layer for layer in layers if layer.density is not None]
    calls = sum(layer.sparse_calls for layer in sparse)
    return sum((layer.density or 0.0) * layer.sparse_calls for layer in sparse) / calls if calls else None


def _run_density(layers: Iterable[LayerSummary]) -> float | None:
    layers = list(layers)
    calls = sum(layer.sparse_calls + layer.dense_calls for layer in layers)
    pairs = sum((layer.density or 0.0) * layer.sparse_calls + layer.dense_calls for layer in layers)
    return pairs / calls if calls else None


def _densities(layers: tuple[LayerSummary, ...]) -> str:
    layer, run = _layer_density(layers), _run_density(layers)
    if run is None:
        return "no forward pass yet"
    sparse = "no layer was sparse" if layer is None else f"layer density {layer:.4f} (sparse layers and steps)"
    return f"{sparse}, run density {run:.4f} (dense ones included)"


def _named(indices: list[int]) -> str:
    """Name layers shortly: "layers 0-2, 5"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"layer {listed}" if len(indices) == 1 else f"layers {listed}"
