"""Distances of distributions and diversity, on cases with a closed form."""

import numpy as np
import pytest
import torch

from blade.metrics.distribution import (
    Distance,
    diversity,
    feature_count,
    frechet_distance,
    latent_statistics,
    resampled_distances,
    thumbnail,
)
from blade.models.loading import load_model


def exact(mean, covariance, count=400, seed=0):
    """Samples whose mean and covariance are exactly these."""
    raw = np.random.default_rng(seed).normal(size=(count, len(mean)))
    raw -= raw.mean(axis=0)
    white = raw @ np.linalg.inv(np.linalg.cholesky(np.atleast_2d(np.cov(raw, rowvar=False)))).T
    return white @ np.linalg.cholesky(np.asarray(covariance)).T + mean


def test_of_two_normal_distributions():
    count = 400
    unit = (count - 1) / count  # variance with count, as the unit of measure is taken
    first, second = exact([1.0, 0.0], np.diag([4.0, 9.0])), exact([0.0, 0.0], np.eye(2), seed=1)
    # |m|^2 + sum of (s1 - s2)^2, in units of the second's standard deviations
    assert frechet_distance(first, second) == pytest.approx((1 + (2 - 1) ** 2 + (3 - 1) ** 2) / unit)
    assert frechet_distance(second, second) == pytest.approx(0, abs=1e-9)


def test_units_of_features_do_not_matter():
    first, second = exact([1.0, 2.0], [[1.0, 0.5], [0.5, 2.0]]), exact([0.0, 0.0], np.eye(2), seed=1)
    scale = np.array([1000.0, 0.01])
    assert frechet_distance(first * scale, second * scale) == pytest.approx(frechet_distance(first, second))


def test_a_constant_feature_divides_nothing_by_zero():
    features = np.concatenate((exact([0.0], [[1.0]]), np.zeros((400, 1))), axis=1)
    assert np.isfinite(frechet_distance(features, features))


def test_intervals_are_around_the_distance_and_pair_videos():
    near, reference = exact([0.2, 0.0], np.eye(2)), exact([0.0, 0.0], np.eye(2), seed=1)
    far = near + np.array([1.0, 0.0])
    distances = [
        Distance(frechet_distance(one, reference), resampled_distances(one, reference), 400) for one in (near, far)
    ]
    estimate = distances[0].estimate()
    assert estimate.low < estimate.mean == distances[0].value < estimate.high
    apart = distances[1].less(distances[0])
    assert 0 < apart.low < apart.mean < apart.high
    assert distances[0].less(distances[0]).high == 0
    assert distances[0].less(Distance(1.0, distances[1].resamples, 399)) is None


def test_diversity():
    videos = [torch.full((2, 3, 4, 4), value) for value in (0.0, 0.5, 1.0)]
    assert diversity(videos) == pytest.approx((0.5 + 1.0 + 0.5) / 3)
    assert diversity([videos[0], videos[0]]) == 0
    assert thumbnail(torch.rand(5, 3, 96, 48)).shape == (5, 3, 24, 24)


def test_latent_statistics_see_blur(saved_tiny_pipeline):
    model = load_model(saved_tiny_pipeline)
    video = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sharp = latent_statistics(model, video)
    blurred = latent_statistics(model, torch.nn.functional.avg_pool2d(video, 5, 1, 2))
    assert len(sharp) == feature_count(model) == 2 * 4
    assert sharp == pytest.approx(latent_statistics(model, video)) and sharp != pytest.approx(blurred, rel=0.01)
