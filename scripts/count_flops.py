"""Count the operations of published runs, beside their published totals: count_flops.py docs/results/flops."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, WanTransformer3DModel
from torch import nn

from blade import BladeConfig
from blade.attention.family import find_family
from blade.costs import PARTS, forward_cost, run_cost
from blade.evaluation.report_tables import markdown_table, write_table
from blade.machine import describe_versions

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
"""Transformer, latent, guidance, and PFLOPs of 50 dense steps (Sparse-vDiT, arXiv 2506.03065, table 2)."""

STEPS = 50


def main(
    output: Annotated[Path | None, typer.Argument(help="Folder for flops.json and flops.md.")] = None,
) -> None:
    """Print a table, and write it."""
    headings = ["run of 50 steps", *PARTS, "total", "published", "residual", "at the preset's sparsity"]
    rows, records = [], []
    for name, (make, latent, guidance, published) in RUNS.items():
        with torch.device("meta"):
            transformer = make()
        forward = forward_cost(transformer, latent)
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
    lines = markdown_table(headings, rows)
    print("\n".join(lines))
    if output is None:
        return
    write_table(
        output,
        "flops",
        title="Operations of published runs",
        note="PFLOPs of whole runs, counted on PyTorch's meta device from the models' configurations. Published: "
        "Sparse-vDiT, arXiv 2506.03065, table 2.",
        lines=lines,
        values={
            "command": shlex.join(["python", *sys.argv]),
            "versions": describe_versions(("torch", "diffusers")),
            "runs": records,
        },
    )


if __name__ == "__main__":
    typer.run(main)
