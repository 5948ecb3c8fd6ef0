"""The attention benchmark's report: tables, and a plot of speed against density."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from blade_kernels.cubin import CubinReport
from blade_kernels.cubin import table as cubin_table

from blade.benchmarks.attention import PASSES
from blade.benchmarks.layers import AttentionShape
from blade.common.files import write_files
from blade.common.tables import Table, markdown_block, markdown_table

FILES = ("attention.json", "attention.md", "attention.png")
"""The report's files."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""A colour for each size, from Okabe and Ito's palette, which is safe for colour blindness."""

MARKERS = ("o", "s", "^", "D", "v", "P")
"""A marker for each colour."""

WORK = {"training": 3.5, "backward": 2.5}
"""Operations of a pass relative to a forward pass, for passes in which they differ."""

SHOWN = {"training": "forward and backward", "whole": "choice, mask and forward", "drawn": "drawn mask and forward"}
"""Passes in words."""

BLOCKS = {
    "random": "drawn at random in every head and row",
    "patterns": "by head patterns (diagonal, multi-diagonal, vertical and window in turn)",
}
"""Choices of blocks, in words."""


def tables(report: dict[str, Any]) -> list[Table]:
    """Return a report's tables: one for each pass, and those of memory and compiled kernels if there are any."""
    passes = report["settings"]["passes"]
    sections = [_dense_table(report)]
    sections += [_pass_table(report, name, PASSES[name]) for name in PASSES if name in passes]
    if {"forward", "training"} <= set(passes):
        sections.append(_pass_table(report, "backward", "the backward pass: both passes less the forward pass"))
    if any(case["peak_mib"] for case in report["cases"]):
        sections.append(_memory_table(report))
    if reasons := _reasons(report):
        sections.append(Table("Not measured", ["computed by", "why"], [[*item] for item in reasons.items()]))
    if report.get("cubins"):
        compiled = [CubinReport(**values) for values in report["cubins"]]
        sections.append(Table("Compiled Triton kernels", *cubin_table(compiled)))
    return sections


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `attention.json`, `attention.md` and `attention.png`; all or none.

    Returns:
        The files' paths.

    Raises:
        ImportError: matplotlib is not installed.
        OutputError: a file cannot be written.
    """
    machine, settings = report["machine"], report["settings"]
    threads = "" if str(settings["device"]).startswith("cuda") else f", {machine['threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version is not None)
    peak = report.get("matrix_peak_tflops")
    lines = [
        "# Attention, dense and block-sparse",
        "",
        f"{report['date']}, {machine['device']}{threads}, {versions}. {settings['dtype']}, blocks of "
        f"{settings['block_size']} {BLOCKS[settings['blocks']]}; median of {settings['repeats']}. In "
        "brackets: how many times as fast as the fastest dense attention, and its speed per pair of query and key, as "
        "a share of dense attention's." + (f" Matrix products reach {peak} TFLOP/s." if peak else ""),
        "",
        markdown_block(report["command"]),
    ]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *markdown_table(table.headings, table.rows)]
    contents = (
        (json.dumps(report, indent=2) + "\n").encode(),
        ("\n".join(lines) + "\n").encode(),
        plot(report),
    )
    files = {folder / name: content for name, content in zip(FILES, contents, strict=True)}
    write_files(files)
    return list(files)


def plot(report: dict[str, Any]) -> bytes:
    """Plot speed against density as a PNG, with a row of panels for each pass and a column for each candidate."""
    from matplotlib.figure import Figure

    cases = report["cases"]
    passes = [name for name in PASSES if name in report["settings"]["passes"] and name != "selection"]
    names, speeds = sparse_names(cases), (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
    densities = sorted({case["density"] for case in cases})
    figure = Figure(figsize=(3.6 * len(names) + 1.2, 3.0 * len(passes) + 1.2), dpi=110, layout="constrained")
    panels = figure.subplots(len(passes), len(names), squeeze=False, sharex=True, sharey="row")
    for pass_name, row in zip(passes, panels):
        row[0].set_ylabel(f"{SHOWN.get(pass_name, pass_name)}:\ntimes as fast as dense")
        shown = [1.0, *(1 / density for density in densities)]
        for name, axes in zip(names, row):
            for index, size in enumerate(dict.fromkeys(size_of(case) for case in cases)):
                measured = [case for case in cases if size_of(case) == size and pass_name in case["ms"].get(name, {})]
                measured.sort(key=lambda case: case["realised_density"])
                x = [case["realised_density"] for case in measured]
                y = [dense_ms(case, pass_name) / case["ms"][name][pass_name] for case in measured]
                style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
                axes.plot(x, y, markersize=5, label=str(size), **style)
                shown += y
            if not any(pass_name in case["ms"].get(name, {}) for case in cases):
                axes.text(0.5, 0.5, "not timed", transform=axes.transAxes, ha="center", color="#7F7F7F")
            if len(densities) > 1:
                axes.plot(densities, [1 / x for x in densities], "--", color="#7F7F7F", label="1 / density")
            axes.axhline(1.0, color="#000000", linewidth=0.8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(densities, labels=[f"{density:g}" for density in densities])
            axes.set_yticks(speeds, labels=[f"{speed:g}" for speed in speeds])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[0].set_ylim(min(shown) / 1.25, 1.25 * max(shown))
    for name, axes in zip(names, panels[0]):
        axes.set_title(name)
    for axes in panels[-1]:
        axes.set_xlabel("density, share of kept pairs")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8)
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(f"{machine['device']}: {settings['dtype']}, blocks of {settings['block_size']}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _dense_table(report: dict[str, Any]) -> Table:
    """Make the table of dense candidates' times, which do not depend on the density."""
    rows, passes = [], ("forward", "training", "backward")
    for size, case in {size_of(case): case for case in report["cases"]}.items():
        for name in dense_names(case):
            rows.append([str(size), name, *(_cell(case, name, pass_name) for pass_name in passes)])
    used = [0, 1, *(column for column in (2, 3, 4) if any(row[column] for row in rows))]
    headings = ["size", "computed by", *(f"{pass_name} ms" for pass_name in passes)]
    return Table("Dense attention", [headings[i] for i in used], [[row[i] for i in used] for row in rows])


def _pass_table(report: dict[str, Any], pass_name: str, title: str) -> Table:
    cases = report["cases"]
    if pass_name == "selection":
        headings, names = ["selection ms"], []
    else:
        names = [name for name in sparse_names(cases) if any(_cell(case, name, pass_name) for case in cases)]
        headings = [f"{name} ms" for name in names]
    rows = []
    for case in cases:
        fastest = _fastest(case, pass_name)
        row = [*_row_labels(case), f"{_cell(case, fastest, pass_name)} ({fastest})"]
        row += [_cell(case, name, pass_name) for name in names]
        if pass_name == "selection":
            ms = case["ms"]["selection"]["selection"]
            row.append(f"{ms:.2f} ({100 * ms / dense_ms(case, pass_name):.1f} % of dense)")
        rows.append(row)
    return Table(title[0].upper() + title[1:], ["size", "density", "dense ms", *headings], rows)


def _memory_table(report: dict[str, Any]) -> Table:
    """Make the table of sparse candidates' peak memory, also as a multiple of the fastest dense one's."""
    rows, columns = [], dict[str, None]()
    for case in report["cases"]:
        cells = {}
        for name in case["sparse"]:
            for pass_name, mib in case["peak_mib"].get(name, {}).items():
                dense = case["peak_mib"][_fastest(case, pass_name)][_dense_pass(pass_name)]
                cells[f"{name}, {pass_name}"] = f"{mib:.0f} MiB ({mib / dense:.2f})"
        columns |= dict.fromkeys(cells)
        rows.append((_row_labels(case), cells))
    return Table(
        "Peak memory, and as a multiple of the fastest dense attention's",
        ["size", "density", *columns],
        [[*position, *(cells.get(column, "") for column in columns)] for position, cells in rows],
    )


def _reasons(report: dict[str, Any]) -> dict[str, str]:
    """Return why candidates were not measured, by name, with the size where others have it."""
    reasons = dict(report.get("absent", {}))
    for case in report["cases"]:
        for name, reason in case.get("missing", {}).items():
            measured = any(name in other["ms"] for other in report["cases"])
            reasons[f"{name}, {size_of(case)}" if measured else name] = reason
    return reasons


def _cell(case: dict[str, Any], name: str, pass_name: str) -> str:
    """Format a time, for a sparse candidate with its speed relative to the fastest dense attention."""
    sparse = name in case["sparse"]
    ms = _ms(case, name, pass_name if sparse else _dense_pass(pass_name))
    speed = tflops(case, name, pass_name)
    if ms is None or speed is None:
        return ""
    cell = f"{ms:.1f}" if speed < 10 else f"{ms:.2f}, {speed:.0f} TFLOP/s"
    if not sparse:
        return cell
    faster = dense_ms(case, pass_name) / ms
    return f"{cell} ({faster:.2f}, {100 * faster * case['realised_density']:.0f} %)"


def tflops(case: dict[str, Any], name: str, pass_name: str) -> float | None:
    """Return the TFLOP/s of a candidate's pass, of the pairs that it keeps; None if it was not timed."""
    sparse = name in case["sparse"]
    ms = _ms(case, name, pass_name if sparse else _dense_pass(pass_name))
    if ms is None:
        return None
    work: float = 4 * case["head_dim"] * case["batch"] * case["heads"] * case["tokens"] ** 2 * WORK.get(pass_name, 1.0)
    return work * (case["realised_density"] if sparse else 1.0) / ms / 1e9


def _ms(case: dict[str, Any], name: str, pass_name: str) -> float | None:
    times: dict[str, float] = case["ms"].get(name, {})
    if pass_name == "backward":
        return times["training"] - times["forward"] if {"training", "forward"} <= set(times) else None
    return times.get(pass_name)


def _dense_pass(pass_name: str) -> str:
    """Return the pass of dense attention with which a pass is compared."""
    return pass_name if pass_name in ("training", "backward") else "forward"


def dense_names(case: dict[str, Any]) -> list[str]:
    """Return the names of a case's dense candidates."""
    return [name for name in case["ms"] if name not in (*case["sparse"], "selection")]


def sparse_names(cases: list[dict[str, Any]]) -> list[str]:
    """Return the names of the block-sparse candidates of any case."""
    return list(dict.fromkeys(name for case in cases for name in case["sparse"]))


def _fastest(case: dict[str, Any], pass_name: str) -> str:
    """Return the name of the fastest dense candidate."""
    times = {name: ms for name in dense_names(case) if (ms := _ms(case, name, _dense_pass(pass_name))) is not None}
    return min(times, key=lambda name: times[name])


def dense_ms(case: dict[str, Any], pass_name: str) -> float:
    """Return the milliseconds of the fastest dense candidate for the pass that another is compared with."""
    ms = _ms(case, _fastest(case, pass_name), _dense_pass(pass_name))
    assert ms is not None
    return ms


def size_of(case: dict[str, Any]) -> AttentionShape:
    """Return a case's size."""
    return AttentionShape(**{name: case[name] for name in ("tokens", "heads", "head_dim", "batch", "model")})


def _row_labels(case: dict[str, Any]) -> list[str]:
    return [str(size_of(case)), f"{case['realised_density']:.3f}"]
