from __future__ import annotations

import numpy as np
import pytest

from blade.metrics.estimates import (
    LEAST_VIDEOS,
    Marks,
    Values,
    bootstrap,
    difference_of_shares,
    paired_difference,
    wilson,
)


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
    values, baseline = {**dict.fromkeys("abcde", 3.0), "f": 100.0}, {**dict.fromkeys("edcba", 1.0), "g": -100.0}
    estimate = paired_difference(values, baseline)
    assert (estimate.mean, estimate.low, estimate.high, estimate.videos) == (2.0, 2.0, 2.0, 5)
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


@pytest.mark.parametrize("count", range(1, LEAST_VIDEOS + 1))
def test_few_videos_have_no_interval(count):
    values, marks = dict.fromkeys(range(count), 29.37), dict.fromkeys(range(count), True)
    estimates = (Values(values).estimate(), Values(values).less(Values(values)),
                 Marks(marks).estimate(), Marks(marks).less(Marks(marks)))  # fmt: skip
    for estimate in estimates:
        assert estimate.videos == count
        assert (estimate.low is None, estimate.high is None) == 2 * (count < LEAST_VIDEOS,)


def test_the_interval_of_a_share_is_wilsons():
    # 0 and 10 of 10, and the example of Newcombe 1998 (two-sided intervals for the single proportion): 81 of 263
    nothing, everything, some = wilson([False] * 10), wilson([True] * 10), wilson([True] * 81 + [False] * 182)
    assert (nothing.low, nothing.high) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (everything.low, everything.high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert (some.low, some.high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_equal_shares_are_not_certain_to_be_equal():
    same = [True] * 30 + [False] * 2
    estimate = difference_of_shares(same, same[::-1])
    assert estimate.mean == 0 and estimate.low < -0.05 and estimate.high > 0.05
    none = difference_of_shares([True] * 32, [True] * 32)
    assert none.mean == 0 and none.low < -0.05 and none.high > 0.05


def test_the_interval_of_a_difference_of_shares_is_newcombes():
    # of his examples, 36, 12, 2 and 0 of 50 pairs, and 54 of 54
    both, one = [True] * 36, [True] * 12
    estimate = difference_of_shares([*both, *one, False, False], [*both, *[False] * 12, True, True])
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    estimate = difference_of_shares([True] * 54, [True] * 54)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((0.0, -0.0664, 0.0664), abs=1e-4)


def test_the_interval_of_a_difference_of_shares_covers_what_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(400):
        hard = rng.random(40)
        marks, baseline = hard + 0.3 * rng.random(40) < 0.9, hard + 0.3 * rng.random(40) < 0.8
        estimate = difference_of_shares(marks.tolist(), baseline.tolist())
        covered += estimate.low <= 0.1 <= estimate.high
    assert 0.93 <= covered / 400 <= 0.995
