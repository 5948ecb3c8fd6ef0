"""Costs of candidate patterns in a denoising step, by their operations or as timed on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from blade.attention.pattern_plan import PatternPlan
from blade.metrics.timing import measure, time_calls
from blade.models.costs import ForwardCost
from blade.models.loaded import LatentSize, LoadedModel

REPEATS = 5
"""Timed calls of each pattern."""


@dataclass(frozen=True, kw_only=True, eq=False)
class AttentionCosts:
    """Costs of the candidates relative to dense attention, and dense attention's share of a step."""

    candidates: np.ndarray
    """(candidates,), 1 for the full pattern."""
    step_share: float | None
    """Dense self-attention's share of a denoising step; None: not known."""
    measured: bool
    """If true, these are times on the device instead of numbers of operations."""

    @classmethod
    def of_operations(cls, densities: Sequence[float], forward: ForwardCost | None = None) -> AttentionCosts:
        """Take each candidate's share of all pairs as its cost.

        Args:
            densities: of the candidates.
            forward: cost of a forward pass, for attention's share of a step.
        """
        share = None if forward is None else forward.flops["self-attention"] / forward.total
        return cls(candidates=np.array(densities, dtype=np.float64), step_share=share, measured=False)

    @classmethod
    def timed(cls, model: LoadedModel, plan: PatternPlan, latent: LatentSize) -> AttentionCosts:
        """Time every candidate on the model's device, in its type, beside dense attention and a dense forward pass.

        Args:
            model: the model, on its device; its transformer without BLADE.
            plan: of a table whose patterns are the candidates.
            latent: frames, height and width of the latent.
        """
        transformer, family = model.transformer, model.family
        attentions = family.attention_layers(transformer)
        heads, size = family.heads(attentions[0]), transformer.config.attention_head_dim
        device = next(transformer.parameters()).device
        shape = (1, plan.grid.sequence_length, heads, size)
        query, key, value = (torch.randn(shape, device=device, dtype=transformer.dtype) for _ in range(3))
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # heads before tokens
        inputs = model.example_inputs(latent)

        def time_pattern(number: int) -> float:
            ids = torch.full((heads,), number, device=device)
            return measure(lambda turn: plan.attend(query, key, value, (ids,)), device, REPEATS).median

        with torch.inference_mode():
            dense = measure(lambda turn: functional.scaled_dot_product_attention(q, k, v), device, REPEATS).median
            transformer(**inputs)
            forward = time_calls(lambda turn: transformer(**inputs), device, 2).median
            times = [
                0.0 if pattern.kind == "skip" else time_pattern(n) for n, pattern in enumerate(plan.table.patterns)
            ]
        share = min(1.0, dense * len(attentions) / forward)
        return cls(candidates=np.array(times) / dense, step_share=share, measured=True)

    def speedup(self, share: float) -> float:
        """Return the speedup of a step in which attention costs this share of dense attention.

        Raises:
            ValueError: if attention's share of a step is not known.
        """
        if self.step_share is None:
            raise ValueError("`step_share` must be a number to tell how much faster a step gets, got None.")
        return 1 / (1 - self.step_share * (1 - share))
