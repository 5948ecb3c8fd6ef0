"""The published search: greedy, during generation, every head independently.

Source: Sparse-vDiT, arXiv 2506.03065, algorithm 1. Each prompt's generation continues with the patterns that the rule
gives its heads. The table is made from the losses averaged over prompts and guidance branches, which the paper leaves
open. The threshold is one of the paper's two parameters; if a density is requested instead, the threshold is found by
bisection on the losses of a generation, and that generation is repeated with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blade.attention.patterns import HeadPattern, PatternKind
from blade.generation.request import ResolvedRequest
from blade.models.loaded import LoadedModel
from blade.profiling.assignment import GreedyRule
from blade.profiling.candidates import natural_order, pattern_of_density, share_of_blocks
from blade.profiling.profile import AttentionProfile, ProfileSource
from blade.profiling.record_prompts import Progress, record_profile
from blade.profiling.recording_plan import Recording
from blade.profiling.search import Choice, PatternSearch
from blade.token_grid import TokenGrid

KEPT_DENSITY = 0.25
"""Density of the sparse patterns. Source: implied by the published totals for CogVideoX; the paper does not say."""

HALVINGS = 50
"""Bisection steps for the threshold."""

START_NAME = "dense"
"""Folder of the dense generations from which the first threshold is found."""

ROUNDS = 3
"""Most generations of every prompt while the threshold is adjusted."""

CLOSE_ENOUGH = 0.01
"""Largest difference from the requested density that needs no further round."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedResult:
    """Result of the published search."""

    profile: AttentionProfile
    """Profile of the last round."""
    search: PatternSearch
    """Search over that profile."""
    choice: Choice
    """The patterns."""
    rule: GreedyRule
    """The rule that chose them."""
    rounds: int
    """Number of generations of every prompt."""


def published_candidates(
    grid: TokenGrid, block_size: int, order: str = "raster", *, device: torch.device | str = "cpu"
) -> tuple[HeadPattern, ...]:
    """Return the five modes: full, skip, diagonal, multi-diagonal and evenly spaced vertical stripes.

    Args:
        grid: the tokens.
        block_size: tokens in a block.
        order: the model's token order.
        device: the device on which masks are computed.
    """
    candidates = [HeadPattern(kind="full"), HeadPattern(kind="skip")]
    kinds: tuple[PatternKind, ...] = ("diagonal", "multi-diagonal")
    for kind in kinds:
        best_order = natural_order(kind, block_size)
        own_order = None if best_order == order else best_order
        blocks = share_of_blocks(grid, block_size, order, device)
        candidates.append(pattern_of_density(kind, KEPT_DENSITY, blocks, grid, own_order))
    return (*candidates, HeadPattern(kind="vertical", share=KEPT_DENSITY))


def published_search(
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    recording: Recording,
    source: ProfileSource,
    folder: Path,
    *,
    rule: GreedyRule,
    target_density: float | None = None,
    groups: int | None = None,
    on_step: Callable[[str, Progress], None] | None = None,
) -> PublishedResult:
    """Choose the patterns of all heads as published.

    Args:
        model: the model.
        requests: one resolved request per prompt.
        recording: the options of the recording, with `published_candidates`.
        source: the origin of the profile.
        folder: the folder of the recorded passes, from which an interrupted search resumes bit-exactly.
        rule: the rule; its threshold is ignored if a density is requested.
        target_density: share of all pairs that the run computes; None: whatever the rule's threshold gives.
        groups: see `PatternSearch`.
        on_step: called after each pass with the name of the round and the progress.

    Raises:
        ValueError: if the density cannot be met; names the nearest feasible one.
    """
    losses = None
    if target_density is not None:
        # the first threshold comes from the losses of dense generations
        start = record_profile(model, requests, recording, source, folder / START_NAME, _named("dense", on_step))
        search = PatternSearch(start, groups=groups)
        rule = _threshold_for(search, rule, target_density, search.losses(rule))
    for number in range(1, ROUNDS + 1):
        name = f"round {number}, threshold {rule.threshold:.4g}"
        passes = folder / f"threshold-{rule.threshold:.9f}"
        profile = record_profile(model, requests, replace(recording, rule=rule), source, passes, _named(name, on_step))
        search = PatternSearch(profile, groups=groups)
        losses = search.losses(rule)
        choice = search.by_rule(rule, losses)
        if target_density is None or abs(choice.density - target_density) <= CLOSE_ENOUGH or number == ROUNDS:
            break
        rule = _threshold_for(search, rule, target_density, losses)
    if target_density is not None:
        rule = _threshold_for(search, rule, target_density, losses)
        choice = search.by_rule(rule, losses)
    return PublishedResult(profile=profile, search=search, choice=choice, rule=rule, rounds=number)


def _threshold_for(search: PatternSearch, rule: GreedyRule, density: float, losses: Any) -> GreedyRule:
    """Return the rule with the smallest threshold at which the density is at most `density`."""
    low, high = 0.0, float(losses.max()) + 1
    least = search.by_rule(replace(rule, threshold=high), losses).density
    if density < least:
        raise ValueError(
            f"`target_density` must be at least {least:.3g} with the published patterns and lambda {rule.weight:g}, "
            f"got {density}."
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        reached = search.by_rule(replace(rule, threshold=middle), losses).density
        low, high = (middle, high) if reached > density else (low, middle)
    return replace(rule, threshold=high)


def _named(name: str, on_step: Callable[[str, Progress], None] | None) -> Callable[[Progress], None] | None:
    return None if on_step is None else lambda progress: on_step(name, progress)
