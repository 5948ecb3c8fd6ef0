"""The rows of an evaluation by a protocol in the table that all cards share: one for each sparse method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from blade.common.tables import Table, markdown_table
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import parse_seeds
from blade.evaluation.records import Record, Records
from blade.evaluation.runs import RunSettings
from blade.families.data import ComparisonProtocol
from blade.metrics.registry import SECONDS, measures

VERSIONS = {"blade-video": "blade", "torch": "torch", "diffusers": "diffusers"}
"""Packages whose versions a row has, with their names in it."""

LACKING = "not measured"
"""Cell without a value."""

PROTOCOL_NOTE = (
    "In the protocol's row, PSNR is the mean over the frames of a video, then over videos; seconds are those of the "
    "denoising, without text encoder and decoder, in the median over videos; several values in a cell belong to the "
    "settings of dense steps, in their order."
)
"""Explanation of a row, as a paragraph."""


def protocol_result(plan: EvaluationPlan, runs: Sequence[dict[str, Any]], records: Records) -> dict[str, Any] | None:
    """Return the rows of an evaluation by a protocol as plain JSON values; None without a protocol.

    Args:
        plan: The evaluation.
        runs: The report's runs.
        records: The records of the videos.

    Returns:
        `name`; `changes`, the settings that differ from the protocol's; and `rows`, one for each sparse method once
        all its videos and those of the dense run are there. Lists in a row follow its `dense_steps`.
    """
    protocol = plan.evaluation.protocol
    if protocol is None:
        return None
    reported = {run["name"]: run for run in runs}
    dense = next(run for run in plan.evaluation.runs if run.is_dense)
    rows = []
    for method in _methods(plan.evaluation.runs):
        of_runs = {
            run.name: [
                records[run.name, *prompt.key]
                for prompt in plan.evaluation.prompts
                if (run.name, *prompt.key) in records
            ]
            for run in (dense, *method)
        }
        if all(len(of_run) == len(plan.evaluation.prompts) for of_run in of_runs.values()):
            rows.append(_row(plan, protocol, dense, [(run, reported[run.name]) for run in method], of_runs))
    return {"name": protocol.name, "changes": _changes(plan, protocol), "rows": rows}


def protocol_table(result: dict[str, Any]) -> Table:
    """Return the table of the rows; the last column is left for the name of whoever measured.

    Args:
        result: The value of `protocol_result`.
    """
    rows = [[cell(row) for cell in _COLUMNS.values()] for row in result["rows"]]
    return Table(f"Protocol {result['name']}", [*_COLUMNS], rows)


def protocol_lines(result: dict[str, Any]) -> list[str]:
    """Return the table of the rows as lines of Markdown, to be pasted."""
    table = protocol_table(result)
    return markdown_table(table.headings, table.rows)


def _methods(runs: Iterable[RunSettings]) -> list[list[RunSettings]]:
    """Return the sparse runs, together where only name and dense steps differ."""
    methods: dict[RunSettings, list[RunSettings]] = {}
    for run in runs:
        if not run.is_dense:
            methods.setdefault(replace(run, name="any", dense_steps=None), []).append(run)
    return list(methods.values())


def _row(
    plan: EvaluationPlan,
    protocol: ComparisonProtocol,
    dense: RunSettings,
    method: Sequence[tuple[RunSettings, dict[str, Any]]],
    records: dict[str, list[Record]],
) -> dict[str, Any]:
    """Return the row of a method, whose runs come with what the report has of them."""
    everything = [record for of_run in records.values() for record in of_run]
    seconds = {name: median(record["seconds_denoising"] for record in of_run) for name, of_run in records.items()}
    sparse_seconds = [seconds[run.name] for run, _ in method]
    size = plan.size
    return {
        "protocol": protocol.name,
        "changes": _changes(plan, protocol) + _run_changes(plan, protocol, [run for run, _ in method]),
        "model": Path(plan.evaluation.model).name if _is_changed_model(plan, protocol) else protocol.model,
        "size": f"{size['height']}x{size['width']}x{size['frames']}",
        "card": _joined(record["machine"]["device"] for record in everything),
        "dense_kernel": _joined(record.get("dense_kernel") for record in records[dense.name]),
        "method": _method(*method[0]),
        "steps": dense.steps,
        "dense_steps": [_dense_steps(plan, run) for run, _ in method],
        "run_density": [_mean(reported, "run_density") for _, reported in method],
        "psnr": [_psnr(reported) for _, reported in method],
        "ssim": [_mean(reported, "ssim") for _, reported in method],
        "lpips": [_mean(reported, "lpips") for _, reported in method],
        "seconds_dense": seconds[dense.name],
        "seconds_sparse": sparse_seconds,
        "speedup": [seconds[dense.name] / value for value in sparse_seconds],
        "videos": len(plan.evaluation.prompts),
        "versions": _joined(
            ", ".join(f"{shown} {record['versions'].get(name)}" for name, shown in VERSIONS.items())
            for record in everything
        ),
    }


def _changes(plan: EvaluationPlan, protocol: ComparisonProtocol) -> list[str]:
    """Return the settings of all runs that differ from a protocol's, in words."""
    request = next(iter(plan.requests.values()))
    prompts = plan.evaluation.prompts
    texts = tuple(dict.fromkeys(prompt.text for prompt in prompts))
    seeds = tuple(sorted({prompt.seed for prompt in prompts}))
    size = (request.height, request.width, request.frames)
    differs = {
        "model": _is_changed_model(plan, protocol),
        "size": size != (protocol.height, protocol.width, protocol.frames),
        f"steps {request.steps}": request.steps != protocol.steps,
        f"guidance {request.guidance_scale:g}": request.guidance_scale != protocol.guidance_scale,
        f"{request.dtype}": request.dtype != protocol.dtype,
        "decoded in tiles": request.vae_tiling and not protocol.vae_tiling,
        "prompts": protocol.prompts.select(texts) != texts,
        f"seeds {','.join(map(str, seeds))}": seeds != parse_seeds(protocol.seeds),
    }
    return [change for change, is_different in differs.items() if is_different]


def _run_changes(plan: EvaluationPlan, protocol: ComparisonProtocol, runs: Sequence[RunSettings]) -> list[str]:
    """Return the settings of a method's runs that differ from a protocol's, in words."""
    layers = runs[0].dense_layers or ()
    differs = {
        "dense steps": [run.dense_steps for run in runs] != [*protocol.dense_steps],
        f"dense layers {'+'.join(map(str, layers)) or 'none'}": layers != protocol.dense_layers,
    }
    return [change for change, is_different in differs.items() if is_different]


def _is_changed_model(plan: EvaluationPlan, protocol: ComparisonProtocol) -> bool:
    return plan.evaluation.model != protocol.model


def _dense_steps(plan: EvaluationPlan, run: RunSettings) -> int:
    request = plan.requests[run.name]
    return request.steps if request.blade_config is None else request.blade_config.dense_step_count(request.steps)


def _method(run: RunSettings, reported: dict[str, Any]) -> str:
    """Return the words for a method: the kind of attention, where it came from, and its sparsity."""
    words = reported["attention"] if run.config is None else f"{reported['attention']} of {Path(run.config).name}"
    return words if reported.get("sparsity") is None else f"{words}, sparsity {reported['sparsity']:g}"


def _mean(reported: dict[str, Any], name: str) -> float | None:
    """Return the report's mean of a measure over all videos, None if it was not taken."""
    estimate = reported["groups"]["all"].get(name)
    return None if estimate is None else float(estimate["mean"])


def _psnr(reported: dict[str, Any]) -> float | None:
    """Return the PSNR of frames, averaged over each video and then over videos; None if it was not taken."""
    frames = reported["by_frame"].get("all", {}).get("psnr")
    return None if frames is None else fmean(frames)


def _joined(values: Iterable[Any]) -> str:
    """Return the different values in the order in which they come, joined."""
    return " + ".join(dict.fromkeys("not recorded" if value is None else str(value) for value in values))


def _shown(name: str, values: Sequence[float | None]) -> str:
    """Return values in the format of a measure; each run of a method has one, or none has."""
    measure = measures()[name]
    known = [measure.shown(value) for value in values if value is not None]
    return " / ".join(known) if len(known) == len(values) else LACKING


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "protocol": lambda row: row["protocol"] + (f" (changed: {', '.join(row['changes'])})" if row["changes"] else ""),
    "model": lambda row: row["model"],
    "size": lambda row: row["size"],
    "card": lambda row: row["card"],
    "dense kernel": lambda row: row["dense_kernel"],
    "method": lambda row: row["method"],
    "dense steps": lambda row: f"{' / '.join(map(str, row['dense_steps']))} of {row['steps']}",
    "run density": lambda row: _shown("run_density", row["run_density"]),
    "PSNR": lambda row: _shown("psnr", row["psnr"]),
    "SSIM": lambda row: _shown("ssim", row["ssim"]),
    "LPIPS": lambda row: _shown("lpips", row["lpips"]),
    "seconds dense": lambda row: SECONDS.shown(row["seconds_dense"]),
    "seconds sparse": lambda row: _shown(SECONDS.name, row["seconds_sparse"]),
    "speed-up": lambda row: " / ".join(f"{value:.2f}" for value in row["speedup"]),
    "videos": lambda row: f"{row['videos']}",
    "versions": lambda row: row["versions"],
    "measured by": lambda row: "",
}
"""Cells of a row, by heading."""
