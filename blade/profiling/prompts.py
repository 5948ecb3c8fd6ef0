"""Prompts of a profile."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blade.generation.prompts import read_prompts
from blade.models.source import BUNDLED

BUNDLED_PROMPTS = 8
"""Number of prompts that the bundled model is profiled with by default."""

BUNDLED_SEED = 506
"""Seed of those prompts."""


def profile_prompts(path: Path | None, model: str | None) -> tuple[str, ...]:
    """Return the prompts of a file, or for the bundled model some of its own, disjoint from those of an evaluation.

    Args:
        path: a text file with one prompt per line.
        model: the model; None: the bundled model.

    Raises:
        ValueError: if the file cannot be read or has no prompts, or if another model has no file.
    """
    if path is not None:
        return tuple(read_prompts(path))
    if model not in (None, BUNDLED):
        raise ValueError(f"`prompts` must be a text file with a few prompts for {model}, one a line; got none.")
    from blade.moving_shapes.captions import sample_caption

    rng = np.random.default_rng(BUNDLED_SEED)
    return tuple(str(sample_caption(rng, objects=1)) for _ in range(BUNDLED_PROMPTS))
