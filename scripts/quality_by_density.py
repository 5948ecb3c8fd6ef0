"""Gather what the preset's quality is at each density: python scripts/quality_by_density.py.

`blade-bench gpu` plots it against a card's speed. Quality needs trained weights and hours, so that it is not measured
on the card.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from blade.benchmarks.card.quality import PATH
from blade.cli.command import run_script
from blade.common.files import check_writable, write_files

ROOT = Path(__file__).resolve().parents[1]

REPORTS = {
    "docs/results/shapes-default/lower/report.json": (0.5, 0.7, 0.75),
    "docs/results/shapes-default/report.json": (0.8, 0.9),
}
"""The evaluations behind the table of docs/selection.md, and the sparsities that it takes from each."""

PREFIX = "new-"
"""Beginning of the names of runs with today's preset."""


def main(output: Annotated[Path, typer.Argument(help="The JSON.")] = PATH) -> None:
    """Write the mean PSNR to dense by sparsity and density, with its 95 % interval."""
    check_writable(output)
    write_files({output: (json.dumps(gather(), indent=2) + "\n").encode()})


def gather() -> dict[str, Any]:
    """Return the settings that all runs share, and `points` by rising sparsity."""
    points, shared = [], list[dict[str, Any]]()
    for name, sparsities in REPORTS.items():
        report = json.loads((ROOT / name).read_text(encoding="utf-8"))
        runs = {run["name"]: run for run in report["runs"]}
        for sparsity in sparsities:
            run = runs[f"{PREFIX}{sparsity:g}"]
            config, estimates = run["blade_config"], run["groups"]["all"]
            shared.append(
                {
                    "model": report["model"],
                    "size": report["size"],
                    "videos": estimates["psnr"]["videos"],
                    "steps": run["steps"],
                    "guidance": run["guidance"],
                    "dense_steps": config["dense_steps"],
                    "dense_layers": config["dense_layers"],
                }
            )
            points.append(
                {
                    "sparsity": sparsity,
                    "layer_density": estimates["layer_density"]["mean"],
                    "run_density": estimates["run_density"]["mean"],
                    "psnr": {name: estimates["psnr"][name] for name in ("mean", "low", "high")},
                }
            )
    if any(settings != shared[0] for settings in shared):
        raise ValueError(f"`REPORTS` must be of runs with the same settings, got {shared}.")
    return {"source": list(REPORTS), "measure": "PSNR to dense, dB", **shared[0], "points": points}


if __name__ == "__main__":
    run_script(main)
