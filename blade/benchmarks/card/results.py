"""What a card's report holds, by part, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from blade_kernels.block_sparse import IMPLEMENTATIONS

from blade.benchmarks import attention_report
from blade.benchmarks.card.quality import psnr_at, quality_by_density
from blade.common.tables import Table

Report = dict[str, Any]


def results_of(report: Report, part: str) -> Iterator[Report]:
    """Yield the results of a part's steps, whole or partial."""
    return (step["result"] for step in report["steps"] if step["part"] == part and "result" in step)


def merged_attention(report: Report, blocks: str) -> Report | None:
    """Return the benchmarks of attention with a choice of blocks as one, by size; None if there is none."""
    results = [
        item for item in results_of(report, "attention") if item["settings"]["blocks"] == blocks and item["cases"]
    ]
    if not results:
        return None
    merged: dict[Any, Report] = {}
    for case in (case for item in results for case in item["cases"]):
        key = attention_report.size_of(case), case["density"]
        merged[key] = _joined(merged[key], case) if key in merged else case
    cases = [*merged.values()]
    sizes = list(dict.fromkeys(map(attention_report.size_of, cases)))
    cases.sort(key=lambda case: (sizes.index(attention_report.size_of(case)), case["density"]))
    absent = {name: reason for item in results for name, reason in item.get("absent", {}).items()}
    return {**results[0], "cases": cases, "absent": absent}


def _joined(case: Report, other: Report) -> Report:
    """Return the times of two cases of the same size, density and mask, those of the first where both have them."""
    both = {name: {**other[name], **case[name]} for name in ("ms", "peak_mib", "error", "missing")}
    return {**case, **both, "sparse": list(dict.fromkeys((*case["sparse"], *other["sparse"])))}


def attention_speedups(report: Report) -> dict[str, dict[float, float]]:
    """Return how many times as fast as dense the whole operation of attention is, by size and density.

    The whole operation is the choice of blocks, making the mask, and the forward pass of the fastest implementation in
    full precision; dense is the fastest dense attention's forward pass.
    """
    speedups: dict[str, dict[float, float]] = {}
    for case in (merged_attention(report, "random") or {"cases": []})["cases"]:
        times = [
            case["ms"][name]["whole"]
            for name in case["sparse"]
            if name in IMPLEMENTATIONS and "whole" in case["ms"].get(name, {})
        ]
        if times:
            of_size = speedups.setdefault(str(attention_report.size_of(case)), {})
            of_size[case["density"]] = attention_report.dense_ms(case, "forward") / min(times)
    return speedups


def video_speedups(report: Report) -> dict[str, dict[float, float]]:
    """Return how many times as fast as dense a whole video with guidance and the preset is, by model and density.

    As many steps are dense as in the runs whose quality is known. Extrapolated from the timed passes.
    """
    share, speedups = quality_by_density()["dense_steps"], dict[str, dict[float, float]]()
    for result in results_of(report, "generation"):
        dense, *_ = result["runs"]
        others = dense["seconds"] - dense["transformer_seconds"]
        model = result["settings"]["model"].rpartition("/")[2]
        name = f"{model}, {result['frames']} frames of {result['width']}x{result['height']}, {dense['steps']} steps"
        for sparsity, ms in result.get("preset_pass_ms", {}).items():
            pass_ms = share * result["pass_ms"]["dense"] + (1 - share) * ms
            seconds = others + dense["passes"] * pass_ms / 1e3
            speedups.setdefault(name, {})[round(1 - float(sparsity), 4)] = dense["seconds"] / seconds
    return speedups


def quality_table(report: Report) -> Table | None:
    """Return the table of speed against quality; None if nothing was timed at a density whose quality is known."""
    columns = {f"attention, {name}": by_density for name, by_density in attention_speedups(report).items()}
    columns |= {f"video, {name}": by_density for name, by_density in video_speedups(report).items()}
    rows = []
    for density in sorted({density for by_density in columns.values() for density in by_density}):
        if (psnr := psnr_at(density)) is not None:
            cells = [f"{by_density[density]:.2f}" if density in by_density else "" for by_density in columns.values()]
            rows.append([f"{density:g}", f"{psnr['mean']:.1f} ({psnr['low']:.1f} to {psnr['high']:.1f})", *cells])
    if not rows:
        return None
    title = "Speed, times as fast as dense, against quality, which is the bundled model's and not of these"
    return Table(title, ["density", "PSNR to dense, dB (95 %)", *columns], rows)
