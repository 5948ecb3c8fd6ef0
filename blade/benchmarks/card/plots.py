"""Plots of a card's report: speed against density, operations per second, and speed against quality."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from blade.benchmarks import attention_report
from blade.benchmarks.attention_report import COLOURS, MARKERS
from blade.benchmarks.card.quality import psnr_at, quality_by_density
from blade.benchmarks.card.results import attention_speedups, merged_attention, video_speedups

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = dict[str, Any]

PLOTS = {
    "speed": "Speed of attention against density",
    "tflops": "Operations per second of attention, per kept pair of query and key",
    "quality": "Speed against quality",
}
"""Titles of plots, by the ending of their files' names."""

DIRECTIONS = ("forward", "backward")
"""Passes whose operations are counted."""

DASHES = ("--", "-.", ":", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)), (0, (2, 1)))
"""Line styles of dense attention, whose lines have no points."""

GREYS = ("#000000", "#7F7F7F")
"""Colours of dense attention."""

BY_LAYER = "one attention layer: choice of blocks by sampled\ntokens, mask and forward pass, without pooled tokens"
BY_VIDEO = "whole videos with guidance and the preset, random weights:\n{share:.0f} % of the steps and layer 0 dense"


def draw_plots(report: Report) -> tuple[dict[str, bytes], str | None]:
    """Draw a report.

    Returns:
        PNGs by name, of `PLOTS`, and a sentence that says which are missing, and why.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return {}, "No plots: matplotlib is not installed (pip install 'blade-video[plots]')."
    draw: dict[str, Callable[[Report], bytes | None]] = {
        "speed": _draw_speed,
        "tflops": _draw_tflops,
        "quality": _draw_quality,
    }
    drawn = {name: image for name, function in draw.items() if (image := function(report)) is not None}
    missing = [PLOTS[name].lower() for name in PLOTS if name not in drawn]
    return drawn, f"Not plotted, as nothing was timed: {'; '.join(missing)}." if missing else None


def _draw_speed(report: Report) -> bytes | None:
    merged = merged_attention(report, "random")
    return None if merged is None else attention_report.plot(merged)


def _draw_tflops(report: Report) -> bytes | None:
    """Draw a row of panels for each direction and a column for each size."""
    merged = merged_attention(report, "random")
    if merged is None:
        return None
    from matplotlib.figure import Figure

    cases = merged["cases"]
    sizes = list(dict.fromkeys(map(attention_report.size_of, cases)))
    sparse, dense = (
        attention_report.sparse_names(cases),
        dict.fromkeys(name for case in cases for name in attention_report.dense_names(case)),
    )
    rows = [name for name in DIRECTIONS if any(_speed(case, other, name) for case in cases for other in sparse)]
    speeds = [_speed(case, name, row) for case in cases for name in (*sparse, *dense) for row in rows]
    unit, scale = ("TFLOP/s", 1.0) if max((x for x in speeds if x), default=1.0) >= 1 else ("GFLOP/s", 1e3)
    peak, densities = merged.get("matrix_peak_tflops"), sorted({case["density"] for case in cases})
    figure = Figure(figsize=(max(6.4, 3.4 * len(sizes) + 1.2), 3.2 * len(rows) + 1.5), dpi=110, layout="constrained")
    panels = figure.subplots(len(rows), len(sizes), squeeze=False, sharex=True, sharey="row")
    for row, direction in zip(panels, rows):
        row[0].set_ylabel(f"{direction}, {unit}")
        for axes, size in zip(row, sizes):
            of_size = [case for case in cases if attention_report.size_of(case) == size]
            for index, name in enumerate(sparse):
                _sparse_line(axes, of_size, name, direction, scale, index)
            for index, name in enumerate(dense):
                _dense_line(axes, of_size[-1], name, direction, scale, index)
            if peak is not None:
                axes.axhline(peak * scale, color=GREYS[1], linewidth=1.0, label="matrix product, measured")
            axes.set_ylim(bottom=0)
            axes.set_xlim(0, 1.08 * max(densities))
            axes.set_xticks(densities, labels=[f"{density:g}" for density in densities])
            axes.grid(alpha=0.3)
    for axes, size in zip(panels[0], sizes):
        axes.set_title(
            f"{size.model or 'a layer'}: {size.tokens:,} tokens,\n{size.heads} heads of {size.head_dim}", fontsize=10
        )
    for axes in panels[-1]:
        axes.set_xlabel("density, share of kept pairs")
    settings = merged["settings"]
    title = f"{merged['machine']['device']}: {settings['dtype']}, blocks of {settings['block_size']}"
    _finish(
        figure, panels.flat, f"{title}\noperations of kept pairs a second; lines without points are dense attention"
    )
    return _png(figure)


def _speed(case: Report, name: str, direction: str) -> float | None:
    return attention_report.tflops(case, name, direction)


def _dense_line(axes: Axes, case: Report, name: str, direction: str, scale: float, index: int) -> None:
    if speed := _speed(case, name, direction):
        style, colour = DASHES[index % len(DASHES)], GREYS[index // len(DASHES) % len(GREYS)]
        axes.axhline(speed * scale, color=colour, linestyle=style, linewidth=1.2, label=f"{name}, dense")


def _sparse_line(axes: Axes, cases: list[Report], name: str, direction: str, scale: float, index: int) -> None:
    points = [(case["realised_density"], speed) for case in cases if (speed := _speed(case, name, direction))]
    if points:
        axes.plot(
            [x for x, _ in points],
            [scale * y for _, y in points],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            label=name,
        )


def _draw_quality(report: Report) -> bytes | None:
    """Draw PSNR to dense against speed: of attention at each size, and of whole videos."""
    quality = quality_by_density()
    groups = {
        BY_LAYER: attention_speedups(report),
        BY_VIDEO.format(share=100 * quality["dense_steps"]): video_speedups(report),
    }
    known = {
        title: {name: points for name, speedups in lines.items() if (points := _with_quality(speedups))}
        for title, lines in groups.items()
    }
    known = {title: lines for title, lines in known.items() if lines}
    if not known:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4 * len(known) + 0.6, 4.9), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(known), squeeze=False, sharey=True)[0]
    for axes, (title, lines) in zip(panels, known.items()):
        for index, (name, points) in enumerate(lines.items()):
            mean = [psnr["mean"] for _, _, psnr in points]
            reach = [
                [psnr["mean"] - psnr["low"] for *_, psnr in points],
                [psnr["high"] - psnr["mean"] for *_, psnr in points],
            ]
            style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            axes.errorbar([x for _, x, _ in points], mean, yerr=reach, capsize=3, markersize=5, label=name, **style)
        levels = {psnr["mean"]: density for points in lines.values() for density, _, psnr in points}
        for level in levels:
            axes.axhline(level, color=GREYS[1], linewidth=0.6, alpha=0.4, zorder=0)
        right = axes.secondary_yaxis("right")
        right.set_yticks([*levels], labels=[f"{density:g}" for density in levels.values()])
        right.set_ylabel("density, share of kept pairs")
        axes.axvline(1.0, color="#000000", linewidth=0.8)
        axes.set_xlabel("times as fast as dense, on this card")
        axes.set_title(title, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    panels[0].set_ylabel("PSNR to dense, dB: of the bundled model")
    size = quality["size"]
    figure.suptitle(
        f"Speed: {report['machine']['device']}. Quality: measured elsewhere and with another model, the bundled one\n"
        f"({size['width']}x{size['height']}, {size['frames']} frames, {quality['steps']} steps; mean of "
        f"{quality['videos']} videos and its 95 % interval)",
        fontsize=9,
    )
    return _png(figure)


def _with_quality(speedups: dict[float, float]) -> list[tuple[float, float, dict[str, float]]]:
    """Return density, speed-up and PSNR where the quality is known, by rising density."""
    return [(density, speedups[density], psnr) for density in sorted(speedups) if (psnr := psnr_at(density))]


def _finish(figure: Figure, panels: Any, title: str) -> None:
    """Add one legend for all panels, below them, and a title."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.7)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=9)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
