"""Contents of a profile's report, derived from the profile and the search."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from blade.attention.pattern_plan import order_places
from blade.attention.patterns import HeadPattern, pattern_blocks, pattern_density
from blade.common.machine import describe_machine, describe_versions
from blade.models.source import BUNDLED
from blade.profiling.assignment import GreedyRule
from blade.profiling.candidates import USUAL_DENSITY, natural_order
from blade.profiling.profile import AttentionProfile, ProfileSource
from blade.profiling.report import Candidate, ReportData, write_report
from blade.profiling.search import PatternSearch, prompt_dependence
from blade.profiling.workflow import REPORT_NAME, ProfileReport
from blade.token_grid import plain_orders

MOST_USUAL = 1.2 * USUAL_DENSITY
"""Largest density of the patterns that count toward the attention weight that a kind explains."""

RULE_POINTS = 24
"""Number of thresholds on the published rule's curve."""


def write_attention_report(report: ProfileReport, command: str) -> Path:
    """Write `report.html` beside the table and return its path.

    Args:
        report: the result of the search.
        command: the command that made the table.

    Raises:
        OutputError: if it cannot be written.
    """
    path = report.request.output / REPORT_NAME
    write_report(report_data(report, command), path)
    return path


def report_data(report: ProfileReport, command: str) -> ReportData:
    """Return the contents of the report; see `write_attention_report` for the arguments."""
    profile, search, choice = report.profile, report.search, report.choice
    source, grid = profile.source, profile.source.grid
    cells = profile.maps.shape[-1]
    disagreement, regret = prompt_dependence(profile, choice, search.costs.candidates)
    orders = tuple(dict.fromkeys((*plain_orders(), natural_order("window", source.block_size))))
    frames, height, width = source.video
    text = f" and {grid.text_tokens} of text" if grid.text_tokens else ""
    kinds, explained = explained_mass(profile)
    verified = None
    if report.verified:
        verified = {
            "psnr_db": float(np.mean([verification.psnr for verification in report.verified])),
            "ssim": float(np.mean([verification.ssim for verification in report.verified])),
        }
    return ReportData(
        title=f"Attention patterns of {'the bundled model' if source.model == BUNDLED else source.model}",
        command=command,
        date=datetime.now(UTC).date().isoformat(),
        model=source.model,
        machine={name: str(value) for name, value in describe_machine(report.device).items()},
        versions={
            name: value or "none" for name, value in describe_versions(("blade-video", "torch", "diffusers")).items()
        },
        video=f"{frames} frames of {width}x{height}",
        grid=f"{grid.frames} x {grid.height} x {grid.width} tokens{text}",
        block_size=source.block_size,
        token_order=source.token_order,
        steps=source.steps,
        group_starts=choice.group_starts,
        prompts=source.prompts,
        branches=len(profile.error) // len(source.prompts),
        budget=_budget(report),
        notes=_notes(report),
        candidates=tuple(
            Candidate(name=pattern.name, kind=pattern.kind, density=float(density), cost=float(cost))
            for pattern, density, cost in zip(source.candidates, source.densities, search.costs.candidates)
        ),
        assignment=choice.candidates,
        head_error=search.head_errors(choice).astype(np.float32),
        explained=explained,
        explained_kinds=kinds,
        maps=_bytes_of_maps(profile.maps),
        masks=np.stack([mask_cells(pattern, source, cells) for pattern in source.candidates]),
        stripes=_stripes(report, cells),
        curve=search.curve().astype(np.float32),
        published_curve=_rule_curve(search, report.rule),
        chosen=(choice.density, choice.error),
        verified=verified,
        recall=_recall(profile),
        prompt_disagreement=disagreement.astype(np.float32),
        prompt_regret=regret.astype(np.float32),
        orders=orders,
        order_densities=tuple(
            (pattern.name, tuple(pattern_density(pattern, grid, source.block_size, order) for order in orders))
            for pattern in dict.fromkeys(_without_order(pattern) for pattern in source.candidates)
            if pattern.kind not in ("full", "skip")
        ),
    )


def explained_mass(profile: AttentionProfile) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the attention weight that the best pattern of each kind captures, up to about the usual density.

    Returns:
        The kinds, and the weight: (kinds, layers, steps) float32, mean over heads.
    """
    source = profile.source
    numbers_by_kind: dict[str, list[int]] = {}
    for number, (pattern, density) in enumerate(zip(source.candidates, source.densities)):
        if pattern.kind not in ("full", "skip") and density <= MOST_USUAL:
            numbers_by_kind.setdefault(pattern.kind, []).append(number)
    mass = [profile.mass[:, :, numbers].max(2).mean(-1).T for numbers in numbers_by_kind.values()]
    return tuple(numbers_by_kind), np.stack(mass).astype(np.float32)


def mask_cells(pattern: HeadPattern, source: ProfileSource, cells: int) -> np.ndarray:
    """Return the share of token pairs that a pattern keeps in each patch of a map, 255 for all: (cells, cells) uint8.

    The map is in the model's token order, regardless of the order in which the pattern's blocks are cut.
    """
    grid, size, device = source.grid, source.block_size, torch.device("cpu")
    keep = pattern_blocks(pattern, grid, size, source.token_order, device).double()
    blocks = len(keep)
    block = torch.arange(grid.sequence_length) // size
    cell = block * cells // blocks
    if pattern.order is not None and pattern.order != source.token_order:
        block = order_places(grid, source.token_order, pattern.order, device) // size
    counts = torch.zeros(cells, blocks, dtype=torch.float64)
    counts.index_put_((cell, block), torch.ones(len(cell), dtype=torch.float64), accumulate=True)
    pairs = counts @ keep @ counts.T
    sizes = counts.sum(1)
    return (255 * pairs / (sizes[:, None] * sizes)).round().byte().numpy()


def _budget(report: ProfileReport) -> str:
    if report.rule is not None and report.request.budget is None:
        return f"the published rule, epsilon {report.rule.threshold:g}"
    return str(report.request.budget)


def _notes(report: ProfileReport) -> tuple[str, ...]:
    source, costs = report.profile.source, report.search.costs
    notes = [
        "Errors are those of the layer's output after its projection, relative to the energy of the layer's heads; "
        + (
            "steps and layers are weighted by their measured influence on the finished video."
            if report.request.influence_prompts and report.rule is None
            else "all steps and layers count the same."
        ),
        "Costs are times on this device." if costs.measured else "Costs are numbers of operations.",
    ]
    if report.rule is not None:
        notes.append(
            f"Chosen by the published rule, every head independently: lambda {report.rule.weight:g}, epsilon "
            f"{report.rule.threshold:.4g}, errors relative to the mean energy of the layer's heads."
        )
    elif report.choice.gap >= 5e-5:
        notes.append(f"The choice is at most {report.choice.gap:.2%} above the best possible one.")
    if report.adaptive is not None:
        notes.append(
            f"Adaptive block-sparse attention reaches this error at a sparsity of about "
            f"{report.adaptive.config.sparsity:g}, a run density of {report.adaptive.density:.3f}."
        )
    if report.request.sampled_blocks is not None:
        count = report.request.sampled_blocks
        notes.append(f"{count} query blocks per layer were sampled, different ones in every step.")
    if source.guidance_scale <= 1:
        notes.append("The generations used no guidance.")
    return tuple(notes)


def _bytes_of_maps(maps: np.ndarray) -> np.ndarray:
    roots = np.sqrt(maps)
    most = roots.max((-2, -1), keepdims=True)
    levels: np.ndarray = np.rint(255 * roots / np.maximum(most, 1e-12)).astype(np.uint8)
    return levels


def _stripes(report: ProfileReport, cells: int) -> np.ndarray | None:
    """Return the share of the keys in each column of patches that heads with stripes keep."""
    table, source = report.config.patterns, report.profile.source
    assert table is not None
    stripes = np.zeros((*table.assignment.shape, cells), dtype=np.uint8)
    if not any(pattern.kind == "vertical" for pattern in table.patterns):
        return None
    middle = source.grid.video_start + source.grid.video_tokens // 2  # a row of video keeps nothing but the stripes
    row = middle // source.block_size * cells // -(-source.grid.sequence_length // source.block_size)
    columns = [mask_cells(p, source, cells)[row] if p.kind == "vertical" else None for p in table.patterns]
    for index in np.ndindex(*table.assignment.shape):
        shares = columns[table.assignment[index]]
        if shares is not None:
            stripes[index] = shares
    return stripes


def _rule_curve(search: PatternSearch, rule: GreedyRule | None) -> np.ndarray:
    """Return ascending densities and the errors of the published rule with these candidates, over its threshold."""
    rule = rule or GreedyRule()
    losses = search.losses(rule)
    points = {}
    for threshold in np.quantile(losses[:, :, 1:].min(2), np.linspace(0, 1, RULE_POINTS)):
        choice = search.by_rule(GreedyRule(weight=rule.weight, threshold=float(threshold)), losses)
        points[round(choice.density, 4)] = choice.error
    return np.array(sorted(points.items()), dtype=np.float32)


def _recall(profile: AttentionProfile) -> np.ndarray | None:
    """Return the weight in the blocks of the adaptive method nearest the usual sparsity, and in the best as many."""
    source = profile.source
    if not source.adaptive:
        return None
    nearest = min(range(len(source.adaptive)), key=lambda n: abs(1 - source.adaptive[n].sparsity - USUAL_DENSITY))
    number = len(source.candidates) + nearest
    weights = [array[:, :, number].mean(-1).T for array in (profile.mass, profile.best_mass)]
    return np.stack(weights, axis=-1).astype(np.float32)


def _without_order(pattern: HeadPattern) -> HeadPattern:
    return pattern if pattern.order is None else replace(pattern, order=None)
