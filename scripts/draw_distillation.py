"""Draw the figure of docs/distillation.md: python scripts/draw_distillation.py docs/images/distillation.png."""

import io
from pathlib import Path
from typing import Annotated

import typer
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from blade.cli.command import run_script
from blade.common.files import check_writable, write_files
from blade.distillation.trajectory import flow_times

STUDENT, FAKE, TEACHER, PALE = "#d1495b", "#edae49", "#5b83b8", "#f2f2f2"
STEPS, SHIFT, SHOWN = 4, 3.0, 2


def main(output: Annotated[Path, typer.Argument(help="The PNG.")]) -> None:
    """Write the figure: a trajectory with one of its steps, and the networks of one update."""
    check_writable(output)
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), width_ratios=(1, 1.15))
    draw_trajectory(left)
    draw_update(right)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_files({output: buffer.getvalue()})


def draw_trajectory(axes: Axes) -> None:
    """Draw the times of a run, the trained step, and the added noise."""
    times = [*flow_times(STEPS, SHIFT), 0.0]
    steps = range(STEPS + 1)
    axes.set(xlim=(-0.6, STEPS + 0.6), ylim=(-90, 1090), xticks=[], ylabel="time t (noise)")
    axes.set_title(f"one trajectory: {STEPS} steps at the sampler's own times", fontsize=11)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    low, high = times[SHOWN + 1], times[SHOWN]
    axes.axhspan(low, high, color=TEACHER, alpha=0.12)
    axes.text(-0.5, high - 20, f"interval of step {SHOWN + 1}", fontsize=9, color=TEACHER, va="top")
    for step in range(STEPS):
        trained = step == SHOWN
        axes.annotate(
            "",
            (step + 1, times[step + 1]),
            (step, times[step]),
            arrowprops={
                "arrowstyle": "-|>",
                "color": STUDENT,
                "linewidth": 2.6 if trained else 1.2,
                "linestyle": "-" if step <= SHOWN else ":",
            },
        )
    axes.plot(list(steps), times, "o", color=STUDENT)
    for step, time in enumerate(times):
        name = "noise" if step == 0 else "video" if step == STEPS else ""
        axes.text(step + 0.08, time + 28, f"{time:.0f} {name}".strip(), fontsize=9)
    axes.text(SHOWN - 0.1, times[SHOWN] - 45, r"$x_{g}$", ha="right", fontsize=11)
    axes.text(SHOWN + 1 - 0.12, low - 55, r"$x_m$", ha="right", fontsize=11)
    noised = low + 0.62 * (high - low)
    axes.annotate(
        "",
        (SHOWN + 1, noised),
        (SHOWN + 1, low),
        arrowprops={"arrowstyle": "-|>", "color": TEACHER, "linewidth": 2},
    )
    axes.text(SHOWN + 1.1, noised, r"$x_t$: noise added, t drawn", fontsize=9, va="center", color=TEACHER)
    axes.text(0.05, 120, "thin steps: run without gradient", fontsize=9)
    axes.text(0.05, 60, "bold step: with gradient", fontsize=9, color=STUDENT)


def box(axes: Axes, x: float, y: float, width: float, colour: str, title: str, text: str) -> None:
    """Draw a network."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, 1.5, boxstyle="round,pad=0.06", facecolor=colour, alpha=0.25, edgecolor=colour)
    )
    axes.text(x + width / 2, y + 1.08, title, ha="center", va="center", fontsize=10, weight="bold")
    axes.text(x + width / 2, y + 0.45, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = "#555555") -> None:
    """Draw an arrow."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.5})


def draw_update(axes: Axes) -> None:
    """Draw the computation of one update and its gradients."""
    axes.set(xlim=(-0.2, 10.4), ylim=(-0.5, 7.6))
    axes.axis("off")
    axes.set_title("one update: three roles of one transformer", fontsize=11)
    box(axes, 0.2, 5.6, 2.9, STUDENT, "student", "base + LoRA, sparse")
    box(axes, 3.8, 3.0, 2.9, FAKE, "fake score", "base + LoRA, dense")
    box(axes, 7.2, 3.0, 2.9, TEACHER, "teacher", "base, guided, dense")
    axes.text(4.2, 6.35, r"$x_0$  →  $x_m$  →  $x_t$", fontsize=12, va="center")
    arrow(axes, (3.2, 6.35), (4.1, 6.35))
    arrow(axes, (6.2, 6.05), (5.6, 4.65))
    arrow(axes, (6.4, 6.05), (8.4, 4.65))
    axes.text(5.25, 2.35, r"$\mu_{fake}$", ha="center", fontsize=12)
    axes.text(8.65, 2.35, r"$\mu_{teacher}$", ha="center", fontsize=12)
    axes.text(
        0.95,
        3.75,
        "1  follows the student:\n" + r"   least $|\mu_{fake} - x_0|^2$",
        fontsize=10,
        va="center",
        color="#a87a1f",
    )
    axes.text(
        0.2, 1.35, r"2  gradient of $x_0$:  $\mu_{fake} - \mu_{teacher}$", fontsize=11, va="center", color=STUDENT
    )
    axes.annotate(
        "",
        (0.5, 5.45),
        (0.5, 1.7),
        arrowprops={"arrowstyle": "-|>", "color": STUDENT, "linewidth": 1.5, "linestyle": "--"},
    )
    axes.text(
        0.2,
        0.2,
        "Where the student makes too much of something, the fake score sees it,\nand the teacher does not.",
        fontsize=9,
    )


if __name__ == "__main__":
    run_script(main)
