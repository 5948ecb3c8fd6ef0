"""The published search: greedy and on the way, every head by itself.

Source: Sparse-vDiT, arXiv 2506.03065, algorithm 1. Each prompt's generation goes on with the patterns that the rule
gives its heads; the table is decided by the losses averaged over prompts and guidance branches, which the paper leaves
open. The paper's threshold is one of its two parameters; where a density is asked for instead, it is found by
bisection on the losses of a generation, and that generation is repeated with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blade.attention.patterns import HeadPattern
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
"""Of the sparse patterns. Source: what the published totals for CogVideoX imply; the paper does not say."""

HALVINGS = 50
"""Of the range of the threshold in a bisection."""

START_NAME = "dense"
"""Folder of the dense generations that a threshold is first looked for with."""

ROUNDS = 3
"""Most generations of every prompt until the threshold stays."""

CLOSE_ENOUGH = 0.01
"""Difference of the density from the one asked for at which no further round is made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedResult:
    """What the published search came to."""

    profile: AttentionProfile
    """Of the last round."""
    search: PatternSearch
    """Of that profile."""
    choice: Choice
    """The patterns."""
    rule: GreedyRule
    """The rule that chose them."""
    rounds: int
    """How often every prompt was generated."""


def published_candidates(
    grid: TokenGrid, block_size: int, order: str = "raster", *, device: torch.device | str = "cpu"
) -> tuple[HeadPattern, ...]:
    """The five modes: full, skipped, diagonal, multi-diagonal and evenly spaced vertical stripes.

    Args:
        grid: the tokens.
        block_size: tokens in a block.
        order: the model's token order.
        device: where masks are worked out.
    """
    found = [HeadPattern(kind="full"), HeadPattern(kind="skip")]
    for kind in ("diagonal", "multi-diagonal"):
        own = natural_order(kind, block_size)
        blocks = share_of_blocks(grid, block_size, order, device)
        found.append(pattern_of_density(kind, KEPT_DENSITY, blocks, grid, None if own == order else own))
    return (*found, HeadPattern(kind="vertical", share=KEPT_DENSITY))


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
    """Search as published.

    Args:
        model: the model.
        requests: one for each prompt, resolved.
        recording: what is measured, of `published_candidates`.
        source: what the profile is of.
        folder: where passes are kept, so that what is stopped goes on where it was.
        rule: the rule; its threshold is not used where a density is asked for.
        target_density: share of all pairs that the run computes; None: as the rule's threshold makes it.
        groups: see `PatternSearch`.
        on_step: called after each pass with the name of the round.

    Raises:
        ValueError: if the density cannot be met; says the nearest that can.
    """
    losses = None
    if target_density is not None:
        # where to begin: the losses along dense generations
        start = record_profile(model, requests, recording, source, folder / START_NAME, _named("dense", on_step))
        search = PatternSearch(start, groups=groups)
        rule = _threshold_for(search, rule, target_density, search.losses(rule))
    for number in range(1, ROUNDS + 1):
        name = f"round {number}, threshold {rule.threshold:.4g}"
        place = folder / f"threshold-{rule.threshold:.9f}"
        profile = record_profile(model, requests, replace(recording, rule=rule), source, place, _named(name, on_step))
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
    """The rule with the smallest threshold at which no more than a density is computed."""
    low, high = 0.0, float(losses.max()) + 1
    least = search.by_rule(replace(rule, threshold=high), losses).density
    if density < least:
        raise ValueError(
            f"`target_density` must be at least {least:.3g} with the published patterns and lambda {rule.weight:g}, "
            f"got {density}."
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = search.by_rule(replace(rule, threshold=middle), losses).density
        low, high = (middle, high) if found > density else (low, middle)
    return replace(rule, threshold=high)


def _named(name: str, on_step: Callable[[str, Progress], None] | None) -> Callable[[Progress], None] | None:
    return None if on_step is None else lambda progress: on_step(name, progress)
