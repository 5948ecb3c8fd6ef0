"""Measures of one video against another, and of the motion in one."""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F

MAX_PSNR = 100.0
"""PSNR in dB of identical videos, so that averages and JSON stay finite."""

LEVELS = 3
"""Most levels of the image pyramid on which motion is followed, each half as large as the one before."""
SMALLEST_LEVEL = 16
"""Pixels on the shorter edge below which there are no further levels."""
WINDOW = 9
"""Edge in pixels of the window that moves as one."""
LEAST_CHANGE = 4 / 255
"""Change of brightness from frame to frame below which a pixel does not move."""


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
    with torch.no_grad():
        return fmean(float(network(first[None] / 127.5 - 1, second[None] / 127.5 - 1)) for first, second in pairs)


@cache
def _lpips_network() -> Any:
    try:
        from lpips import LPIPS
    except ImportError:
        return None
    return LPIPS(net="alex", verbose=False).eval()


def motion(video: torch.Tensor) -> float:
    """Mean displacement of what moves, in pixels a frame; 0 where nothing does.

    Optical flow between consecutive frames, averaged over pixels with the square of their change of brightness as
    weight, so that a still background does not count. Source of the flow: Lucas and Kanade, IJCAI 1981, iterated from
    coarse to fine. It follows up to about four pixels a frame; along straight edges it sees only what is across them.

    Args:
        video: (frames, channels, height, width) in [0, 1].

    Raises:
        ValueError: If this is no video.
    """
    if video.ndim != 4:
        raise ValueError(f"`video` must be (frames, channels, height, width), got {tuple(video.shape)}.")
    brightness = video.detach().float().clamp(0, 1).mean(1, keepdim=True)
    before, after = brightness[:-1], brightness[1:]
    change = (after - before).square()
    weight = torch.where(change >= LEAST_CHANGE**2, change, 0)
    if not bool(weight.any()):
        return 0.0
    speed = optical_flow(before, after).norm(dim=1, keepdim=True)
    return float((weight * speed).sum() / weight.sum())


def optical_flow(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Displacement (x, y) in pixels, (pairs, 2, height, width), that takes `before` to `after`, both one-channel."""
    pyramid = [(before, after)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST_LEVEL:
        pyramid.append(tuple(F.avg_pool2d(image, 2) for image in pyramid[-1]))
    flow = torch.zeros(before.shape[0], 2, *pyramid[-1][0].shape[-2:], device=before.device)
    for earlier, later in reversed(pyramid):
        if flow.shape[-2:] != earlier.shape[-2:]:
            flow = 2 * F.interpolate(flow, size=earlier.shape[-2:], mode="bilinear", align_corners=False)
        for _ in range(3):
            flow = flow + _flow_step(earlier, _shifted(later, flow))
    return flow


def _flow_step(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """One least-squares step: in each window, slope * displacement = -change."""
    padded = F.pad((before + after) / 2, (1, 1, 1, 1), mode="replicate")
    slope_x = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    slope_y = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    change = after - before
    products = torch.cat(
        (slope_x * slope_x, slope_x * slope_y, slope_y * slope_y, slope_x * change, slope_y * change), dim=1
    )
    for size, padding in (((WINDOW, 1), (WINDOW // 2, 0)), ((1, WINDOW), (0, WINDOW // 2))):
        products = F.avg_pool2d(products, size, 1, padding, count_include_pad=False)
    xx, xy, yy, xt, yt = products.split(1, dim=1)
    # what the window does not determine stays as it is
    steady = 1e-5 + 0.01 * (xx + yy)
    xx, yy = xx + steady, yy + steady
    determinant = xx * yy - xy * xy
    step = torch.cat(((xy * yt - yy * xt) / determinant, (xy * xt - xx * yt) / determinant), dim=1)
    return step.clamp(-1, 1)


def _shifted(image: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """The image as seen by points that moved along the flow."""
    height, width = image.shape[-2:]
    x = torch.arange(width, device=image.device) + flow[:, 0] + 0.5
    y = torch.arange(height, device=image.device)[:, None] + flow[:, 1] + 0.5
    grid = torch.stack((2 * x / width - 1, 2 * y / height - 1), dim=-1)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _eight_bit(video: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if video.ndim != 4 or video.shape != reference.shape:
        raise ValueError(
            "`video` and `reference` must both be (frames, channels, height, width), got "
            f"{tuple(video.shape)} and {tuple(reference.shape)}."
        )
    first, second = ((255 * one.detach().float().clamp(0, 1)).round() for one in (video, reference))
    return first, second.to(first.device)
