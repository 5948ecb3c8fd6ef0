"""From records of an evaluation to its report: JSON, tables, and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from blade.evaluation.report_tables import markdown_table
from blade.evaluation.shapes import Record, ShapesEvaluation, model_fingerprint, read_records
from blade.evaluation.shapes_settings import PROMPT_SEED
from blade.video_io import write_files

GROUPS = {"single": 1, "two": 2}
"""Prompts that are reported together, by their number of objects."""

RESAMPLES = 2000
"""Bootstrap resamples of a confidence interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its 95 % confidence interval, by the percentile bootstrap over videos."""

    mean: float
    low: float
    high: float
    videos: int
    """How many videos have a value."""


def _of_objects(name: str) -> Callable[[Record], float | None]:
    def share(record: Record) -> float | None:
        marks = [attributes[name] for attributes in record["attributes"] if name in attributes]
        return sum(marks) / len(marks) if marks else None

    return share


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: None if record[name] is None else float(record[name])


MEASURES: dict[str, Callable[[Record], float | None]] = {
    **{name: _of_objects(name) for name in ("colour", "shape", "direction", "size", "fill", "speed")},
    **{
        name: _field(name)
        for name in (
            "background",
            "basics",
            "all_attributes",
            "realism_error",
            "psnr",
            "ssim",
            "motion_ratio",
            "layer_density",
            "run_density",
            "seconds_denoising",
        )
    },
}
"""What is averaged over videos. An attribute counts by object, `basics` and `all_attributes` by video."""

COLUMNS = {
    "layer_density": ("layer density", "{:.3f}"),
    "run_density": ("run density", "{:.3f}"),
    "colour": ("colour", "{:.1%}"),
    "shape": ("shape", "{:.1%}"),
    "direction": ("direction", "{:.1%}"),
    "size": ("size", "{:.1%}"),
    "fill": ("fill", "{:.1%}"),
    "speed": ("speed", "{:.1%}"),
    "background": ("background", "{:.1%}"),
    "basics": ("basics", "{:.1%}"),
    "all_attributes": ("all", "{:.1%}"),
    "realism_error": ("realism error", "{:.3f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "motion_ratio": ("motion", "{:.3f}"),
    "seconds_denoising": ("seconds", "{:.1f}"),
}
"""Heading and format of a table's columns."""

BRIEF = ("run_density", "basics", "all_attributes", "realism_error", "psnr", "ssim", "motion_ratio")
"""Columns of a table for a terminal."""

WITH_INTERVAL = ("basics", "all_attributes", "realism_error")
"""Columns that show their confidence interval, but for brief tables."""


def make_report(evaluation: ShapesEvaluation, command: str) -> dict[str, Any]:
    """Sum up the records of an evaluation as plain JSON values.

    Args:
        evaluation: What was evaluated.
        command: The command line that did it.

    Returns:
        `missing` (videos without a record), the settings, machines and versions, and for every run and group an
        `Estimate` of each of `MEASURES` that has a value.
    """
    fingerprint = model_fingerprint(evaluation.model)
    records = read_records(evaluation, fingerprint)
    runs = []
    for run in evaluation.runs:
        groups = {}
        for name, objects in GROUPS.items():
            of_group = [
                record for (of_run, count, _), record in records.items() if (of_run, count) == (run.name, objects)
            ]
            if of_group:
                groups[name] = _estimates(of_group)
        runs.append(run.to_dict() | {"groups": groups})
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": evaluation.model,
        "fingerprint": fingerprint,
        "size": evaluation.size,
        "prompts": {"single": evaluation.single, "two": evaluation.two, "list": PROMPT_SEED, "held_out": True},
        "missing": len(evaluation.runs) * len(evaluation.prompts) - len(records),
        "machines": _distinct(record["machine"] | {"dtype": record["dtype"]} for record in records.values()),
        "versions": _distinct(record["versions"] for record in records.values()),
        "runs": runs,
    }


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `report.json`, `report.md`, and, where matplotlib is installed, `report.png`; all or none.

    Returns:
        The files' paths.

    Raises:
        OutputError: If one cannot be written.
    """
    files = {
        folder / "report.json": (json.dumps(report, indent=2) + "\n").encode(),
        folder / "report.md": markdown(report).encode(),
    }
    try:
        from blade.evaluation.shapes_plot import plot_report
    except ImportError:  # matplotlib is in the extra `plots`
        pass
    else:
        files[folder / "report.png"] = plot_report(report)
    folder.mkdir(parents=True, exist_ok=True)
    write_files(files)
    return list(files)


def table(report: dict[str, Any], group: str, *, brief: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of a group's table.

    Args:
        report: By `make_report`.
        group: A name of `GROUPS`.
        brief: Only what fits a terminal. Columns without any value are left out in any case.
    """
    present = [run for run in report["runs"] if group in run["groups"]]
    columns = [name for name in COLUMNS if any(name in run["groups"][group] for run in present)]
    settings = ["run", "steps", "guidance", "attention", "sparsity"]
    if brief:
        columns, settings = [name for name in columns if name in BRIEF], ["run"]
    rows = []
    for run in present:
        values = {"run": run["name"], **{name: "" if run[name] is None else f"{run[name]}" for name in settings[1:]}}
        estimates = run["groups"][group]
        cells = [_cell(name, estimates[name], brief) if name in estimates else "" for name in columns]
        rows.append([*values.values(), *cells])
    return [*settings, *(COLUMNS[name][0] for name in columns)], rows


def markdown(report: dict[str, Any]) -> str:
    """The report as a Markdown page."""
    size = report["size"]
    lines = [
        "# Moving shapes",
        "",
        f"{report['date']}, model `{report['model']}` ({report['fingerprint']}), {size['frames']} frames of "
        f"{size['width']}x{size['height']}, held-out prompts: {report['prompts']['single']} with one object, "
        f"{report['prompts']['two']} with two.",
        "",
        f"    {report['command']}",
        "",
    ]
    lines += [f"Machine: {_listed(machine)}." for machine in report["machines"]]
    lines += [f"Versions: {_listed(versions)}." for versions in report["versions"]]
    if report["missing"]:
        lines += ["", f"{report['missing']} videos are still missing."]
    for group in GROUPS:
        headings, rows = table(report, group)
        if rows:
            lines += ["", f"## {group.capitalize()}-object prompts", "", *markdown_table(headings, rows)]
    lines += [
        "",
        "Colour to background: share of the objects or videos whose caption names it that show it. Basics: share of "
        "videos in which every object has its colour, shape and direction; all: everything that the caption says. "
        "In brackets 95 % bootstrap intervals over videos. PSNR (dB), SSIM and motion (ratio) are against the dense "
        "run of the same steps and guidance. Seconds: denoising.",
        "",
    ]
    return "\n".join(lines)


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of values with its 95 % percentile bootstrap interval.

    Raises:
        ValueError: If there is no value.
    """
    if not len(values):
        raise ValueError("`values` must hold at least one value, got none.")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return Estimate(mean=float(array.mean()), low=float(low), high=float(high), videos=len(array))


def _estimates(records: list[Record]) -> dict[str, dict[str, float]]:
    estimates = {}
    for name, measure in MEASURES.items():
        values = [value for record in records if (value := measure(record)) is not None]
        if values:
            estimates[name] = asdict(bootstrap(values))
    return estimates


def _cell(name: str, estimate: dict[str, float], brief: bool) -> str:
    shown = COLUMNS[name][1].format
    text = shown(estimate["mean"])
    if brief or name not in WITH_INTERVAL:
        return text
    return f"{text} ({shown(estimate['low'])} to {shown(estimate['high'])})"


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
