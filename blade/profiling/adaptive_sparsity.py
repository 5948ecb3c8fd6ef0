"""The sparsity of adaptive block-sparse attention that comes to a given error, from what was measured of a few."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from blade.attention.config import BladeConfig
from blade.profiling.profile import AttentionProfile


@dataclass(frozen=True, kw_only=True)
class AdaptiveChoice:
    """A configuration of ASA."""

    config: BladeConfig
    """The configuration."""
    error: float
    """Squared error of the attention layers' outputs as a share of their energy; dense layers and steps have none."""
    density: float
    """Share of all pairs that the run computes."""
    reached: bool
    """Whether the error is the one asked for; otherwise that of the nearest sparsity that was measured."""


def adaptive_at_error(profile: AttentionProfile, error: float, influences: np.ndarray) -> AdaptiveChoice:
    """Find the sparsity at which ASA, with its preset's dense layers and steps, comes to an error.

    Between measured sparsities the logarithm of the error is taken to be linear; below the least of them the error is
    taken to fall to nothing.

    Args:
        profile: what was measured, with adaptive methods that differ in sparsity alone.
        error: squared error of the attention layers' outputs as a share of their energy.
        influences: (steps, layers), how much an error counts there, 1 on average.

    Raises:
        ValueError: if no adaptive method was measured.
    """
    source = profile.source
    if not source.adaptive:
        raise ValueError("`adaptive` must be measured in the profile to calibrate ASA's sparsity.")
    sparse = _sparse_places(source.adaptive[0], source.steps, profile.layers)
    errors = np.array([adaptive_error(profile, number, sparse, influences) for number in range(len(source.adaptive))])
    sparsities = np.array([config.sparsity for config in source.adaptive])
    order = np.argsort(sparsities)
    sparsities, errors = sparsities[order], np.maximum.accumulate(errors[order])
    # no error at no sparsity: as far below the least one as that lies above nothing, in steps of a factor of e
    known = np.concatenate(([0.0], sparsities)), np.concatenate(([np.log(errors[0]) - 5], np.log(errors)))
    sparsity = float(np.interp(np.log(error), known[1], known[0]))
    sparsity = round(min(sparsity, float(sparsities[-1])), 3)
    found = float(np.exp(np.interp(sparsity, known[0], known[1])))
    config = replace(source.adaptive[0], sparsity=sparsity)
    density = 1 - float(sparse.mean()) * sparsity
    return AdaptiveChoice(config=config, error=found, density=density, reached=error <= errors[-1])


def adaptive_error(profile: AttentionProfile, number: int, sparse: np.ndarray, influences: np.ndarray) -> float:
    """The error of an adaptive method of the profile where it is sparse, (steps, layers) bool."""
    measured = profile.error[:, :, :, len(profile.source.candidates) + number].mean(0, dtype=np.float64).sum(-1)
    energy = profile.energy.mean(0, dtype=np.float64).sum(-1)
    relative = measured / np.maximum(energy, 1e-30) * influences
    return float((relative * sparse).mean())


def _sparse_places(config: BladeConfig, steps: int, layers: int) -> np.ndarray:
    """(steps, layers) bool, where a configuration is sparse."""
    sparse = np.ones((steps, layers), dtype=bool)
    sparse[: config.dense_step_count(steps)] = False
    sparse[:, [layer for layer in config.dense_layers if layer < layers]] = False
    return sparse
