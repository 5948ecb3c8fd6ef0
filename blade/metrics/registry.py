"""The measures that there are, in the order of a report's columns.

A measure of one's own is one file: it makes a `Measure`, and either calls `register_measure`, or belongs to an
installed package whose entry point of the group `blade.measures` names its measures:

    [project.entry-points."blade.measures"]
    my-package = "my_package.my_module:MEASURES"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from blade.common.checks import meant
from blade.common.declared import declare, declare_installed
from blade.metrics import distribution, motion, moving_shapes, similarity
from blade.metrics.measures import Measure, VideoSample

DENSITIES = (
    Measure(
        name="layer_density", heading="layer density", format="{:.3f}", brief=False, interval=False, compared=False
    ),
    Measure(name="run_density", heading="run density", format="{:.3f}", interval=False, compared=False),
)
"""Shares of attention that are computed, which every record has."""

SECONDS = Measure(
    name="seconds_denoising", heading="seconds", detail="denoising", format="{:.2f}", better="down", interval=False
)
"""The time that sampling takes, which every record has."""

ENTRY_POINTS = "blade.measures"
"""Entry point group of other packages' measures."""

MEASURES = {
    measure.name: measure
    for measure in (
        *DENSITIES,
        *similarity.MEASURES,
        *motion.MEASURES,
        *moving_shapes.MEASURES,
        *distribution.MEASURES,
        SECONDS,
    )
}
"""The measures by name; of other packages, those that were registered. Take `measures` to have all."""


def register_measure(measure: Measure) -> Measure:
    """Declare a measure, and return it.

    Raises:
        ValueError: If there is a measure of this name.
    """
    return declare(MEASURES, measure)


def measures() -> Mapping[str, Measure]:
    """Return all measures by name, those that installed packages bring included."""
    _declare_installed()
    return MEASURES


@cache
def _declare_installed() -> None:
    declare_installed(MEASURES, Measure, ENTRY_POINTS)


def choose_measures(names: Sequence[str] | None = None) -> tuple[Measure, ...]:
    """Return the measures of these names, and those that every record has in any case.

    Args:
        names: Names of measures; None takes all.

    Raises:
        ValueError: If there is no such measure, or the optional package that it needs is not installed.
    """
    if names is None:
        return tuple(measures().values())
    for name in names:
        if name not in measures():
            raise ValueError(f"`measures` must be of {', '.join(measures())}, got {name!r}{meant(name, measures())}")
        extra = measures()[name].extra
        if extra is not None and find_spec(extra) is None:
            raise ValueError(
                f"`measures` must be of those that can be computed here, got {name!r}, whose package {extra} is not "
                f"installed: pip install 'blade-video[{extra}]'."
            )
    return tuple(measure for measure in measures().values() if measure.name in names or measure.compute is None)


def compare_videos(video: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Compare a video with its dense reference.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        reference: The same prompt and seed with dense attention, of the same shape.

    Returns:
        By name, the values of the measures with `comparison`.
    """
    sample = VideoSample(video=video, prompt="", reference=VideoSample(video=reference, prompt=""))
    return {
        measure.name: measure.compute(sample)
        for measure in measures().values()
        if measure.comparison and measure.compute is not None
    }


def describe_comparison(record: Mapping[str, Any]) -> str:
    """Say in a line what `compare_videos` found, such as "PSNR 22.31 dB, SSIM 0.9123"."""
    return ", ".join(
        f"{measure.heading} {measure.shown(record[measure.name])} {measure.detail}".rstrip()
        for measure in measures().values()
        if measure.comparison and record.get(measure.name) is not None
    )
