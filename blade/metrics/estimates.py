"""Means over videos with their confidence intervals, and differences between two runs of the same videos."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import numpy as np

Video = TypeVar("Video", bound=Hashable)
"""Key of a video."""

WORST = 0.1
"""Share of the videos whose mean is the worst tenth."""

RESAMPLES = 2000
"""Bootstrap resamples of a confidence interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its 95 % confidence interval, by the percentile bootstrap over videos."""

    mean: float
    low: float
    high: float
    videos: int
    """Number of videos that have a value."""


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of values with its 95 % percentile bootstrap interval.

    Raises:
        ValueError: If there is no value.
    """
    if not len(values):
        raise ValueError("`values` must hold at least one value, got none.")
    array = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return Estimate(mean=float(array.mean()), low=float(low), high=float(high), videos=len(array))


def mean_of_worst(values: Iterable[float]) -> float:
    """The mean of the smallest tenth of values, at least one."""
    ordered = sorted(values)
    count = max(1, math.ceil(WORST * len(ordered)))
    return sum(ordered[:count]) / count


def paired_difference(values: Mapping[Video, float], baseline: Mapping[Video, float]) -> Estimate | None:
    """The mean of values less the baseline's of the same videos, over the videos that have both.

    Args:
        values: By video.
        baseline: By video.

    Returns:
        None if no video has both.
    """
    differences = [value - baseline[video] for video, value in values.items() if video in baseline]
    return bootstrap(differences) if differences else None


class Result(Protocol):
    """Estimate of a measure over the videos of a run."""

    def estimate(self) -> Estimate:
        """Return the value with its interval."""

    def less(self, other: Self) -> Estimate | None:
        """Return the difference to another run's result, None if they have no videos in common."""


@dataclass(frozen=True)
class Values:
    """A result that is the mean of single values."""

    of: Mapping[Any, float]
    """At least one value, by video."""

    def estimate(self) -> Estimate:
        """Return the mean with its interval; see `bootstrap`."""
        return bootstrap([*self.of.values()])

    def less(self, other: Values) -> Estimate | None:
        """Return the mean difference over the videos of both; see `paired_difference`."""
        return paired_difference(self.of, other.of)
