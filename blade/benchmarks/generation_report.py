"""The generation benchmark's report: tables, JSON and Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blade.common.files import write_files
from blade.common.tables import Table, markdown_block, markdown_code, markdown_table

FILES = ("generation.json", "generation.md")
"""The report's files."""


def tables(report: dict[str, Any]) -> list[Table]:
    """Return a report's tables: whole runs, a sparse pass by part, dense attention by backend, and peak memory."""
    runs = [
        [
            run["run"],
            f"{run['steps']}",
            f"{run['passes']}" + ("" if run["measured_passes"] == run["passes"] else f" ({run['measured_passes']})"),
            _seconds(run.get("encoding_seconds") if report.get("encoding_seconds") is not None else None),
            f"{run['transformer_seconds']:.2f} ({run['transformer_factor']:.2f})",
            _seconds(report["decoding_seconds"]),
            f"{run['seconds']:.2f} ({run['factor']:.2f})",
            f"{run['limit']:.2f}",
        ]
        for run in report["runs"]
    ]
    headings = ["run", "steps", "passes", "text s", "transformer s", "decoding s", "all s", "limit"]
    sparse = report["pass_ms"]["sparse"]
    parts = [[name, f"{ms:.2f}", f"{100 * ms / sparse:.1f} %"] for name, ms in report["parts_ms"].items()]
    parts += [
        ["all, measured without parts", f"{sparse:.2f}", "100 %"],
        ["a dense pass", f"{report['pass_ms']['dense']:.2f}", f"{100 * report['pass_ms']['dense'] / sparse:.1f} %"],
        ["the bound of a sparse pass", f"{report['bound_ms']:.2f}", f"{100 * report['bound_ms'] / sparse:.1f} %"],
    ]
    for sparsity, ms in report.get("preset_pass_ms", {}).items():
        parts.append([f"a pass with the preset, sparsity {sparsity}", f"{ms:.2f}", f"{100 * ms / sparse:.1f} %"])
    backends = [[name, f"{ms:.2f}"] for name, ms in report["dense_attention_ms"].items()]
    backends += [[name, reason] for name, reason in report["missing"].items()]
    sections = [
        Table("Runs", headings, runs),
        Table("A sparse pass by part", ["part", "ms", "of a sparse pass"], parts),
        Table("Dense attention of one layer", ["Diffusers' backend", "ms"], backends),
    ]
    memory = [[name, f"{gib:.2f}"] for name, gib in report["peak_gib"].items() if gib is not None]
    sections += [Table("Peak memory, weights included", ["of", "GiB"], memory)] if memory else []
    unmeasured = [[part, reason] for part, reason in report.get("unmeasured", {}).items()]
    return sections + ([Table("Not measured", ["part", "why"], unmeasured)] if unmeasured else [])


def _seconds(seconds: float | None) -> str:
    return "not measured" if seconds is None else f"{seconds:.2f}"


def markdown(report: dict[str, Any]) -> str:
    """Render the report as a Markdown page."""
    settings = report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version is not None)
    weights = "random weights" if settings["random_weights"] else "its own weights"
    processes = report.get("processes", 1)
    together = f"; {processes} processes compute every pass together" if processes > 1 else ""
    share = 100 * report["dense_attention_share"]
    lines = [
        "# Generation, dense and sparse",
        "",
        f"{report['date']}, {report['machine']['device']}, {versions}{together}.",
        "",
        markdown_block(report["command"]),
        "",
        f"{markdown_code(settings['model'])} with {weights}, {settings['dtype']}: {report['frames']} frames of "
        f"{report['width']}x{report['height']}, {report['tokens']:,} tokens, {report['layers']} layers of "
        f"{report['heads']} heads. Every "
        f"layer and step at sparsity {settings['sparsity']} with pooled tokens {settings['pooled_tokens']} inside, "
        f"density {report['density']:.3f}; the number of blocks is fixed, so that no time depends on the weights.",
        "",
        "Runs are the encoding of the text, the transformer's passes and the decoding; the scheduler and writing a "
        "file are left out. Passes: those timed in brackets, from which the others are extrapolated. Seconds: how "
        "many times faster than dense in brackets. Limit: how many times faster all would be, if attention took no "
        f"time. Dense passes use the fastest backend, and self-attention is {share:.1f} % of one. The bound of a "
        "sparse pass: 1.10 times a dense pass without its attention, its attention times density / 0.85, and the "
        "block selection.",
    ]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *markdown_table(table.headings, table.rows)]
    return "\n".join([*lines, ""])


def write_report(report: dict[str, Any], folder: Path) -> list[Path]:
    """Write `generation.json` and `generation.md`; both or none.

    Returns:
        The files' paths.

    Raises:
        OutputError: a file cannot be written.
    """
    contents = ((json.dumps(report, indent=2) + "\n").encode(), markdown(report).encode())
    files = {folder / name: content for name, content in zip(FILES, contents, strict=True)}
    write_files(files)
    return list(files)
