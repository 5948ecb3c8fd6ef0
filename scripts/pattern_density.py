"""Tabulate the density of head patterns in each token order: pattern_density.py docs/results/pattern-density."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from blade.attention.patterns import HeadPattern, Window, pattern_density
from blade.benchmarks.layers import model_shapes
from blade.cli.command import run_script
from blade.common.machine import describe_versions
from blade.common.tables import check_table, markdown_table, write_table
from blade.token_grid import plain_orders

BLOCK_SIZE = 128
ORDERS = (*plain_orders(), "bricks(2,8,8)")
HALF_WIDTHS = {"wan-14b": 3.0, "hunyuan-video": 2.0, "cogvideox-1.5": 1.42}
"""Half-widths in frames that reproduce the published totals (Sparse-vDiT, arXiv 2506.03065, table 2)."""


def patterns(frames: float) -> list[HeadPattern]:
    """List the patterns to tabulate for a model."""
    near = {"frame": Window(width=2), "row": Window(width=8), "column": Window(width=8)}
    return [
        HeadPattern(kind="diagonal", frames=frames),
        HeadPattern(kind="multi-diagonal", frames=frames),
        HeadPattern(kind="vertical", share=0.25),
        HeadPattern(kind="window", windows={"frame": Window(width=2)}),
        HeadPattern(kind="window", windows={"place": Window(width=64)}),
        HeadPattern(kind="window", windows=near),
    ]


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for density.json and density.md.")] = None,
) -> None:
    """Print a table and write it."""
    if output is not None:
        check_table(output, "density")
    rows, records = [], []
    for model, frames in HALF_WIDTHS.items():
        shape = model_shapes()[model]
        assert shape.grid is not None
        for pattern in patterns(frames):
            densities = {order: pattern_density(pattern, shape.grid, BLOCK_SIZE, order) for order in ORDERS}
            rows.append([str(shape), pattern.name, *(f"{density:.3f}" for density in densities.values())])
            records.append({"model": str(shape), "pattern": pattern.to_dict(), "density": densities})
    lines = markdown_table(["model", "pattern", *ORDERS], rows)
    print("\n".join(lines))
    if output is None:
        return
    write_table(
        output,
        "density",
        title="Density of head patterns",
        note=f"Share of all pairs of tokens, text included, in blocks of {BLOCK_SIZE} that contain a pair of the "
        "pattern, by the token order in which blocks are formed.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch",)),
            "block_size": BLOCK_SIZE,
            "patterns": records,
        },
    )


if __name__ == "__main__":
    run_script(main)
