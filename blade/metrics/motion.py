"""Motion in a video."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blade.metrics.measures import Measure, VideoSample

LEVELS = 3
"""Most levels of the image pyramid on which motion is followed, each half as large as the one before."""
SMALLEST_LEVEL = 16
"""Pixels on the shorter edge below which there are no further levels."""
WINDOW = 9
"""Edge in pixels of the window that moves as one."""
LEAST_CHANGE = 4 / 255
"""Change of brightness from frame to frame below which a pixel does not move."""


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
        earlier, later = pyramid[-1]
        pyramid.append((F.avg_pool2d(earlier, 2), F.avg_pool2d(later, 2)))
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


def _motion(sample: VideoSample) -> float:
    return motion(sample.video)


def _motion_ratio(sample: VideoSample) -> float | None:
    """Motion in units of the reference's; None where nothing moves there."""
    assert sample.reference is not None
    reference = sample.reference.once(_motion)
    return sample.once(_motion) / reference if reference > 0 else None


MEASURES = (
    Measure(
        name="motion",
        heading="motion",
        detail="pixels a frame",
        format="{:.2f}",
        compute=lambda sample: sample.once(_motion),
        brief=False,
        interval=False,
    ),
    Measure(
        name="motion_ratio",
        heading="motion to dense",
        format="{:.3f}",
        needs=("reference",),
        compute=_motion_ratio,
    ),
)
"""Measures of motion."""
