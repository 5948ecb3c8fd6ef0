"""The report of a card: tables, plot, and what got slower since its last one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from blade.benchmarks import attention_report, generation_report
from blade.benchmarks.card.plots import PLOTS, draw_plots
from blade.benchmarks.card.results import Report, merged_attention, quality_table, results_of
from blade.common.files import write_files
from blade.common.names import file_name
from blade.common.reading import read_json
from blade.common.tables import Table, markdown_block, markdown_table, markdown_text
from blade.common.terminal import logger

NOTABLE = 1.05
"""Factor from which on a time counts as another one."""


def tables(report: Report) -> list[Table]:
    """Return a report's tables: what was done, then one or more for each part that has results."""
    sections = [Table("Steps", ["part", "step", "state", "seconds", ""], [*map(_step_row, report["steps"])])]
    for blocks in attention_report.BLOCKS:
        if (merged := merged_attention(report, blocks)) is not None:
            kind = "" if blocks == "random" else f", {blocks}"
            sections += [
                Table(f"Attention{kind}: {table.title}", table.headings, table.rows)
                for table in attention_report.tables(merged)
            ]
    for result in results_of(report, "generation"):
        sections += [
            Table(f"Videos: {table.title}", table.headings, table.rows) for table in generation_report.tables(result)
        ]
    if (table := quality_table(report)) is not None:
        sections.append(table)
    for result in results_of(report, "distillation"):
        row = [result["recipe"], f"{result['seconds_update']:.2f}", f"{result['peak_gib']:.1f}"]
        sections.append(
            Table("An update of a distillation", ["recipe, a prompt an update", "seconds", "peak GiB"], [row])
        )
    for result in results_of(report, "tuning"):
        shipped = {trial["kernel"]: trial for trial in result["trials"] if trial["shipped"]}
        rows = [[name, *_launch(shipped.get(name)), *_launch(trial)] for name, trial in result["best"].items()]
        headings = ["kernel", "shipped", "ms", "fastest", "ms"]
        sections.append(Table("Launch configurations", headings, rows))
    if compared := report.get("compared"):
        sections.append(Table(f"Against {compared['with']}", ["", "ms before", "ms now", "times"], _changes(compared)))
    return sections


def _step_row(step: Report) -> list[str]:
    seconds = f"{step['seconds']:.1f}" if "seconds" in step else ""
    errors = {**step.get("result", {}).get("errors", {}), **step.get("result", {}).get("differences", {})}
    worst = f"largest error {max(errors.values()):.2g}" if errors else ""
    return [step["part"], step["name"], step["state"], seconds, step.get("reason", worst)]


def _changes(compared: Report) -> list[list[str]]:
    rows = sorted(compared["times"].items(), key=lambda item: item[1][0] / item[1][1])
    return [[name, f"{before:.3g}", f"{now:.3g}", f"{before / now:.2f}"] for name, (before, now) in rows]


def _launch(trial: Report | None) -> list[str]:
    """Return a launch configuration in words, and its milliseconds."""
    if trial is None:
        return ["", "not timed"]
    config = trial["config"]
    words = f"{config['block_m']}x{config['block_n']}, {config['num_warps']} warps, {config['num_stages']} stages"
    return [words, "failed" if trial["ms"] is None else f"{trial['ms']:.3f}"]


def times(report: Report) -> dict[str, float]:
    """Return the milliseconds that a report has, by what took them."""
    by_name: dict[str, float] = {}
    for blocks in attention_report.BLOCKS:
        for case in (merged_attention(report, blocks) or {"cases": []})["cases"]:
            size = f"{case['model'] or 'layer'}, {case['tokens']} tokens, density {case['density']}, {blocks}"
            for candidate, passes in case["ms"].items():
                by_name |= {f"{size}: {candidate}, {name}": ms for name, ms in passes.items()}
    for result in results_of(report, "generation"):
        model = f"{result['settings']['model']}, {result['tokens']} tokens"
        by_name |= {f"{model}: {name} pass": ms for name, ms in result["pass_ms"].items()}
        presets = result.get("preset_pass_ms", {})
        by_name |= {f"{model}: pass with the preset, sparsity {sparsity}": ms for sparsity, ms in presets.items()}
        by_name[f"{model}: decoding"] = 1e3 * result["decoding_seconds"]
        if (seconds := result.get("encoding_seconds")) is not None:
            by_name[f"{model}: encoding of a text"] = 1e3 * seconds
    for result in results_of(report, "distillation"):
        by_name[f"{result['recipe']}: update"] = 1e3 * result["seconds_update"]
    for result in results_of(report, "tuning"):
        shipped = (trial for trial in result["trials"] if trial["shipped"] and trial["ms"] is not None)
        by_name |= {f"{trial['kernel']} kernel as shipped": trial["ms"] for trial in shipped}
    return by_name


def compare(report: Report, before: Report, name: str) -> Report:
    """Return a report with a comparison with an earlier one of the same card.

    Args:
        report: the report.
        before: the earlier one.
        name: what to call it.

    Returns:
        With `compared`: `with`, the name; `times`, milliseconds before and now by what took them; and `slower`, what
        takes at least `NOTABLE` times as long.
    """
    old, new = times(before), times(report)
    both = {what: (old[what], new[what]) for what in new if what in old}
    slower = [what for what, (ms, now) in both.items() if now >= NOTABLE * ms]
    return {**report, "compared": {"with": name, "times": both, "slower": slower}}


def find_previous(folder: Path, card: str) -> tuple[str, Report] | None:
    """Return name and content of a card's last report in a folder; None if there is none."""
    for path in sorted(folder.glob(f"{file_name(card)}-*.json"), reverse=True):
        try:
            values = read_json(path, f"the report {path}")
            if values["machine"]["device"] == card and isinstance(times(values), dict):
                return path.name, values
        except (ValueError, KeyError, TypeError) as error:
            logger.warning(f"{path} is left out of the comparison: it is no report of a card ({error}).")
    return None


def markdown(report: Report, images: Mapping[str, str] | None = None, note: str | None = None) -> str:
    """Render a report as a Markdown page.

    Args:
        report: the report.
        images: files of the plots, by name in `PLOTS`.
        note: a sentence on plots that are missing.
    """
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version is not None)
    device, minutes = markdown_text(str(report["machine"]["device"])), report["minutes"]
    lines = [f"# {device}", "", f"{report['date']}, {versions}. Measured for {minutes:g} minutes, best first.", ""]
    lines += [markdown_block(report["command"]), ""]
    lines.append(
        "Errors of attention, norms and RoPE are multiples of what the plain computation in the same precision errs; "
        "those of other checks are relative to the expected values. All that compute sparse attention take the same "
        "mask. In brackets of attention: how many times as fast as the fastest dense attention, and its speed per "
        "pair of query and key as a share of dense attention's. Whole videos have random weights, and their time is "
        "extrapolated from the passes in brackets: six are three steps with guidance. Speed against quality: as many "
        "steps are dense as where quality was measured, which was with the bundled model and not with these."
    )
    if slower := (report.get("compared") or {}).get("slower"):
        lines += ["", f"Slower than in {report['compared']['with']}: {'; '.join(map(markdown_text, slower))}."]
    if unfinished := [step["name"] for step in report["steps"] if step["state"] != "done"]:
        lines += ["", f"Without a whole result, see Steps: {'; '.join(map(markdown_text, unfinished))}."]
    for name, image in (images or {}).items():
        lines += ["", f"![{PLOTS[name]}]({image})"]
    if note is not None:
        lines += ["", note]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *markdown_table(table.headings, table.rows)]
    return "\n".join([*lines, ""])


def report_files(folder: Path, card: str, stamp: str) -> dict[str, Path]:
    """Return the paths of a report: `json`, `md`, and those of plots by their names in `PLOTS`.

    Args:
        folder: where.
        card: the card's name.
        stamp: date and time.
    """
    stem = f"{file_name(card)}-{stamp}"
    plots = {name: folder / f"{stem}-{name}.png" for name in PLOTS}
    return {"json": folder / f"{stem}.json", "md": folder / f"{stem}.md", **plots}


def write_report(report: Report, paths: Mapping[str, Path]) -> list[Path]:
    """Write a report, all of it or none: JSON, Markdown and, with matplotlib, the plots of what was timed.

    Args:
        report: the report.
        paths: of `report_files`.

    Returns:
        The files' paths.

    Raises:
        OutputError: if a file cannot be written.
    """
    drawn, note = draw_plots(report)
    page = markdown(report, {name: paths[name].name for name in drawn}, note)
    contents = {paths["json"]: (json.dumps(report, indent=2) + "\n").encode(), paths["md"]: page.encode()}
    contents |= {paths[name]: image for name, image in drawn.items()}
    write_files(contents)
    return list(contents)
