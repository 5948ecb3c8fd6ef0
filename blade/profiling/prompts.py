"""The prompts that a profile is made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blade.generation.prompts import read_prompts
from blade.models.source import BUNDLED

BUNDLED_PROMPTS = 8
"""How many prompts the bundled model is profiled with where none are given."""

BUNDLED_SEED = 506
"""Seed of those."""


def profile_prompts(path: Path | None, model: str | None) -> tuple[str, ...]:
    """Return the prompts of a file, or for the bundled model some of its own, which evaluation holds no part of.

    Args:
        path: a text file, one prompt a line.
        model: the model; None: the bundled one.

    Raises:
        ValueError: if the file cannot be read or has no prompt, or is missing for another model.
    """
    if path is not None:
        return tuple(read_prompts(path))
    if model not in (None, BUNDLED):
        raise ValueError(f"`prompts` must be a text file with a few prompts for {model}, one a line; got none.")
    from blade.moving_shapes.captions import sample_caption

    rng = np.random.default_rng(BUNDLED_SEED)
    return tuple(str(sample_caption(rng, objects=1)) for _ in range(BUNDLED_PROMPTS))
