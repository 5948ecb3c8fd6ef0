"""Floating-point operations of a run, from a transformer's configuration alone, without its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blade.attention.budget import configured_budget
from blade.attention.config import BladeConfig
from blade.attention.pattern_plan import PatternPlan
from blade.attention.selectors import find_selector
from blade.families.registry import find_family
from blade.families.transformers import Transformer
from blade.models.repeats import once_per_shape
from blade.token_grid import TokenGrid

PARTS = ("self-attention", "other attention", "linear layers", "convolutions")
"""Parts of a forward pass: products of queries, keys and values in the layers that BLADE makes sparse; the same
elsewhere (cross-attention, token refiners); matrix products with weights; patch embeddings."""


@dataclass(frozen=True, kw_only=True)
class ForwardCost:
    """One forward pass of a transformer, with dense attention."""

    grid: TokenGrid
    """Its tokens."""
    layers: int
    """Self-attention layers."""
    heads: int
    """Heads of each."""
    head_dim: int
    """Numbers in one head of one token."""
    parameters: int
    """Numbers that the transformer holds."""
    flops: dict[str, int]
    """Floating-point operations by part, of `PARTS`; a multiplication and an addition are two."""

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self.flops.values())


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """All forward passes of a run."""

    forward: ForwardCost
    """One of them, dense."""
    passes: int
    """Forward passes of one video: two a step with classifier-free guidance."""
    sparse_passes: int
    """Those in which layers are sparse."""
    sparse_layers: int
    """Sparse layers in those."""
    density: float
    """Of such a layer, as planned; 1 without a configuration."""
    flops: dict[str, float]
    """Operations of the run by part, of `PARTS` and, where blocks are chosen, `block selection`."""

    @property
    def sparse_self_attention(self) -> float:
        """Operations of self-attention in sparse layers of sparse passes, which `flops` has among its own."""
        share = self.sparse_passes * self.sparse_layers / self.forward.layers
        return share * self.density * self.forward.flops["self-attention"]

    @property
    def dense_total(self) -> int:
        """Operations of the run with dense attention."""
        return self.passes * self.forward.total

    @property
    def total(self) -> float:
        """All operations."""
        return sum(self.flops.values())


class _CountedRepeats:
    """Operations of calls that are not run again."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self._counter, self.total = counter, 0

    def begin(self) -> int:
        return int(self._counter.get_total_flops())

    def end(self, began: int) -> int:
        return int(self._counter.get_total_flops()) - began

    def repeat(self, cost: int) -> None:
        self.total += cost


def count_flops(function: Callable[[], object], repeated: nn.Module | None = None) -> int:
    """Count the operations of a call on PyTorch's meta device, by PyTorch's own counter.

    Args:
        function: makes and takes tensors of the meta device alone.
        repeated: a module that it calls many times with equal shapes; see `once_per_shape`.

    Returns:
        Floating-point operations of products of matrices, convolutions and attention; a multiplication and an
        addition are two.
    """
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        repeats = _CountedRepeats(counter)
        with once_per_shape(repeated, repeats):
            function()
    return int(counter.get_total_flops()) + repeats.total


def forward_cost(
    transformer: Transformer,
    latent_size: tuple[int, int, int],
    *,
    batch: int = 1,
    text_tokens: int | None = None,
) -> ForwardCost:
    """Count the operations of a forward pass by running it on PyTorch's meta device, where nothing is computed.

    Args:
        transformer: a transformer of a family that BLADE knows, on the meta device: made under
            `with torch.device("meta"):`, by its class or by `from_config`.
        latent_size: frames, height and width of the latent.
        batch: latents in the pass.
        text_tokens: length of the text; None takes the length that the family's pipeline pads to.

    Raises:
        ValueError: if the transformer is of no known family, is not on the meta device, or has a forward pass that
            depends on what the inputs hold.
    """
    family = find_family(transformer)
    if any(parameter.device.type != "meta" for parameter in transformer.parameters()):
        raise ValueError('`transformer` must be on the meta device: make it under `with torch.device("meta"):`.')
    inputs = family.example_inputs(transformer, latent_size, batch=batch, text_tokens=text_tokens)
    attentions = family.attention_layers(transformer)
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter, family.without_values():
        try:
            transformer(**inputs)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            raise ValueError(
                f"`transformer` cannot be counted without weights: the forward pass of {type(transformer).__name__} "
                "depends on what its inputs hold."
            ) from error
    root = type(transformer).__name__
    places = {module: f"{root}.{name}" for name, module in transformer.named_modules()}
    counts = counter.get_flop_counts()
    own = sum(_attention(counts.get(places[attention], {})) for attention in attentions)
    everywhere = counts["Global"]
    flops = {
        "self-attention": own,
        "other attention": _attention(everywhere) - own,
        "linear layers": _of(everywhere, "mm", "addmm"),
        "convolutions": _of(everywhere, "convolution"),
    }
    unknown = sum(everywhere.values()) - sum(flops.values())
    if unknown:
        raise ValueError(f"`transformer` has operations of no known part: {sorted(map(str, everywhere))}.")
    heads = family.heads(attentions[0])
    return ForwardCost(
        grid=family.token_grid(transformer, inputs),
        layers=len(attentions),
        heads=heads,
        head_dim=family.head_dim(transformer),
        parameters=sum(parameter.numel() for parameter in transformer.parameters()),
        flops=flops,
    )


def run_cost(
    forward: ForwardCost,
    steps: int,
    *,
    skipped_steps: int = 0,
    guidance: bool = True,
    guidance_passes: int = 2,
    config: BladeConfig | None = None,
) -> RunCost:
    """Add up the forward passes of a run.

    Args:
        forward: one of them.
        steps: denoising steps of the schedule.
        skipped_steps: those of them, from the start, that the run does not take.
        guidance: whether every step runs the transformer more than once, for guidance.
        guidance_passes: how often it does: twice for classifier-free guidance. Each is charged like the first, also
            those that leave something out.
        config: the configuration; None is dense. Its density is the planned one, which the rule of cumulative mass
            may fall short of.

    Returns:
        Operations by part. The choice of blocks is counted as its selector says.
    """
    calls = guidance_passes if guidance else 1
    passes = sparse_passes = calls * (steps - skipped_steps)
    dense_steps = 0 if config is None else max(config.dense_step_count(steps) - skipped_steps, 0)
    layers, density, selection = forward.layers, 1.0, 0.0
    if config is None or config.attention == "dense":
        sparse_passes = layers = 0
    elif config.patterns is not None:
        layers -= len(config.dense_layers)
        sparse_passes -= calls * dense_steps
        density = _pattern_density(config, forward.grid, steps, skipped_steps)
    else:
        details = config.asa
        budget = configured_budget(config, forward.grid)
        layers -= len(config.dense_layers)
        sparse_passes -= calls * dense_steps
        if budget.is_full:
            sparse_passes = layers = 0
        else:
            density = budget.density
            tokens, selector = forward.grid.sequence_length, find_selector(details.selector)
            selection = selector.count_operations(tokens, forward.heads, forward.head_dim, details)
    flops = {part: float(passes * count) for part, count in forward.flops.items()}
    share = sparse_passes * layers / (passes * forward.layers)
    flops["self-attention"] *= 1 - share * (1 - density)
    if selection:
        choices = calls * -(-(sparse_passes // calls) // config.asa.reselect_every) if config else 0
        flops["block selection"] = choices * layers * selection
    return RunCost(
        forward=forward,
        passes=passes,
        sparse_passes=sparse_passes,
        sparse_layers=layers,
        density=density,
        flops=flops,
    )


def _pattern_density(config: BladeConfig, grid: TokenGrid, steps: int, skipped_steps: int) -> float:
    """Planned mean density of the layers and steps that a table of patterns is used in."""
    table = config.patterns
    assert table is not None
    plan = PatternPlan.of(config, grid, torch.device("cpu"))
    adaptive = configured_budget(config, grid).density
    densities = np.array([adaptive if density is None else density for density in plan.densities])
    layers = [layer for layer in range(table.layers) if layer not in config.dense_layers]
    groups = table.by_step(steps)[max(config.dense_step_count(steps), skipped_steps) :]
    return float(densities[table.assignment[groups][:, layers]].mean()) if len(groups) and layers else 1.0


def _attention(counts: dict[Any, int]) -> int:
    """Products that involve no weights: batched ones, and fused attention's."""
    return sum(
        count for operation, count in counts.items() if "bmm" in str(operation) or "attention" in str(operation)
    )


def _of(counts: dict[Any, int], *names: str) -> int:
    total: Counter[str] = Counter()
    for operation, count in counts.items():
        total[str(operation).split(".")[-1]] += count
    return sum(total[name] for name in names)
