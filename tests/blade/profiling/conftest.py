"""Small profiles: measured on the tiny pipeline, and made up."""

from __future__ import annotations

import numpy as np
import pytest

from blade import BladeConfig, TokenGrid
from blade.attention.config import AdaptiveConfig
from blade.attention.patterns import HeadPattern, pattern_blocks
from blade.profiling.profile import AttentionProfile, ProfileSource


@pytest.fixture
def make_profile():
    """Return a function that makes up a profile: 2 prompts, 2 branches, 6 steps, 3 layers, 4 heads."""

    def make(seed=0, steps=6, layers=3, heads=4):
        rng = np.random.default_rng(seed)
        grid = TokenGrid(4, 8, 8, text_after=5)
        candidates = (
            HeadPattern(kind="full"),
            HeadPattern(kind="skip"),
            HeadPattern(kind="diagonal", frames=0.6),
            HeadPattern(kind="multi-diagonal", frames=0.6, order="token-major"),
            HeadPattern(kind="vertical", share=0.2),
        )
        densities = [float(pattern_blocks(pattern, grid, 16, "raster").float().mean()) for pattern in candidates]
        adaptive = tuple(
            BladeConfig(sparsity=sparsity, dense_steps=1, asa=AdaptiveConfig(block_size=16)) for sparsity in (0.5, 0.8)
        )
        source = ProfileSource(
            model="made up",
            prompts=("one", "two"),
            seeds=(0, 1),
            steps=steps,
            guidance_scale=2.0,
            video=(13, 64, 64),
            grid=grid,
            block_size=16,
            token_order="raster",
            candidates=candidates,
            densities=tuple(densities),
            adaptive=adaptive,
            adaptive_densities=(0.5, 0.2),
        )
        measured = len(candidates) + len(adaptive)
        energy = rng.uniform(0.5, 2, (4, steps, layers, heads))
        error = energy[:, :, :, None] * rng.uniform(0, 0.5, (4, steps, layers, measured, heads))
        error[:, :, :, 0], error[:, :, :, 1] = 0, energy
        error[:, :, :, 6] = 4 * error[:, :, :, 5]
        blocks = -(-grid.sequence_length // 16)
        mass = rng.uniform(0, 1, (steps, layers, measured, heads))
        columns = rng.random((steps, layers, heads, blocks))
        maps = rng.random((4, layers, heads, blocks, blocks))
        arrays = {
            "error": error,
            "energy": energy,
            "head_error": error.mean(0),
            "mass": mass,
            "best_mass": np.minimum(1, mass + 0.1),
            "columns": columns,
            "maps": maps / maps.sum(-1, keepdims=True),
        }
        return AttentionProfile(source=source, **{name: array.astype(np.float32) for name, array in arrays.items()})

    return make
