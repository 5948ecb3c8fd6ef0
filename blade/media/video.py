"""MP4 encoding and decoding.

A video is a float tensor (frames, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import gc
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

QUALITY = 14
"""Constant rate factor of H.264: 0 is lossless, 18 already looks so; small videos of few colours need better."""

ENCODER_OPTIONS = {"crf": str(QUALITY), "bf": "0", "x264-params": "mbtree=0"}
"""The same frames give the same file: without these, 1 of 30 to 1 of 150 encodings of a small video differed in some
bytes, on one thread too, by x264's assembly for macroblock trees (PyAV 18.1), and by where it placed B-frames.

imageio, which reads videos here, cannot write them: its PyAV plugin (2.38.1) passes no options to the encoder, neither
the rate factor nor the number of B-frames, and writes no sound.
"""


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
            pixels = to_pixels(frame)
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


def least_mp4_bytes(frames: int, height: int, width: int) -> int:
    """Return the bytes that an MP4 of `encode_mp4` hardly ever falls below, unless it shows nothing.

    The calmest videos of moving shapes take five times as many, filmed scenes more than twenty times.
    """
    return 1500 + frames * height * width // 200


def read_mp4(path: str | Path) -> torch.Tensor:
    """Return the video in a file, (frames, 3, H, W) in [0, 1]."""
    return torch.stack(list(mp4_frames(path))).float() / 255


def mp4_frames(path: str | Path) -> Iterator[torch.Tensor]:
    """Yield the frames of the video in a file, (3, H, W) uint8, one after the other."""
    import imageio.v3 as iio

    file = iio.imopen(str(path), "r", plugin="pyav")
    try:
        for pixels in file.iter():
            yield torch.from_numpy(pixels).permute(2, 0, 1)
    finally:
        with _only_new_garbage_collected():
            file.close()
            del file  # closes it once more


def to_pixels(frame: torch.Tensor) -> np.ndarray:
    pixels = (frame.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


@contextmanager
def _only_new_garbage_collected() -> Iterator[None]:
    """Let garbage collections inside pass over the objects that exist already.

    imageio 2.38.1 collects garbage whenever it closes a video: 0.25 s a time beside a loaded pipeline, where reading
    a small video takes 0.03 s.
    """
    if gc.get_freeze_count():  # the program has set objects aside itself, and `unfreeze` would bring them back
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
