"""The measures that there are, in the order of a report's columns.

A measure of one's own is one file: it makes a `Measure`, and either calls `register_measure`, or belongs to an
installed package whose entry point of the group `blade.measures` names a sequence of measures:

    [project.entry-points."blade.measures"]
    my-package = "my_package.my_module:MEASURES"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from blade.common.registry import Registry
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

_MEASURES = Registry(
    Measure,
    (
        *DENSITIES,
        *similarity.MEASURES,
        *motion.MEASURES,
        *moving_shapes.MEASURES,
        *distribution.MEASURES,
        SECONDS,
    ),
    group="blade.measures",
)


def register_measure(measure: Measure) -> Measure:
    """Add a measure to all that evaluations, their reports and commands know, and return it.

    Raises:
        TypeError: If it is no `Measure`.
        ValueError: If another measure has its name.
    """
    return _MEASURES.register(measure)


def measures() -> Mapping[str, Measure]:
    """Return all measures by name."""
    return _MEASURES.declared


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
            raise ValueError(f"`measures` must be of {', '.join(measures())}, got {name!r}.")
        extra = measures()[name].extra
        if extra is not None and find_spec(extra) is None:
            raise ValueError(
                f"`measures` must be of those that can be computed here, got {name!r}, whose package {extra} is not "
                f"installed: pip install 'blade-video[{extra}]'."
            )
    return _MEASURES.select(lambda measure: measure.name in names or measure.compute is None)


def compare_videos(video: torch.Tensor, reference: torch.Tensor) -> dict[str, Any]:
    """Compare a video with its dense reference.

    Args:
        video: (frames, 3, height, width) in [0, 1].
        reference: The same prompt and seed with dense attention, of the same shape.

    Returns:
        By name, the values of the measures with `comparison`.
    """
    sample = VideoSample(video=video, prompt="", reference=VideoSample(video=reference, prompt=""))
    shown = _MEASURES.select(lambda measure: measure.comparison)
    return {measure.name: measure.compute(sample) for measure in shown if measure.compute is not None}


def describe_comparison(record: Mapping[str, Any]) -> str:
    """Say in a line what `compare_videos` found, such as "PSNR 22.31 dB, SSIM 0.9123"."""
    shown = _MEASURES.select(lambda measure: measure.comparison and record.get(measure.name) is not None)
    values = {measure: measure.shown(record[measure.name]) for measure in shown}
    return ", ".join(f"{measure.heading} {value} {measure.detail}".rstrip() for measure, value in values.items())
