"""Plot of quality against density, or against steps if every run is dense."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Container
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blade.attention.selectors import SELECTORS
from blade.evaluation.prompts import GROUPS
from blade.metrics.measures import Panel
from blade.metrics.registry import measures

COLOURS = {
    "asa": "#0072B2",
    "asa-gt": "#D55E00",
    "asa-dropped": "#009E73",
    "dense": "#000000",
    "preset": "#56B4E9",
}
"""A colour for each kind of attention, mostly from Okabe and Ito's palette, which is safe for colour blindness;
selectors have their own."""

STANDING_ALONE = ("patterns", "config")
"""Kinds of attention that are loaded from files, whose runs therefore share no line."""

APART = 0.008
"""Horizontal distance, in density, between points of different lines, so that none hides another."""

MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_report(report: dict[str, Any]) -> bytes | None:
    """Draw a report and return it as a PNG; None if there is nothing to draw.

    There is one column per group of prompts. A line joins the runs of one kind of attention at the same steps and
    guidance, except that students, pattern tables and configurations stand alone. With sparse runs, the x axis is
    density and dense runs are horizontal lines; without, the x axis is steps.
    """
    groups = [name for name in report["prompts"] if any(name in run["groups"] for run in report["runs"])]
    estimated = {name for run in report["runs"] for group in run["groups"].values() for name in group}
    panels = _panels(estimated)
    if not panels:
        return None
    by_density = any(run["attention"] != "dense" for run in report["runs"])
    figure = Figure(figsize=(5.2 * len(groups) + 0.6, 3.8 * len(panels) + 0.6), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), len(groups), squeeze=False)
    for column, group in enumerate(groups):
        for row, (measure, panel) in enumerate(panels.items()):
            axes = grid[row][column]
            _draw(axes, report["runs"], group, measure, by_density)
            axes.set_title(GROUPS[group].capitalize() if row == 0 else "")
            axes.set_ylabel(panel.label if column == 0 else "")
            axes.set_xlabel("run density" if by_density else "steps")
            if by_density:
                axes.set_xlim(-0.05, 1.05)
            else:
                steps = sorted({run["steps"] for run in report["runs"]})
                axes.set_xscale("log")
                axes.set_xticks(steps, labels=[str(count) for count in steps])
                axes.minorticks_off()
            axes.grid(alpha=0.3)
            if panel.low is not None or panel.high is not None:
                axes.set_ylim(panel.low, panel.high)
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = max(1, min(len(groups), len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colour(attention: str) -> str | None:
    return COLOURS.get(attention) or (SELECTORS[attention].colour if attention in SELECTORS else None)


def _panels(estimated: Container[str]) -> dict[str, Panel]:
    """Return the panels of the measures that have values, by name, from top to bottom.

    If captions are scored, similarity to dense says less and is not drawn.
    """
    declared = [(measure, measure.panel) for measure in measures().values() if measure.panel is not None]
    incomplete = {panel.group for measure, panel in declared if panel.group and measure.name not in estimated}
    drawn = [
        (measure, panel) for measure, panel in declared if measure.name in estimated and panel.group not in incomplete
    ]
    if any("caption" in measure.needs for measure, _ in drawn):
        drawn = [(measure, panel) for measure, panel in drawn if "reference" not in measure.needs]
    panels = {
        measure.name: replace(panel, label=f"{panel.label} (lower is better)") if measure.better == "down" else panel
        for measure, panel in drawn
    }
    return dict(sorted(panels.items(), key=lambda item: item[1].place))


def _draw(axes: Axes, runs: list[dict[str, Any]], group: str, measure: str, by_density: bool) -> None:
    series = defaultdict(list)
    for run in runs:
        if measure in run["groups"].get(group, {}):
            settings = () if not by_density else (run["steps"],)
            kind = (
                run["name"]
                if run["student"] or run.get("lora") or run["attention"] in STANDING_ALONE
                else run["attention"]
            )
            series[(kind, run["guidance"], *settings)].append(run)
    for index, ((attention, guidance, *steps), members) in enumerate(series.items()):
        guided = f"guidance {guidance:g}" if guidance > 1 else "no guidance"
        label = f"{attention}, {f'{steps[0]} steps, ' if steps else ''}{guided}"
        estimates = [run["groups"][group] for run in members]
        colour = (_colour(attention) if by_density else None) or f"C{index}"
        if by_density and attention == "dense":
            estimate = estimates[0][measure]
            style = (":", "--", "-.")[index % 3]
            axes.axhline(estimate["mean"], color=colour, linestyle=style, linewidth=1.3, label=label)
            if estimate["low"] is not None:
                axes.axhspan(estimate["low"], estimate["high"], color=colour, alpha=0.06)
            continue
        offset = APART * (index - (len(series) - 1) / 2)
        positions = [
            values["run_density"]["mean"] + offset if by_density else run["steps"] * (1 + 2 * offset)
            for run, values in zip(members, estimates)
        ]
        points = sorted(zip(positions, (values[measure] for values in estimates)), key=lambda point: point[0])
        axes.errorbar(
            [x for x, _ in points],
            [value["mean"] for _, value in points],
            yerr=[*zip(*(interval_reach(value) for _, value in points))],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=label,
        )


def interval_reach(estimate: dict[str, Any]) -> tuple[float, float]:
    """Return how far an interval reaches below and above the mean; 0 where there is none."""
    mean, low, high = (estimate[name] for name in ("mean", "low", "high"))
    return (0.0, 0.0) if low is None else (mean - low, high - mean)
