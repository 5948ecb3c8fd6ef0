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

LEAST_VIDEOS = 5
"""Videos from which on there is an interval: resamples of fewer hardly differ, and those of one not at all."""

NORMAL_QUANTILE = 1.959964
"""Standard deviations within which 95 % of a normal distribution lie."""


@dataclass(frozen=True)
class Estimate:
    """A mean over videos with its 95 % confidence interval."""

    mean: float
    low: float | None
    """None with fewer than `LEAST_VIDEOS` videos."""
    high: float | None
    """None with fewer than `LEAST_VIDEOS` videos."""
    videos: int
    """Number of videos that have a value."""


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of values with its percentile bootstrap interval.

    Raises:
        ValueError: If there is no value.
    """
    array = _array(values)
    picks = np.random.default_rng(seed).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.percentile(array[picks].mean(1), [2.5, 97.5])
    return _estimate(float(array.mean()), float(low), float(high), len(array))


def wilson(marks: Sequence[bool]) -> Estimate:
    """The share of videos that something holds for, with Wilson's score interval.

    Unlike resamples it does not shrink to a point where all marks are alike.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, 1927.

    Raises:
        ValueError: If there is no mark.
    """
    share, count = float(_array(marks).mean()), len(marks)
    squared = NORMAL_QUANTILE**2 / count
    centre = (share + squared / 2) / (1 + squared)
    half = math.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    # rounding may leave a share of 0 or 1 outside by a hair
    return _estimate(share, min(centre - half, share), max(centre + half, share), count)


def difference_of_shares(marks: Sequence[bool], baseline: Sequence[bool]) -> Estimate:
    """The difference of two shares over the same videos, with an interval of their Wilson intervals.

    Source: R. G. Newcombe, Improved confidence intervals for the difference between binomial proportions based on
    paired data, 1998, method 10 without the correction of a positive correlation.

    Args:
        marks: of each video.
        baseline: of the same videos, in the same order.

    Raises:
        ValueError: If there is no mark.
    """
    own, other = wilson(marks), wilson(baseline)
    difference = own.mean - other.mean
    if own.low is None or own.high is None or other.low is None or other.high is None:
        return _estimate(difference, difference, difference, own.videos)
    first, second = _array(marks), _array(baseline)
    correlated = first.std() > 0 and second.std() > 0
    correlation = float(np.corrcoef(first, second)[0, 1]) if correlated else 0.0

    def distance(one: float, two: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * two + two**2, 0.0))

    low = difference - distance(own.mean - own.low, other.high - other.mean)
    high = difference + distance(own.high - own.mean, other.mean - other.low)
    return _estimate(difference, low, high, own.videos)


def _array(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise ValueError("`values` must hold at least one value, got none.")
    return np.asarray(values, dtype=np.float64)


def _estimate(mean: float, low: float, high: float, videos: int) -> Estimate:
    known = videos >= LEAST_VIDEOS
    return Estimate(mean=mean, low=low if known else None, high=high if known else None, videos=videos)


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


@dataclass(frozen=True)
class Marks:
    """A result that is the share of videos that something holds for."""

    of: Mapping[Any, bool]
    """At least one mark, by video."""

    def estimate(self) -> Estimate:
        """Return the share with its interval; see `wilson`."""
        return wilson([*self.of.values()])

    def less(self, other: Marks) -> Estimate | None:
        """Return the difference over the videos of both; see `difference_of_shares`."""
        both = [video for video in self.of if video in other.of]
        if not both:
            return None
        return difference_of_shares([self.of[video] for video in both], [other.of[video] for video in both])
