"""Plot quality against work.

python scripts/draw_quality.py docs/images/quality.png --line docs/results/shapes-default/new=preset
"""

import io
import json
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import pyplot as plt

from blade import BladeConfig
from blade.cli.command import run_command
from blade.common.files import check_writable, write_files
from blade.evaluation.plot import interval_reach
from blade.models.costs import ForwardCost, forward_cost, run_cost
from blade.models.loading import load_empty_model

COLOURS = ("#0072B2", "#7F7F7F", "#D55E00", "#009E73")
MARKERS = ("o", "s", "^", "D")


def main(
    output: Annotated[Path, typer.Argument(help="The PNG.")],
    line: Annotated[
        list[str],
        typer.Option(
            help="FOLDER/PREFIX=LABEL: joins the runs of `blade-evaluate` in FOLDER whose names begin with PREFIX-; "
            "sparse runs of the bundled model."
        ),
    ],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Plot the PSNR to dense of each run against the operations of its self-attention, those of choosing included."""
    check_writable(output)
    points = {label: read_points(Path(source)) for source, _, label in (text.partition("=") for text in line)}
    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (label, found), colour, marker in zip(points.items(), COLOURS, MARKERS):
        shares, sparsities, psnrs = zip(*found)
        means = [psnr["mean"] for psnr in psnrs]
        reaches = [*zip(*(interval_reach(psnr) for psnr in psnrs))]
        axes.errorbar(shares, means, yerr=reaches, color=colour, marker=marker, capsize=3, label=label)
        for share, sparsity, mean in zip(shares, sparsities, means):
            axes.annotate(
                f"{sparsity:g}", (share, mean), (6, -12), textcoords="offset points", fontsize=8, color=colour
            )
    axes.set_xlabel("operations of self-attention, the choice of blocks included, of dense attention's")
    axes.set_ylabel("PSNR to dense, dB")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="labels: sparsity")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_files({output: buffer.getvalue()})


def read_points(source: Path) -> list[tuple[float, float, dict[str, float]]]:
    """Read the runs of a line, by rising operations: their share of dense attention's, sparsity, and PSNR."""
    report = json.loads((source.parent / "report.json").read_text(encoding="utf-8"))
    model = load_empty_model()
    size = model.latent_size(*(report["size"][name] for name in ("height", "width", "frames")))
    forward = forward_cost(model.transformer, size)
    points = []
    for run in report["runs"]:
        if run["name"].rpartition("-")[0] == source.name and run["blade_config"]:
            config = BladeConfig.from_dict(run["blade_config"])
            share = attention_share(forward, run["steps"], run["guidance"] > 1, config)
            points.append((share, config.sparsity, run["groups"]["all"]["psnr"]))
    if not points:
        raise ValueError(f"`line` must name runs of {source.parent}, got {source.name}, which begins none.")
    return sorted(points, key=lambda point: point[0])


def attention_share(forward: ForwardCost, steps: int, guidance: bool, config: BladeConfig) -> float:
    """Return the operations of self-attention and of choosing blocks in a run, of those of a dense one."""
    sparse, dense = (run_cost(forward, steps, guidance=guidance, config=given).flops for given in (config, None))
    return (sparse["self-attention"] + sparse.get("block selection", 0.0)) / dense["self-attention"]


if __name__ == "__main__":
    run_command(main)
