"""Videos as files: MP4 encoding and decoding, files that are written whole or not at all, labelled comparisons.

A video is a float tensor (frames, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

QUALITY = 14
"""Constant rate factor of H.264: 0 is lossless, 18 already looks so; small videos of few colours need better."""

ENCODER_OPTIONS = {"crf": str(QUALITY), "bf": "0"}
"""No B-frames: where x264 places them, and so the file, varied from run to run on the same frames (PyAV 18.1)."""

LABEL_HEIGHT = 28
"""Pixels of the strip above each video of a comparison."""

COMPARISON_HEIGHT = 288
"""Videos of a comparison are enlarged by whole factors as far as this, so that the labels fit."""

WIDEST = 4096
"""Pixels of a comparison's row at the most, where more than one video is wanted; players show no wider H.264."""


class OutputError(OSError):
    """A file that cannot be written."""


def encode_mp4(frames: Iterable[torch.Tensor], fps: int) -> bytes:
    """Encode frames as an H.264 MP4 that any player shows (4:2:0), in memory.

    Args:
        frames: a video, or anything that yields its frames (3, H, W) in [0, 1]; H and W are even.
        fps: frames a second.

    Returns:
        The file's bytes.

    Raises:
        ValueError: if there is no frame, or a frame's size is odd or unlike the first one's.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = None
        for frame in frames:
            pixels = _to_pixels(frame)
            height, width = pixels.shape[:2]
            if stream is None:
                if height % 2 or width % 2:
                    raise ValueError(f"`frames` must have an even height and width, got {height}x{width}.")
                stream = container.add_stream("libx264", rate=Fraction(fps), options=ENCODER_OPTIONS)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            if (height, width) != (stream.height, stream.width):
                raise ValueError(f"`frames` must all be {stream.height}x{stream.width}, got one of {height}x{width}.")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        if stream is None:
            raise ValueError("`frames` must hold at least one frame.")
        container.mux(stream.encode())
    return buffer.getvalue()


def read_mp4(path: str | Path) -> torch.Tensor:
    """Return the video in a file, (frames, 3, H, W) in [0, 1]."""
    return torch.stack(list(mp4_frames(path))).float() / 255


def mp4_frames(path: str | Path) -> Iterator[torch.Tensor]:
    """Yield the frames of the video in a file, (3, H, W) uint8, one after the other."""
    import av

    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)


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
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(_to_pixels(picture)).save(buffer, format="PNG")
    return buffer.getvalue()


def check_writable(path: str | Path) -> None:
    """Check, before hours are spent on it, that a file can be written here; the folder is made if missing.

    Raises:
        OutputError: saying why it cannot.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"`output` {path} is a folder; name a file in it.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"`output` {path} cannot be written: {error.strerror or error}.") from error


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Write all of these files, or none: each goes to a temporary file beside its place, then all are moved.

    Raises:
        OutputError: if one cannot be written, for example on a full disk. Nothing of them is left then.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in contents.items():
            temporary[path] = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, source in temporary.items():
            os.replace(source, path)
    except OSError as error:
        raise OutputError(f"`output` {path} cannot be written: {error.strerror or error}.") from error
    finally:
        for source in temporary.values():
            source.unlink(missing_ok=True)


def _to_pixels(frame: torch.Tensor) -> np.ndarray:
    pixels = (frame.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


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
