"""Draw the figure of docs/kernels.md: python scripts/draw_kernels.py docs/images/kernels.png."""

import io
from pathlib import Path
from typing import Annotated

import torch
import typer
from blade_kernels.block_mask import BlockMask
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from blade.cli.command import run_script
from blade.common.files import check_writable, write_files

KEPT, CHOSEN, PALE, POOLED = "#9db8d9", "#d1495b", "#f2f2f2", "#edae49"
ROW, COLUMN, BLOCKS = 3, 5, 8


def main(output: Annotated[Path, typer.Argument(help="The PNG.")]) -> None:
    """Write the figure: a mask, the iteration over one of its rows, and the transposed list of one of its columns."""
    check_writable(output)
    generator = torch.Generator().manual_seed(5)
    keep = torch.rand(BLOCKS, BLOCKS, generator=generator) < 0.3
    keep |= torch.eye(BLOCKS, dtype=torch.bool)
    mask = BlockMask.from_dense(keep[None, None])
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.6), width_ratios=(1, 1.25, 1))
    draw_mask(left, keep)
    draw_walk(middle, mask)
    draw_transposed(right, keep)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_files({output: buffer.getvalue()})


def cell(axes: Axes, x: float, y: float, colour: str, text: str = "", *, edge: str = "white") -> None:
    """Draw a labelled square."""
    axes.add_patch(Rectangle((x, y), 0.94, 0.94, facecolor=colour, edgecolor=edge))
    axes.text(x + 0.47, y + 0.47, text, ha="center", va="center", fontsize=9)


def prepare(axes: Axes, title: str, width: float, height: float) -> None:
    """Set up axes for cells, with the first row at the top."""
    axes.set(xlim=(-1.2, width), ylim=(height, -1.2), aspect="equal")
    axes.axis("off")
    axes.set_title(title, fontsize=11)


def draw_mask(axes: Axes, keep: torch.Tensor) -> None:
    """Draw the bit map, with one row and one column marked."""
    prepare(axes, "the mask of one head: rows are query blocks", BLOCKS, BLOCKS + 1.2)
    for row in range(BLOCKS):
        for column in range(BLOCKS):
            marked = row == ROW or column == COLUMN
            kept = bool(keep[row, column])
            cell(axes, column, row, KEPT if kept else PALE, edge=CHOSEN if marked and kept else "white")
    axes.text(-0.2, ROW + 0.5, f"row {ROW}", ha="right", va="center", color=CHOSEN, fontsize=9)
    axes.text(COLUMN + 0.5, -0.25, f"key block {COLUMN}", ha="center", va="bottom", color=CHOSEN, fontsize=9)


def draw_walk(axes: Axes, mask: BlockMask) -> None:
    """Draw the keys and values that the program of one tile of queries iterates over."""
    prepare(axes, f"forward: the program of row {ROW}", 10.2, BLOCKS + 1.2)
    count = int(mask.counts[0, 0, ROW])
    kept = mask.indices[0, 0, ROW, :count].tolist()
    axes.text(-1, 0.45, f"count {count}, list:", va="center", fontsize=9)
    for slot, block in enumerate(kept):
        cell(axes, 2.6 + slot, 0, KEPT, str(block))
    axes.text(-1, 2.45, "tile of q", va="center", fontsize=9)
    cell(axes, 0.9, 2, CHOSEN, f"q {ROW}")
    axes.text(2.05, 2.45, "x", va="center", fontsize=11)
    for slot, block in enumerate(kept):
        cell(axes, 2.6 + slot, 2, KEPT, f"k {block}")
        cell(axes, 2.6 + slot, 3, KEPT, f"v {block}")
    for window in range(2):
        cell(axes, 2.9 + count + window, 2, POOLED, f"p {window}")
        cell(axes, 2.9 + count + window, 3, POOLED, f"u {window}")
    axes.text(3.7 + count / 2, 4.7, "one walk: kept blocks, then pooled tokens (+ ln n)", ha="center", fontsize=9)
    lines = (
        "for each tile:  s = scale q.k",
        "    m' = max(m, max s)",
        "    l  = l 2^(m - m') + sum 2^(s - m')",
        "    o  = o 2^(m - m') + 2^(s - m') v",
        "at the end:     out = o / l,  lse = m + log l",
    )
    for number, line in enumerate(lines):
        axes.text(-1, 6 + 0.65 * number, line, family="monospace", fontsize=9, va="center")


def draw_transposed(axes: Axes, keep: torch.Tensor) -> None:
    """Draw the transposed lists, and the program of one key block."""
    prepare(axes, f"backward: the program of key block {COLUMN}", 9.6, BLOCKS + 1.2)
    starts = [0, *keep.sum(0).cumsum(0).tolist()]
    axes.text(-1, 0.45, "starts:", va="center", fontsize=9)
    for block, start in enumerate(starts):
        cell(axes, 1 + 0.95 * block, 0, CHOSEN if block in (COLUMN, COLUMN + 1) else PALE, str(start))
    rows = keep[:, COLUMN].nonzero().flatten().tolist()
    axes.text(-1, 2.45, f"rows[{starts[COLUMN]}:{starts[COLUMN + 1]}]:", va="center", fontsize=9)
    for slot, row in enumerate(rows):
        cell(axes, 2.2 + slot, 2, KEPT, str(row))
        cell(axes, 2.2 + slot, 3.4, KEPT, f"q {row}")
        cell(axes, 2.2 + slot, 4.4, KEPT, f"do {row}")
    cell(axes, 0.2, 3.4, CHOSEN, f"k {COLUMN}")
    cell(axes, 0.2, 4.4, CHOSEN, f"v {COLUMN}")
    axes.text(1.55, 4.4, "x", va="center", fontsize=11)
    lines = ("for each tile:  a  = e^(s - lse)", "    ds = a (do.v - delta)", "    dv += a do", "    dk += ds q")
    for number, line in enumerate(lines):
        axes.text(-1, 6.4 + 0.65 * number, line, family="monospace", fontsize=9, va="center")


if __name__ == "__main__":
    run_script(main)
