"""Compare counted operations with the totals of published runs: count_flops.py docs/results/flops."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from blade import BladeConfig
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern, diagonal_density, pattern_density
from blade.cli.command import run_script
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.families.registry import find_family
from blade.models.costs import PARTS, ForwardCost, forward_cost, run_cost
from blade.profiling.candidates import pattern_of_density
from blade.token_grid import TokenGrid

RUNS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], bool, float]] = {
    "Wan2.1-T2V-14B, 720x1280, 81 frames": (WanTransformer3DModel, (21, 90, 160), True, 660.49),
    "HunyuanVideo, 720x1280, 129 frames": (HunyuanVideoTransformer3DModel, (33, 90, 160), False, 612.37),
    "CogVideoX1.5-5B, 768x1360, 81 frames": (
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=48,
            num_layers=42,
            patch_size_t=2,
            patch_bias=False,
            use_rotary_positional_embeddings=True,
        ),
        (21, 96, 170),
        True,
        147.87,
    ),
}
"""Transformer, latent size, guidance, and PFLOPs of 50 dense steps (Sparse-vDiT, arXiv 2506.03065, table 2)."""

STEPS = 50

BLOCK_SIZE = 128

WINDOWS: dict[str, tuple[float | None, int, tuple[int, ...], float, float]] = {
    "Wan2.1-T2V-14B, 720x1280, 81 frames": (3.0, 10, (0, 1), 401.21, 397.39),
    "HunyuanVideo, 720x1280, 129 frames": (2.0, 10, (0, 1), 258.84, 257.09),
    "CogVideoX1.5-5B, 768x1360, 81 frames": (None, 0, (), 72.34, 70.69),
}
"""Half-width of the diagonal in frames (None: the widest of density `DENSITY`), dense steps and dense layers that
reproduce the published PFLOPs of window attention, and the published PFLOPs of window attention and Sparse-vDiT (arXiv
2506.03065, table 2)."""

DENSITY = 0.25


@dataclass(frozen=True)
class Table:
    """Lines of a Markdown table, and the records behind them."""

    lines: list[str]
    records: list[dict[str, Any]]


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for flops.json and flops.md.")] = None,
) -> None:
    """Print two tables and write them."""
    if output is not None:
        check_table(output, "flops")
    costs = {}
    for name, (make, latent, guidance, _) in RUNS.items():
        with torch.device("meta"):
            transformer = make()
        costs[name] = transformer, forward_cost(transformer, latent), guidance
    runs, windows = count_runs(costs), count_windows(costs)
    lines = [*runs.lines, "", "With diagonal heads only, as in window attention:", "", *windows.lines]
    print("\n".join(lines))
    if output is None:
        return
    write_table(
        output,
        "flops",
        title="Operations of published runs",
        note="PFLOPs of whole runs, counted on PyTorch's meta device from the models' configurations, and of masks by "
        "their blocks. Published: Sparse-vDiT, arXiv 2506.03065, table 2.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch", "diffusers")),
            "runs": runs.records,
            "windows": windows.records,
        },
    )


def count_runs(costs: dict[str, tuple[nn.Module, ForwardCost, bool]]) -> Table:
    """Tabulate dense runs by part, and their total at the preset's sparsity."""
    headings = ["run of 50 steps", *PARTS, "total", "published", "residual", "at the preset's sparsity"]
    rows, records = [], []
    for name, (transformer, forward, guidance) in costs.items():
        published = RUNS[name][-1]
        dense = run_cost(forward, STEPS, guidance=guidance)
        config = BladeConfig.from_preset(find_family(transformer).preset_name(transformer))
        sparse = run_cost(forward, STEPS, guidance=guidance, config=config)
        residual = dense.total / (published * 1e15) - 1
        cells = [*(dense.flops[part] for part in PARTS), dense.total, published * 1e15]
        rows.append(
            [name, *(f"{flops / 1e15:.2f}" for flops in cells), f"{residual:+.2%}", f"{sparse.total / 1e15:.2f}"]
        )
        records.append(
            {
                "run": name,
                "tokens": forward.grid.sequence_length,
                "parameters": forward.parameters,
                "dense_flops": dense.flops,
                "dense_total": dense.total,
                "published_total": published * 1e15,
                "residual": residual,
                "sparse_flops": sparse.flops,
                "sparse_total": sparse.total,
                "config": config.to_dict(),
            }
        )
    return Table(markdown_table(headings, rows), records)


def count_windows(costs: dict[str, tuple[nn.Module, ForwardCost, bool]]) -> Table:
    """Tabulate runs in which every head of the sparse layers and steps has a diagonal pattern."""
    headings = [
        "run of 50 steps",
        "half-width, frames",
        "dense steps",
        "dense layers",
        "density by blocks",
        "by formula",
        "attention",
        "total",
        "window attention, published",
        "residual",
        "Sparse-vDiT, published",
    ]
    rows, records = [], []
    for name, (frames, dense_steps, dense_layers, published, sparse_vdit) in WINDOWS.items():
        _, forward, guidance = costs[name]
        pattern = widest_diagonal(forward.grid) if frames is None else HeadPattern(kind="diagonal", frames=frames)
        frames = pattern.frames
        assert frames is not None
        table = uniform_table(pattern, forward.layers, forward.heads, block_size=BLOCK_SIZE)
        config = BladeConfig(attention="patterns", patterns=table, dense_steps=dense_steps, dense_layers=dense_layers)
        cost = run_cost(forward, STEPS, guidance=guidance, config=config)
        formula = diagonal_density(forward.grid, frames, BLOCK_SIZE)
        residual = cost.total / (published * 1e15) - 1
        attention = cost.flops["self-attention"]
        rows.append(
            [
                name,
                f"{frames:g}",
                f"{dense_steps}",
                f"{len(dense_layers)}",
                f"{cost.density:.4f}",
                f"{formula:.4f}",
                f"{attention / 1e15:.2f}",
                f"{cost.total / 1e15:.2f}",
                f"{published:.2f}",
                f"{residual:+.2%}",
                f"{sparse_vdit:.2f}",
            ]
        )
        records.append(
            {
                "run": name,
                "frames": frames,
                "dense_steps": dense_steps,
                "dense_layers": list(dense_layers),
                "block_size": BLOCK_SIZE,
                "density": cost.density,
                "density_by_formula": formula,
                "flops": cost.flops,
                "total": cost.total,
                "published_total": published * 1e15,
                "published_sparse_vdit": sparse_vdit * 1e15,
                "residual": residual,
            }
        )
    return Table(markdown_table(headings, rows), records)


def widest_diagonal(grid: TokenGrid) -> HeadPattern:
    """Find the widest diagonal with at most `DENSITY`."""

    def density(pattern: HeadPattern) -> float:
        return pattern_density(pattern, grid, BLOCK_SIZE, "raster")

    return pattern_of_density("diagonal", DENSITY, density, grid)


if __name__ == "__main__":
    run_script(main)
