"""Speed of block-sparse attention against density, one panel an implementation."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from blade.evaluation.attention_benchmark import IMPLEMENTATIONS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""A colour for each length of the sequence (Okabe and Ito's, which the colour-blind can tell apart)."""


def plot_report(report: dict[str, Any]) -> bytes:
    """Draw a report of `run_attention_benchmark`, and return it as a PNG."""
    measured = [name for name in IMPLEMENTATIONS if any(f"{name}_ms" in case for case in report["cases"])]
    lengths = sorted({case["tokens"] for case in report["cases"]})
    densities = sorted({case["density"] for case in report["cases"]})
    figure = Figure(figsize=(5.0 * len(measured) + 0.4, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False, sharey=True)[0]
    for axes, name in zip(panels, measured):
        for index, tokens in enumerate(lengths):
            cases = [case for case in report["cases"] if case["tokens"] == tokens and f"{name}_ms" in case]
            cases.sort(key=lambda case: case["realised_density"])
            x = [case["realised_density"] for case in cases]
            y = [case["dense_ms"] / case[f"{name}_ms"] for case in cases]
            axes.plot(x, y, "o-", color=COLOURS[index % len(COLOURS)], label=f"{tokens:,} tokens")
        if len(densities) > 1:
            ideal = [1 / density for density in densities]
            axes.plot(densities, ideal, "--", color="#7F7F7F", label="1 / density")
        axes.axhline(1.0, color="#000000", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(densities, labels=[f"{density:g}" for density in densities])
        axes.minorticks_off()
        axes.set_title(name)
        axes.set_xlabel("density")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    panels[0].set_ylabel("times as fast as the fastest dense attention")
    settings, machine = report["settings"], report["machine"]
    figure.suptitle(
        f"{settings['heads']} heads of {settings['head_dim']}, {settings['dtype']}, blocks of "
        f"{settings['block_size']}; {machine['device']}, {machine['threads']} threads",
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
