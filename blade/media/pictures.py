"""Pictures of videos: labelled comparisons side by side, contact sheets, PNG and animation encoding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from blade.media.video import to_pixels

LABEL_HEIGHT = 28
"""Pixels of the strip above each video of a comparison."""

COMPARISON_HEIGHT = 288
"""Videos of a comparison are enlarged by whole factors as far as this, so that the labels fit."""

WIDEST = 4096
"""Pixels of a comparison's row at the most, where more than one video is wanted; players show no wider H.264."""

ANIMATION_EXTENSIONS = (".webp", ".gif", ".apng")

ANIMATION_QUALITY = 90
"""Of WebP, from 0 to 100."""


def side_by_side(videos: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Lay videos of one size side by side, each under its label, in as many rows as it takes.

    Args:
        videos: label -> video, left to right.

    Returns:
        One video, enlarged by a whole factor where the videos are small.
    """
    panels = []
    for label, video in videos.items():
        factor = max(1, COMPARISON_HEIGHT // video.shape[-2])
        enlarged = functional.interpolate(video.float(), scale_factor=factor, mode="nearest")
        strip = _label_strip(label, enlarged.shape[-1]).expand(len(video), -1, -1, -1)
        panels.append(torch.cat([strip.to(enlarged), enlarged], dim=2))
    rows = math.ceil(len(panels) / max(1, WIDEST // panels[0].shape[-1]))
    columns = math.ceil(len(panels) / rows)
    panels += [torch.zeros_like(panels[0])] * (rows * columns - len(panels))
    return torch.cat([torch.cat(panels[row * columns : (row + 1) * columns], dim=3) for row in range(rows)], dim=2)


def contact_sheet(videos: Mapping[str, torch.Tensor], *, columns: int = 6, factor: int = 2) -> torch.Tensor:
    """Lay frames of each video, evenly spaced from its first to its last, in a row under its label.

    Args:
        videos: label -> video, top to bottom; all of one height and width.
        columns: frames of each video; at least 1, and no more than any video has.
        factor: by which frames are enlarged.

    Returns:
        One picture, (3, H, W) in [0, 1].

    Raises:
        ValueError: if there are more or fewer columns than that.
    """
    fewest = min(len(video) for video in videos.values())
    if not 1 <= columns <= fewest:
        raise ValueError(f"`columns` must be from 1 to {fewest}, the number of frames, got {columns}.")
    rows = []
    for label, video in videos.items():
        chosen = video[torch.linspace(0, len(video) - 1, columns).round().long()].float()
        row = torch.cat(list(functional.interpolate(chosen, scale_factor=factor, mode="nearest")), dim=-1)
        rows += [_label_strip(label, row.shape[-1]).to(row), row]
    return torch.cat(rows, dim=-2)


def encode_png(picture: torch.Tensor) -> bytes:
    """Encode a picture, (3, H, W) in [0, 1], as a PNG, in memory."""
    import imageio.v3 as iio

    return iio.imwrite("<bytes>", to_pixels(picture), plugin="pillow", extension=".png")


def encode_jpeg(picture: torch.Tensor, widest: int) -> bytes:
    """Encode a picture, (3, H, W) in [0, 1], as a JPEG of at most `widest` pixels across, in memory."""
    import imageio.v3 as iio

    return iio.imwrite("<bytes>", to_pixels(shrunk(picture[None], widest)[0]), plugin="pillow", extension=".jpg")


def shrunk(frames: torch.Tensor, widest: int) -> torch.Tensor:
    """Return frames, (frames, 3, H, W), that are at most `widest` pixels across."""
    height, width = frames.shape[-2:]
    if width <= widest:
        return frames
    return functional.interpolate(frames, size=(max(1, round(height * widest / width)), widest), mode="area")


def encode_animation(video: torch.Tensor, fps: float, extension: str = ".webp") -> bytes:
    """Encode a video as a picture that moves wherever pictures are shown, over and over.

    Args:
        video: (frames, 3, H, W) in [0, 1].
        fps: frames a second.
        extension: ".webp", ".gif" (256 colours a frame) or ".apng" (lossless).

    Returns:
        The file's bytes.

    Raises:
        ValueError: for another extension.
    """
    import imageio.v3 as iio

    if extension not in ANIMATION_EXTENSIONS:
        raise ValueError(f"`extension` must be one of {', '.join(ANIMATION_EXTENSIONS)}, got {extension!r}.")
    frames = np.stack([to_pixels(frame) for frame in video])
    options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0, "quality": ANIMATION_QUALITY}
    encoded: bytes = iio.imwrite("<bytes>", frames, plugin="pillow", extension=extension, **options)
    return encoded


@lru_cache(maxsize=256)
def _label_strip(label: str, width: int) -> torch.Tensor:
    """Return white text on black, (3, LABEL_HEIGHT, width), to be read only."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, LABEL_HEIGHT))
    draw = ImageDraw.Draw(image)
    size = LABEL_HEIGHT // 2
    while size > 6 and draw.textlength(label, font=ImageFont.load_default(size)) > width - 8:
        size -= 1
    draw.text((4, LABEL_HEIGHT // 2), label, fill="white", font=ImageFont.load_default(size), anchor="lm")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
