from __future__ import annotations

import numpy as np
import pytest

from blade.metrics.estimates import bootstrap, paired_difference


def test_bootstrap_interval_is_that_of_the_mean():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    estimate = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_a_paired_difference_is_over_the_videos_that_both_have():
    estimate = paired_difference({"a": 3.0, "b": 5.0, "c": 100.0}, {"b": 1.0, "a": 1.0, "d": -100.0})
    # a: 2, b: 4; every resample of two is 2, 3 or 4 on average
    assert (estimate.mean, estimate.low, estimate.high, estimate.videos) == (3.0, 2.0, 4.0, 2)
    assert paired_difference({"a": 1.0}, {"b": 1.0}) is None


def test_pairs_are_more_certain_than_two_estimates():
    rng = np.random.default_rng(2)
    hard = rng.normal(0.0, 5.0, 64)
    first = dict(enumerate(hard + 1.0 + rng.normal(0.0, 0.1, 64)))
    second = dict(enumerate(hard))
    estimate = paired_difference(first, second)
    assert 0.9 < estimate.low < estimate.high < 1.1
    alone = bootstrap([*first.values()])
    assert alone.high - alone.low > 10 * (estimate.high - estimate.low)
