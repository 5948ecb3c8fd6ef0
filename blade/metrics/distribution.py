"""Measures of many videos together: how far their distribution is from another's, and how much they differ."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch.nn import functional

from blade.media.video import mp4_frames
from blade.metrics.estimates import Estimate
from blade.metrics.measures import Measure, VideoSample, VideoSet
from blade.models.loaded import LoadedModel

RESAMPLES = 200
"""Bootstrap resamples of a Frechet distance."""

THUMBNAIL = 24
"""Edge in pixels of the frames that diversity is measured on."""


def feature_count(model: LoadedModel) -> int:
    """Number of features of a video: see `latent_statistics`."""
    return 2 * model.empty_latent((1, 1, 1)).shape[1]


@torch.no_grad()
def latent_statistics(model: LoadedModel, video: torch.Tensor) -> list[float]:
    """The feature vector of a video: mean and standard deviation of every channel of its latent.

    The latent is that of the model's own VAE, so that nothing else has to be had: blur, flicker, ghosts and wrong
    colours all change what the encoder sees.

    Args:
        model: the model.
        video: (frames, 3, H, W) in [0, 1].

    Returns:
        Twice as many numbers as the latent has channels.
    """
    pipe = model.pipe
    like = next(pipe.vae.parameters())
    pixels = (2 * video.clamp(0, 1) - 1).transpose(0, 1)[None].to(like)
    latent = pipe.vae.encode(pixels).latent_dist.mode()[0].float().flatten(1)
    return torch.cat((latent.mean(dim=1), latent.std(dim=1))).tolist()


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance of two normal distributions that are fitted to features.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), every feature in units of the reference's standard deviation. Source:
    Heusel et al., arXiv 1706.08500, there of Inception features.

    Args:
        features: (videos, features).
        reference: (videos, features).
    """
    scale = reference.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    first, second = features / scale, reference / scale
    means = first.mean(axis=0) - second.mean(axis=0)
    covariances = [np.atleast_2d(np.cov(one, rowvar=False)) for one in (first, second)]
    # the eigenvalues of the product are those of a positive semi-definite matrix, but for rounding
    roots = np.sqrt(np.clip(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0, None)).sum()
    return float(means @ means + sum(np.trace(one) for one in covariances) - 2 * roots)


def resampled_distances(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> np.ndarray:
    """Frechet distances of bootstrap resamples: the same videos, row by row, are drawn of both.

    Args:
        features: (videos, features).
        reference: (videos, features), of the same prompts and seeds.
        seed: of the resamples; the same one gives the same videos for every run.

    Returns:
        (RESAMPLES,).
    """
    picks = np.random.default_rng(seed).integers(len(features), size=(RESAMPLES, len(features)))
    return np.array([frechet_distance(features[pick], reference[pick]) for pick in picks])


@dataclass(frozen=True)
class Distance:
    """A Frechet distance with its resamples."""

    value: float
    resamples: np.ndarray
    """By `resampled_distances`."""
    videos: int

    def estimate(self) -> Estimate:
        """The distance with its 95 % interval, shifted to where the distance is.

        Resamples hold videos twice, which makes every one of them a little more distant than the whole.
        """
        return self._around(self.value, self.resamples)

    def less(self, other: Distance) -> Estimate | None:
        """This distance less another one, of the same videos; None if they are not the same."""
        if self.videos != other.videos:
            return None
        return self._around(self.value - other.value, self.resamples - other.resamples)

    def _around(self, value: float, resamples: np.ndarray) -> Estimate:
        low, high = np.percentile(resamples - resamples.mean(), [2.5, 97.5])
        return Estimate(mean=value, low=value + float(low), high=value + float(high), videos=self.videos)


def thumbnail(video: torch.Tensor) -> torch.Tensor:
    """A video in little: (frames, 3, `THUMBNAIL`, `THUMBNAIL`), of one of any size."""
    return functional.interpolate(video, size=(THUMBNAIL, THUMBNAIL), mode="area")


def diversity(videos: Sequence[torch.Tensor]) -> float:
    """Diversity of the videos of one prompt: the root mean square of their pixels' differences, over all pairs.

    Args:
        videos: at least two, of one shape, in [0, 1]; small ones will do.
    """
    return fmean(float((one - two).square().mean().sqrt()) for one, two in itertools.combinations(videos, 2))


def _features(sample: VideoSample) -> list[float] | None:
    """Features of a video, if there will be videos enough for a distance, as encoding takes time and memory."""
    assert sample.model is not None
    return latent_statistics(sample.model, sample.video) if sample.evaluated > feature_count(sample.model) else None


def _distance(videos: VideoSet) -> Distance | None:
    """The Frechet distance to the reference run's videos; None with too few of them."""
    if videos.reference is None:
        return None
    own, others = videos.recorded("features"), videos.reference.recorded("features")
    both = [key for key in own if key in others]
    # with fewer videos than features, the fitted distributions would be flat
    if not both or len(both) <= len(own[both[0]]):
        return None
    first, second = (np.array([features[key] for key in both]) for features in (own, others))
    return Distance(frechet_distance(first, second), resampled_distances(first, second), len(both))


def _diversity(files: Sequence[Path]) -> float:
    return diversity([torch.stack([thumbnail(frame[None] / 255)[0] for frame in mp4_frames(file)]) for file in files])


MEASURES = (
    Measure(
        name="diversity",
        heading="diversity",
        format="{:.4f}",
        better="up",
        per="prompt",
        compute=_diversity,
        note="Diversity: root mean square of the pixels' differences between videos of the same prompt, frames shrunk "
        f"to {THUMBNAIL}x{THUMBNAIL}; over prompts.",
        brief=False,
    ),
    Measure(
        name="frechet",
        heading="Frechet",
        format="{:.2f}",
        better="down",
        per="set",
        key="features",
        observe=_features,
        compute=_distance,
        note="Frechet: distance to the videos of {reference}, of normal distributions fitted to features of videos: "
        "mean and standard deviation of each channel of their latents, made by the model's own VAE, in units of the "
        "reference's standard deviation over videos.",
    ),
)
"""Measures of many videos together."""
