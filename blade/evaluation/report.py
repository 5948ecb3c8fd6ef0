"""An evaluation's report, made from its records: JSON values and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import fmean
from typing import Any, get_args

from blade.common.tables import Table
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import GROUPS, groups_of, is_in
from blade.evaluation.protocol_rows import PROTOCOL_NOTE, protocol_result, protocol_table
from blade.evaluation.records import Record, Records, read_records
from blade.evaluation.runs import RunSettings, selector_notes
from blade.evaluation.videos import video_path
from blade.metrics.estimates import LEAST_VIDEOS, Result
from blade.metrics.measures import Measure, Scope, VideoSet
from blade.metrics.registry import measures


def make_report(plan: EvaluationPlan, command: str) -> dict[str, Any]:
    """Summarize the records of an evaluation as plain JSON values.

    Args:
        plan: The plan of the evaluation.
        command: The command line that ran it.

    Returns:
        `missing` (videos without a record), the settings, machines and versions, and for every run and group of
        prompts: in `groups`, an `Estimate` of each measure that has a value; in `by_frame`, the means over videos of
        each frame's values, such as PSNR; and in `differences`, an `Estimate` of the difference to the `baseline` by
        each compared measure, over the videos that both have. Distances between distributions are to the videos of
        `reference`. `protocol` has the rows of the common table, see `protocol_result`; None without a protocol.
    """
    evaluation, records = plan.evaluation, read_records(plan)
    chosen, baseline, present = evaluation.chosen_measures, evaluation.baseline_run, groups_of(evaluation.prompts)
    videos = {(run.name, group): _videos(plan, run, group, records) for run in evaluation.runs for group in present}
    results = {key: _results(chosen, video_set) for key, video_set in videos.items()}
    runs = []
    for run in evaluation.runs:
        groups, differences, by_frame = {}, {}, {}
        for group in present:
            run_results = results[run.name, group]
            if run_results:
                groups[group] = {name: asdict(result.estimate()) for name, result in run_results.items()}
            baseline_results = results[baseline.name, group]
            if run is not baseline and (difference := _differences(chosen, run_results, baseline_results)):
                differences[group] = difference
            if frames := _by_frame(chosen, videos[run.name, group]):
                by_frame[group] = frames
        runs.append(_described(plan, run) | {"groups": groups, "by_frame": by_frame, "differences": differences})
    measured = list(records.values())
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "model": evaluation.model,
        "fingerprint": plan.fingerprint,
        "size": plan.size,
        "prompts": {group: sum(is_in(prompt, group) for prompt in evaluation.prompts) for group in present},
        "missing": len(evaluation.runs) * len(evaluation.prompts) - len(records),
        "unscored": _unscored(chosen, measured) if evaluation.of_shapes else 0,
        **{f"without_{measure.extra}": _lacks_extra(measure, chosen, measured) for measure in chosen if measure.extra},
        "machines": _distinct(record["machine"] | {"dtype": record["dtype"]} for record in measured),
        "versions": _distinct(record["versions"] for record in measured),
        "baseline": baseline.name,
        "reference": plan.reference_run.name,
        "runs": runs,
        "protocol": protocol_result(plan, runs, records),
    }


def tables(report: dict[str, Any], *, brief: bool = False) -> list[Table]:
    """Return a report's tables: the measures of each group of prompts, the differences to the baseline, and the rows
    of a protocol.

    Args:
        report: The result of `make_report`.
        brief: Leave out whatever does not fit a terminal. Columns without any value are always left out.
    """
    tables_of_groups = []
    for group in report["prompts"]:
        present = [run for run in report["runs"] if group in run["groups"]]
        if present:
            tables_of_groups.append(_measures_table(present, group, brief))
        compared = [run for run in report["runs"] if group in run["differences"]]
        if compared and not brief:
            tables_of_groups.append(_differences_table(compared, group, report["baseline"]))
    if has_protocol_rows(report) and not brief:
        tables_of_groups.append(protocol_table(report["protocol"]))
    return tables_of_groups


def notes(report: dict[str, Any]) -> list[str]:
    """Return explanations of the tables' columns, one paragraph each."""
    declared = measures().values()
    lines = [_general_note(), *selector_notes(run["blade_config"] for run in report["runs"])]
    if any(run["differences"] for run in report["runs"]):
        lines.append(
            f"Differences: the mean over videos of a run's value less that of {report['baseline']} for the same "
            "prompt and seed; shares in percentage points."
        )
    estimated = {name for run in report["runs"] for estimates in run["groups"].values() for name in estimates}
    lines += [
        measure.note.replace("{reference}", report.get("reference", ""))
        for measure in declared
        if measure.note and measure.name in estimated
    ]
    if has_protocol_rows(report):
        lines.append(PROTOCOL_NOTE)
    if report["unscored"]:
        lines.append(f"Not scored, as their prompts are no captions of moving shapes: {report['unscored']} videos.")
    lines += [
        f"{measure.heading} is missing where the package {measure.extra} was not installed; the extra "
        f"{measure.extra} brings it."
        for measure in declared
        if measure.extra is not None and report.get(f"without_{measure.extra}")
    ]
    return lines


def facts(report: dict[str, Any]) -> list[str]:
    """Return the model, videos, machines and versions, one line each."""
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
    lines += [f"Run {name} failed: {reason}" for name, reason in report.get("failed", {}).items()]
    if found := report.get("sparsity_search"):
        best = found["best"]
        lines.append(
            f"Sparsity search: {best['sparsity']:g} is the highest sparsity, in steps of 0.05, at which PSNR to dense "
            f"is at least {found['target']:g} dB in the mean ({best['psnr']:.2f} dB, worst tenth "
            f"{best['worst_tenth']:.2f} dB). {found['command']}"
        )
    return lines


def has_protocol_rows(report: dict[str, Any]) -> bool:
    """Return whether a report has rows of a protocol; those of earlier versions have none."""
    return bool((report.get("protocol") or {}).get("rows"))


def _general_note() -> str:
    """Return the explanation of intervals, of the dense reference, and of details that headings omit."""
    similarities, others = [], []
    for measure in measures().values():
        if "reference" in measure.needs:
            similarities.append(f"{measure.heading} ({measure.detail})" if measure.detail else measure.heading)
        elif measure.detail:
            others.append(f"{measure.heading[:1].upper()}{measure.heading[1:]}: {measure.detail}.")
    *first, last = similarities
    return (
        f"In brackets 95 % intervals over videos, from {LEAST_VIDEOS} videos on: Wilson's of shares of videos and "
        f"Newcombe's of their differences, else by bootstrap. {', '.join(first)} and {last} "
        f"are against the dense run of the same steps and guidance. {' '.join(others)}"
    )


def _videos(plan: EvaluationPlan, run: RunSettings, group: str, records: Records) -> VideoSet:
    """Return the measured videos of a run in a group, in the order of the prompts."""
    prompts = [prompt for prompt in plan.evaluation.prompts if is_in(prompt, group)]

    def videos_of(name: str, reference: VideoSet | None) -> VideoSet:
        return VideoSet(
            records={prompt.key: records[name, *prompt.key] for prompt in prompts if (name, *prompt.key) in records},
            paths={prompt.key: video_path(plan.evaluation.folder, name, prompt) for prompt in prompts},
            reference=reference,
        )

    reference = plan.reference_run.name
    return videos_of(run.name, None if run.name == reference else videos_of(reference, None))


def _results(chosen: Sequence[Measure], videos: VideoSet) -> dict[str, Result]:
    """Return the result of each measure by name, first measures of single videos, then of several together."""
    ordered = sorted(chosen, key=lambda measure: get_args(Scope).index(measure.per))
    results = {measure.name: measure.result(videos) for measure in ordered}
    return {name: result for name, result in results.items() if result is not None}


def _differences(
    chosen: Sequence[Measure], results: Mapping[str, Result], baseline: Mapping[str, Result]
) -> dict[str, dict[str, float]]:
    """Return a run's differences to the baseline by each compared measure that both have, measures of sets last."""
    ordered = sorted(chosen, key=lambda measure: measure.per == "set")
    names = [measure.name for measure in ordered if measure.compared]
    differences = {name: results[name].less(baseline[name]) for name in names if name in results and name in baseline}
    return {name: asdict(estimate) for name, estimate in differences.items() if estimate is not None}


def _by_frame(chosen: Sequence[Measure], videos: VideoSet) -> dict[str, list[float]]:
    """Return the means over videos of each frame's values, by name of the measures that have them."""
    means = {}
    for measure in chosen:
        recorded = videos.recorded(f"{measure.name}_by_frame")
        if recorded:
            means[measure.name] = [fmean(frame_values) for frame_values in zip(*recorded.values())]
    return means


def _unscored(chosen: Sequence[Measure], records: Sequence[Record]) -> int:
    """Count the videos without any measure that needs a caption; 0 if no such measure is chosen."""
    keys = {measure.record_key for measure in chosen if "caption" in measure.needs}
    return sum(not keys & record.keys() for record in records) if keys else 0


def _lacks_extra(measure: Measure, chosen: Sequence[Measure], records: Sequence[Record]) -> bool:
    """Return whether some videos lack a measure but have others with the same needs."""
    others = [other for other in chosen if other.needs == measure.needs and other is not measure]
    return any(
        record.get(measure.record_key) is None and any(record.get(other.record_key) is not None for other in others)
        for record in records
    )


def _described(plan: EvaluationPlan, run: RunSettings) -> dict[str, Any]:
    """Return a run's settings and configuration; for a pattern table, the share of each kind of pattern."""
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
    """Make the table of the measures of runs that have videos in a group."""
    shown = [
        measure
        for measure in measures().values()
        if any(measure.name in run["groups"][group] for run in present) and (measure.brief or not brief)
    ]
    settings = [] if brief else ["steps", "guidance", "attention", "sparsity"]
    rows = [
        [
            run["name"],
            *("" if run[name] is None else f"{run[name]}" for name in settings),
            *(
                _cell(measure, run["groups"][group].get(measure.name), interval=measure.interval and not brief)
                for measure in shown
            ),
        ]
        for run in present
    ]
    return Table(GROUPS[group].capitalize(), ["run", *settings, *(measure.heading for measure in shown)], rows)


def _differences_table(compared: list[dict[str, Any]], group: str, baseline: str) -> Table:
    """Make the table of the differences of runs to the baseline."""
    ordered = sorted(measures().values(), key=lambda measure: measure.per == "set")
    shown = [measure for measure in ordered if any(measure.name in run["differences"][group] for run in compared)]
    rows = [
        [
            run["name"],
            *(_cell(measure, run["differences"][group].get(measure.name), signed=True) for measure in shown),
        ]
        for run in compared
    ]
    title = f"{GROUPS[group].capitalize()}: differences to {baseline}"
    return Table(title, ["run", *(measure.heading for measure in shown)], rows)


def _cell(
    measure: Measure, estimate: dict[str, float | None] | None, *, interval: bool = True, signed: bool = False
) -> str:
    if estimate is None:
        return ""
    shown = [
        measure.shown(value, signed=signed)
        for name in ("mean", "low", "high")
        if (value := estimate[name]) is not None
    ]
    mean, *ends = shown
    return f"{mean} ({' to '.join(ends)})" if interval and ends else mean


def _distinct(values: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(value, sort_keys=True): value for value in values}.values())


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
