"""From the records of an evaluation to its report: JSON and tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

import numpy as np
import torch

from blade.common.tables import Table
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import GROUPS, groups_of, is_in
from blade.evaluation.records import Record, Records, read_records
from blade.evaluation.runs import RunSettings, selector_notes
from blade.evaluation.videos import video_path
from blade.media.video import mp4_frames
from blade.metrics.distribution import THUMBNAIL, Distance, diversity, frechet_distance, resampled_distances, thumbnail
from blade.metrics.estimates import bootstrap, paired_difference

Measured = dict[tuple[str, int], float]
"""A measure by prompt and seed."""


def _of_objects(name: str) -> Callable[[Record], float | None]:
    def share(record: Record) -> float | None:
        marks = [attributes[name] for attributes in record.get("attributes", ()) if name in attributes]
        return sum(marks) / len(marks) if marks else None

    return share


def _field(name: str) -> Callable[[Record], float | None]:
    return lambda record: None if record.get(name) is None else float(record[name])


ATTRIBUTES = ("colour", "shape", "direction", "size", "fill", "speed")
"""What the moving-shapes scorer judges of every object."""

COLUMNS = {
    "layer_density": ("layer density", "{:.3f}"),
    "run_density": ("run density", "{:.3f}"),
    "psnr": ("PSNR", "{:.2f}"),
    "ssim": ("SSIM", "{:.4f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "motion": ("motion", "{:.2f}"),
    "motion_ratio": ("motion to dense", "{:.3f}"),
    **{name: (name, "{:.1%}") for name in ATTRIBUTES},
    "background": ("background", "{:.1%}"),
    "basics": ("basics", "{:.1%}"),
    "all_attributes": ("all", "{:.1%}"),
    "realism_error": ("realism error", "{:.3f}"),
    "diversity": ("diversity", "{:.4f}"),
    "frechet": ("Frechet", "{:.2f}"),
    "seconds_denoising": ("seconds", "{:.2f}"),
}
"""Measures in the order of a table's columns, with heading and format."""

LEAST_REPEATED = 2
"""Prompts with several videos from which on their diversity is told: a caption may come twice by chance."""

OF_MANY = ("diversity", "frechet")
"""Measures of several videos together."""

MEASURES: dict[str, Callable[[Record], float | None]] = {
    name: _of_objects(name) if name in ATTRIBUTES else _field(name) for name in COLUMNS if name not in OF_MANY
}
"""What is averaged over videos. An attribute counts by object, `basics` and `all_attributes` by video."""

BRIEF = (
    "run_density", "psnr", "ssim", "lpips", "motion_ratio", "basics", "all_attributes", "realism_error", "frechet",
    "seconds_denoising",
)  # fmt: skip
"""Columns of a table for a terminal."""

WITH_INTERVAL = (
    "psnr", "ssim", "lpips", "motion_ratio", "basics", "all_attributes", "realism_error", "diversity", "frechet",
)  # fmt: skip
"""Columns that show their confidence interval, but for brief tables."""

COMPARED = (
    "psnr", "ssim", "lpips", "motion", "motion_ratio", "basics", "all_attributes", "realism_error", "diversity",
    "seconds_denoising",
)  # fmt: skip
"""Measures of which the difference to the baseline is told."""


def make_report(plan: EvaluationPlan, command: str) -> dict[str, Any]:
    """Sum up the records of an evaluation as plain JSON values.

    Args:
        plan: What was evaluated.
        command: The command line that did it.

    Returns:
        `missing` (videos without a record), the settings, machines and versions, and for every run and group of
        prompts, in `groups`, an `Estimate` of each of `MEASURES` that has a value; in `by_frame`, the means over
        videos of each frame's PSNR and SSIM; and, in `differences`, an `Estimate` of how far each of `COMPARED` is
        from the `baseline`, over the videos that both have. The Frechet distance is to the videos of `reference`.
    """
    evaluation, records = plan.evaluation, read_records(plan)
    baseline, present = evaluation.baseline_run, groups_of(evaluation.prompts)
    measured = {
        (run.name, group): _measured(plan, run, group, records) for run in evaluation.runs for group in present
    }
    distances = {group: _distances(plan, group, records) for group in present}
    runs = []
    for run in evaluation.runs:
        groups, differences, by_frame = {}, {}, dict[str, Any]()
        for group in present:
            by_frame |= _by_frame(plan, run, group, records)
            own, others = measured[run.name, group], measured[baseline.name, group]
            of_many = distances[group]
            if own:
                groups[group] = {name: asdict(bootstrap([*values.values()])) for name, values in own.items()}
                if run.name in of_many:
                    groups[group]["frechet"] = asdict(of_many[run.name].estimate())
            if run is not baseline:
                compared = {name: paired_difference(own.get(name, {}), others.get(name, {})) for name in COMPARED}
                if run.name in of_many and baseline.name in of_many:
                    compared["frechet"] = of_many[run.name].less(of_many[baseline.name])
                found = {name: asdict(estimate) for name, estimate in compared.items() if estimate is not None}
                if found:
                    differences[group] = found
        runs.append(_described(plan, run) | {"groups": groups, "by_frame": by_frame, "differences": differences})
    made = list(records.values())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": evaluation.model,
        "fingerprint": plan.fingerprint,
        "size": plan.size,
        "prompts": {group: sum(is_in(prompt, group) for prompt in evaluation.prompts) for group in present},
        "missing": len(evaluation.runs) * len(evaluation.prompts) - len(records),
        "unscored": sum(evaluation.of_shapes and "basics" not in record for record in made),
        "without_lpips": any(record["psnr"] is not None and record["lpips"] is None for record in made),
        "machines": _distinct(record["machine"] | {"dtype": record["dtype"]} for record in made),
        "versions": _distinct(record["versions"] for record in made),
        "baseline": baseline.name,
        "reference": plan.reference_run.name,
        "runs": runs,
    }


def tables(report: dict[str, Any], *, brief: bool = False) -> list[Table]:
    """A report's tables: the measures of each group of prompts, and the differences to the baseline.

    Args:
        report: By `make_report`.
        brief: Only what fits a terminal. Columns without any value are left out in any case.
    """
    found = []
    for group in report["prompts"]:
        present = [run for run in report["runs"] if group in run["groups"]]
        if present:
            found.append(_measures_table(present, group, brief))
        apart = [run for run in report["runs"] if group in run["differences"]]
        if apart and not brief:
            columns = [
                name for name in (*COMPARED, "frechet") if any(name in run["differences"][group] for run in apart)
            ]
            rows = [
                [run["name"], *(_cell(name, run["differences"][group].get(name), signed=True) for name in columns)]
                for run in apart
            ]
            title = f"{GROUPS[group].capitalize()}: differences to {report['baseline']}"
            found.append(Table(title, ["run", *(COLUMNS[name][0] for name in columns)], rows))
    return found


def notes(report: dict[str, Any]) -> list[str]:
    """What the tables' columns mean, a paragraph each."""
    lines = [
        "In brackets 95 % bootstrap intervals over videos. PSNR (dB), SSIM, LPIPS and motion to dense are against the "
        "dense run of the same steps and guidance. Motion: pixels a frame. Seconds: denoising."
    ]
    lines += selector_notes(run["blade_config"] for run in report["runs"])
    if any(run["differences"] for run in report["runs"]):
        lines.append(
            f"Differences: the mean over videos of a run's value less that of {report['baseline']} for the same "
            "prompt and seed; shares in percentage points."
        )
    if any("basics" in estimates for run in report["runs"] for estimates in run["groups"].values()):
        lines.append(
            "Colour to background: share of the objects or videos whose caption names it that show it. Basics: share "
            "of videos in which every object has its colour, shape and direction; all: everything that the caption "
            "says."
        )
    estimated = {name for run in report["runs"] for estimates in run["groups"].values() for name in estimates}
    if "diversity" in estimated:
        lines.append(
            "Diversity: root mean square of the pixels' differences between videos of the same prompt, frames shrunk "
            f"to {THUMBNAIL}x{THUMBNAIL}; over prompts."
        )
    if "frechet" in estimated:
        lines.append(
            f"Frechet: distance to the videos of {report['reference']}, of normal distributions fitted to features of "
            "videos: mean and standard deviation of each channel of their latents, made by the model's own VAE, in "
            "units of the reference's standard deviation over videos."
        )
    if report["unscored"]:
        lines.append(f"Not scored, as their prompts are no captions of moving shapes: {report['unscored']} videos.")
    if report["without_lpips"]:
        lines.append("LPIPS is missing where the package lpips was not installed; the extra lpips brings it.")
    return lines


def facts(report: dict[str, Any]) -> list[str]:
    """What was evaluated and on what, a line each."""
    size = report["size"]
    counts = ", ".join(f"{count} of {GROUPS[group]}" for group, count in report["prompts"].items())
    lines = [
        f"{report['date']}, model {report['model']}"
        + (f" ({report['fingerprint']})" if report["fingerprint"] else "")
        + f", {size['frames']} frames of {size['width']}x{size['height']}. Videos of each run: {counts}.",
        *(f"Machine: {_listed(machine)}." for machine in report["machines"]),
        *(f"Versions: {_listed(versions)}." for versions in report["versions"]),
    ]
    if report["missing"]:
        lines.append(f"{report['missing']} videos are still missing.")
    return lines


def _of_group(plan: EvaluationPlan, run: RunSettings, group: str, records: Records) -> dict[tuple[str, int], Record]:
    """The records of a run's videos of a group, by prompt and seed."""
    return {
        prompt.key: records[run.name, *prompt.key]
        for prompt in plan.evaluation.prompts
        if is_in(prompt, group) and (run.name, *prompt.key) in records
    }


def _measured(plan: EvaluationPlan, run: RunSettings, group: str, records: Records) -> dict[str, Measured]:
    """What a run's videos of a group have of each measure; those that none has are left out."""
    of_group = _of_group(plan, run, group, records)
    found = {}
    for name, measure in MEASURES.items():
        values = {key: value for key, record in of_group.items() if (value := measure(record)) is not None}
        if values:
            found[name] = values
    if different := _diversities(plan, run, of_group):
        found["diversity"] = different
    return found


def _diversities(plan: EvaluationPlan, run: RunSettings, made: Iterable[tuple[str, int]]) -> Measured:
    """How much the videos of each prompt differ that has several; known by the prompt and its first seed."""
    seeds = defaultdict(list)
    for prompt in plan.evaluation.prompts:
        if prompt.key in made:
            seeds[prompt.text].append(prompt)
    found: Measured = {}
    if sum(len(prompts) > 1 for prompts in seeds.values()) < LEAST_REPEATED:
        return found
    for text, prompts in seeds.items():
        paths = [video_path(plan.evaluation.folder, run.name, prompt) for prompt in prompts]
        if len(prompts) > 1 and all(path.is_file() for path in paths):
            videos = [torch.stack([thumbnail(frame[None] / 255)[0] for frame in mp4_frames(path)]) for path in paths]
            found[text, prompts[0].seed] = diversity(videos)
    return found


def _distances(plan: EvaluationPlan, group: str, records: Records) -> dict[str, Distance]:
    """The Frechet distance of every run with enough videos to those of the reference."""
    reference = plan.reference_run
    features = {
        run.name: {
            key: record["features"]
            for key, record in _of_group(plan, run, group, records).items()
            if record.get("features") is not None
        }
        for run in plan.evaluation.runs
    }
    found = {}
    for name, own in features.items():
        both = [key for key in own if key in features[reference.name]]
        # with fewer videos than features, the fitted distributions would be flat
        if name != reference.name and both and len(both) > len(own[both[0]]):
            first, second = (np.array([features[run][key] for key in both]) for run in (name, reference.name))
            found[name] = Distance(frechet_distance(first, second), resampled_distances(first, second), len(both))
    return found


def _by_frame(
    plan: EvaluationPlan, run: RunSettings, group: str, records: Records
) -> dict[str, dict[str, list[float]]]:
    """Means over a group's videos of each frame's likeness to dense; nothing for a run without a dense reference."""
    compared = [
        record for record in _of_group(plan, run, group, records).values() if record["psnr_by_frame"] is not None
    ]
    if not compared:
        return {}
    names = ("psnr", "ssim")
    return {
        group: {
            name: [fmean(of_frame) for of_frame in zip(*(one[f"{name}_by_frame"] for one in compared))]
            for name in names
        }
    }


def _described(plan: EvaluationPlan, run: RunSettings) -> dict[str, Any]:
    """A run's settings, and what its configuration comes to; of a table of patterns, the share of each kind."""
    config = plan.requests[run.name].blade_config
    values = run.to_dict() | {"blade_config": None if config is None else config.to_dict()}
    if run.attention is None:
        values["attention"] = "patterns" if config is not None and config.patterns is not None else "config"
    elif run.selector is not None:
        values["attention"] = f"{run.attention}, {run.selector}"
    if config is not None:
        values["sparsity"] = None if config.patterns is not None else config.sparsity
        if config.patterns is not None:
            values["blade_config"]["patterns"] = config.patterns.shares()
    return values


def _measures_table(present: list[dict[str, Any]], group: str, brief: bool) -> Table:
    names = [
        name
        for name in COLUMNS
        if any(name in run["groups"][group] for run in present) and (not brief or name in BRIEF)
    ]
    settings = [] if brief else ["steps", "guidance", "attention", "sparsity"]
    rows = [
        [
            run["name"],
            *("" if run[name] is None else f"{run[name]}" for name in settings),
            *(
                _cell(name, run["groups"][group].get(name), interval=name in WITH_INTERVAL and not brief)
                for name in names
            ),
        ]
        for run in present
    ]
    return Table(GROUPS[group].capitalize(), ["run", *settings, *(COLUMNS[name][0] for name in names)], rows)


def _cell(name: str, estimate: dict[str, float] | None, *, interval: bool = True, signed: bool = False) -> str:
    if estimate is None:
        return ""
    shown = COLUMNS[name][1]
    shown = shown.replace(":", ":+") if signed else shown
    text = shown.format(estimate["mean"])
    return f"{text} ({shown.format(estimate['low'])} to {shown.format(estimate['high'])})" if interval else text


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
