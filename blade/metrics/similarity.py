"""Similarity of one video to another."""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

import torch

from blade.metrics.measures import Measure, Panel, VideoSample

MAX_PSNR = 100.0
"""PSNR in dB of identical videos, so that averages and JSON stay finite."""


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of 8-bit frames in dB, from the mean squared error over the whole video.

    Args:
        video: (frames, channels, height, width) in [0, 1].
        reference: What it is compared with, of the same shape.

    Returns:
        At most `MAX_PSNR`, which is that of identical videos.

    Raises:
        ValueError: If the shapes differ or are not those of videos.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    first, second = _eight_bit(video, reference)
    return min(float(peak_signal_noise_ratio(first, second, data_range=255.0)), MAX_PSNR)


def psnr_by_frame(video: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """`psnr` of each frame by itself."""
    _eight_bit(video, reference)
    return [psnr(video[index : index + 1], reference[index : index + 1]) for index in range(len(video))]


def ssim(video: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity of 8-bit frames, averaged over the video; 1 for identical ones.

    The usual one, with a Gaussian window of 11 pixels and sigma 1.5. Source: Wang et al., IEEE TIP 13(4), 2004.

    Args:
        video: (frames, channels, height, width) in [0, 1], at least 11 pixels high and wide.
        reference: What it is compared with, of the same shape.

    Raises:
        ValueError: If the shapes differ or are not those of videos.
    """
    return fmean(ssim_by_frame(video, reference))


def ssim_by_frame(video: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """`ssim` of each frame by itself, one after the other, as the windows of all would take much memory."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarities = []
    for first, second in zip(*_eight_bit(video, reference)):
        similarity = structural_similarity_index_measure(first[None], second[None], data_range=255.0)
        assert isinstance(similarity, torch.Tensor)
        similarities.append(float(similarity))
    return similarities


def lpips(video: torch.Tensor, reference: torch.Tensor) -> float | None:
    """Learned perceptual distance, averaged over the video; 0 for identical ones.

    Source: Zhang et al., arXiv 1801.03924, with AlexNet, whose weights the package `lpips` downloads once.

    Args:
        video: (frames, 3, height, width) in [0, 1], at least 64 pixels high and wide.
        reference: What it is compared with, of the same shape.

    Returns:
        None where `lpips`, which the extra of that name brings, is not installed.

    Raises:
        ValueError: If the shapes differ or are not those of videos.
    """
    pairs = zip(*_eight_bit(video, reference))
    network = _lpips_network()
    if network is None:
        return None
    network.to(video.device)
    with torch.no_grad():
        return fmean(float(network(first[None] / 127.5 - 1, second[None] / 127.5 - 1)) for first, second in pairs)


@cache
def _lpips_network() -> Any:
    try:
        from lpips import LPIPS
    except ImportError:
        return None
    return LPIPS(net="alex", verbose=False).eval()


def _eight_bit(video: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            "`video` and `reference` must both be (frames, channels, height, width), got "
            f"{tuple(video.shape)} and {tuple(reference.shape)}."
        )
    first, second = ((255 * one.detach().float().clamp(0, 1)).round() for one in (video, reference))
    return first, second.to(first.device)


def _frame_similarities(sample: VideoSample) -> list[float]:
    return ssim_by_frame(sample.video, sample.reference_video)


MEASURES = (
    Measure(
        name="psnr",
        heading="PSNR",
        detail="dB",
        format="{:.2f}",
        better="up",
        needs=("reference",),
        compute=lambda sample: psnr(sample.video, sample.reference_video),
        by_frame=lambda sample: psnr_by_frame(sample.video, sample.reference_video),
        comparison=True,
        progress="PSNR {:.2f}".format,
        panel=Panel(label="PSNR to dense in dB", group="likeness"),
    ),
    Measure(
        name="ssim",
        heading="SSIM",
        format="{:.4f}",
        better="up",
        needs=("reference",),
        compute=lambda sample: fmean(sample.once(_frame_similarities)),
        by_frame=lambda sample: sample.once(_frame_similarities),
        comparison=True,
        panel=Panel(label="SSIM to dense", group="likeness"),
    ),
    Measure(
        name="lpips",
        heading="LPIPS",
        format="{:.4f}",
        better="down",
        needs=("reference",),
        compute=lambda sample: lpips(sample.video, sample.reference_video),
        extra="lpips",
    ),
)
"""Measures of how close a video is to its dense reference."""
