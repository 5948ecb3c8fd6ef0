"""Quality of the training-free preset by density, as measured with the bundled model: no card measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blade.common.reading import read_json

PATH = Path(__file__).with_name("quality.json")
"""The data, gathered by scripts/quality_by_density.py from the evaluations that `source` names."""

NEAREST = 0.01
"""Largest distance of two densities that count as the same."""


def quality_by_density() -> dict[str, Any]:
    """Return the quality, plain JSON values.

    Returns:
        `source`; `measure`; of all runs `model`, `size`, `videos`, `steps`, `guidance`, `dense_steps` and
        `dense_layers`; and `points`, each with `sparsity`, `layer_density`, `run_density`, and `psnr`: mean, low and
        high of a 95 % interval, in dB.
    """
    return read_json(PATH, f"the data {PATH}")


def sparsities() -> tuple[float, ...]:
    """Return the sparsities at which quality is known."""
    return tuple(point["sparsity"] for point in quality_by_density()["points"])


def psnr_at(density: float) -> dict[str, float] | None:
    """Return mean, low and high of the PSNR to dense at a layer density, in dB; None where it was not measured."""
    points = quality_by_density()["points"]
    nearest = min(points, key=lambda point: abs(point["layer_density"] - density))
    return nearest["psnr"] if abs(nearest["layer_density"] - density) <= NEAREST else None
