"""Quality against density, or against steps where every run is dense."""

from __future__ import annotations

import io
from collections import defaultdict
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blade.attention.selectors import SELECTORS
from blade.evaluation.prompts import GROUPS

PANELS = {
    "realism_error": "realism error (lower is better)",
    "all_attributes": "share of videos with everything right",
}
"""What is drawn of moving shapes, from top to bottom."""

LIKENESS_PANELS = {"psnr": "PSNR to dense in dB", "ssim": "SSIM to dense"}
"""What is drawn of other videos."""

COLOURS = {
    "asa": "#0072B2",
    "asa-gt": "#D55E00",
    "asa-dropped": "#009E73",
    "dense": "#000000",
    "preset": "#56B4E9",
}
"""A colour for each kind of attention, most of them Okabe and Ito's, which the colour-blind can tell apart; selectors
have their own."""

STANDING_ALONE = ("patterns", "config")
"""Attention of runs that have nothing in common but that it comes from a file."""

APART = 0.008
"""How far, in density, points of different lines are set apart, so that none hides another."""

MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_report(report: dict[str, Any]) -> bytes | None:
    """Draw a report, and return it as a PNG; None where there is nothing to draw.

    One column a group of prompts; a line joins the runs of one kind of attention at the same steps and guidance, but
    for students, tables of patterns and configurations, which stand alone. With sparse runs, density runs along the x
    axis and dense runs are level lines; without, steps do.
    """
    groups = [name for name in report["prompts"] if any(name in run["groups"] for run in report["runs"])]
    estimated = {name for run in report["runs"] for group in run["groups"].values() for name in group}
    panels = PANELS if set(PANELS) <= estimated else LIKENESS_PANELS
    if not set(panels) <= estimated:
        return None
    by_density = any(run["attention"] != "dense" for run in report["runs"])
    figure = Figure(figsize=(5.2 * len(groups) + 0.6, 8.2), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), len(groups), squeeze=False)
    for column, group in enumerate(groups):
        for row, (measure, label) in enumerate(panels.items()):
            axes = grid[row][column]
            _draw(axes, report["runs"], group, measure, by_density)
            axes.set_title(GROUPS[group].capitalize() if row == 0 else "")
            axes.set_ylabel(label if column == 0 else "")
            axes.set_xlabel("run density" if by_density else "steps")
            if by_density:
                axes.set_xlim(-0.05, 1.05)
            else:
                steps = sorted({run["steps"] for run in report["runs"]})
                axes.set_xscale("log")
                axes.set_xticks(steps, labels=[str(count) for count in steps])
                axes.minorticks_off()
            axes.grid(alpha=0.3)
            if measure == "all_attributes":
                axes.set_ylim(-0.03, 1.03)
            elif measure == "realism_error":
                axes.set_ylim(bottom=0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    columns = max(1, min(len(groups), len(labels)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colour(attention: str) -> str | None:
    return COLOURS.get(attention) or (SELECTORS[attention].colour if attention in SELECTORS else None)


def _draw(axes: Axes, runs: list[dict[str, Any]], group: str, measure: str, by_density: bool) -> None:
    series = defaultdict(list)
    for run in runs:
        if measure in run["groups"].get(group, {}):
            settings = () if not by_density else (run["steps"],)
            kind = run["name"] if run["student"] or run["attention"] in STANDING_ALONE else run["attention"]
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
            axes.axhspan(estimate["low"], estimate["high"], color=colour, alpha=0.06)
            continue
        aside = APART * (index - (len(series) - 1) / 2)
        places = [
            values["run_density"]["mean"] + aside if by_density else run["steps"] * (1 + 2 * aside)
            for run, values in zip(members, estimates)
        ]
        points = sorted(zip(places, (values[measure] for values in estimates)), key=lambda point: point[0])
        axes.errorbar(
            [x for x, _ in points],
            [value["mean"] for _, value in points],
            yerr=[
                [value["mean"] - value["low"] for _, value in points],
                [value["high"] - value["mean"] for _, value in points],
            ],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.5,
            capsize=3,
            label=label,
        )
