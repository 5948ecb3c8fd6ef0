"""The sparsity at which adaptive block-sparse attention has a given error, interpolated from measured sparsities."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from blade.attention.config import BladeConfig
from blade.profiling.profile import AttentionProfile


@dataclass(frozen=True, kw_only=True)
class AdaptiveChoice:
    """A configuration of ASA and its predicted error."""

    config: BladeConfig
    """The configuration."""
    error: float
    """Squared error of the attention layers' outputs as a share of their energy; 0 in dense layers and steps."""
    density: float
    """Share of all pairs that the run computes."""
    reached: bool
    """If true, the requested error was reached; otherwise `error` is that of the largest measured sparsity."""


def adaptive_at_error(profile: AttentionProfile, error: float, influences: np.ndarray) -> AdaptiveChoice:
    """Find the sparsity at which ASA, with its preset's dense layers and steps, reaches an error.

    The logarithm of the error is interpolated linearly between measured sparsities; below the smallest of them, the
    error is assumed to fall to nearly zero.

    Args:
        profile: the profile, with adaptive methods that differ in sparsity only.
        error: squared error of the attention layers' outputs as a share of their energy.
        influences: (steps, layers), the weight of an error there, 1 on average.

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
    # the error at sparsity 0 is zero, which has no logarithm: e^-5 times the smallest measured one stands in
    known_sparsities = np.concatenate(([0.0], sparsities))
    log_errors = np.concatenate(([np.log(errors[0]) - 5], np.log(errors)))
    sparsity = float(np.interp(np.log(error), log_errors, known_sparsities))
    sparsity = round(min(sparsity, float(sparsities[-1])), 3)
    predicted = float(np.exp(np.interp(sparsity, known_sparsities, log_errors)))
    config = replace(source.adaptive[0], sparsity=sparsity)
    density = 1 - float(sparse.mean()) * sparsity
    return AdaptiveChoice(config=config, error=predicted, density=density, reached=error <= errors[-1])


def adaptive_error(profile: AttentionProfile, number: int, sparse: np.ndarray, influences: np.ndarray) -> float:
    """Return the error of an adaptive method of the profile; `sparse`: (steps, layers) bool."""
    measured = profile.error[:, :, :, len(profile.source.candidates) + number].mean(0, dtype=np.float64).sum(-1)
    energy = profile.energy.mean(0, dtype=np.float64).sum(-1)
    relative = measured / np.maximum(energy, 1e-30) * influences
    return float((relative * sparse).mean())


def _sparse_places(config: BladeConfig, steps: int, layers: int) -> np.ndarray:
    """Return the steps and layers in which a configuration is sparse: (steps, layers) bool."""
    sparse = np.ones((steps, layers), dtype=bool)
    sparse[: config.dense_step_count(steps)] = False
    sparse[:, [layer for layer in config.dense_layers if layer < layers]] = False
    return sparse
