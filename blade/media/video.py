"""MP4 encoding and decoding.

A video is a float tensor (frames, 3, H, W) in [0, 1].
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blade.media.sound import Sound, SoundTrack

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

QUALITY = 14
"""Constant rate factor of H.264: 0 is lossless, 18 already looks so; small videos of few colours need better."""

ENCODER_OPTIONS = {"crf": str(QUALITY), "bf": "0", "x264-params": "mbtree=0"}
"""The same frames give the same file: without these, 1 of 30 to 1 of 150 encodings of a small video differed in some
bytes, on one thread too, by x264's assembly for macroblock trees (PyAV 18.1), and by where it placed B-frames.

imageio cannot take PyAV's place here: its plugin (2.38.1) passes no options to the encoder, neither the rate factor
nor the number of B-frames, writes no sound, and gives neither times nor display matrices of the frames it reads.
"""

DISPLAY_MATRIX = "DISPLAYMATRIX"
"""PyAV's name of a frame's side data on how it is turned and mirrored."""

WIDEST_PIXEL = 8
"""Largest ratio of a pixel's edges that is believed: a file that says more is broken, or meant to fill the memory."""


def encode_mp4(frames: Iterable[torch.Tensor], fps: int, sound: Sound | None = None) -> bytes:
    """Encode frames as an H.264 MP4 that any player shows (4:2:0), in memory.

    Args:
        frames: a video, or anything that yields its frames (3, H, W) in [0, 1]; H and W are even.
        fps: frames a second.
        sound: the sound, which begins with the first frame and is encoded as AAC; None: the file has none.

    Returns:
        The file's bytes.

    Raises:
        ValueError: if there is no frame, or a frame's size is odd or unlike the first one's.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = track = None
        for number, frame in enumerate(frames):
            pixels = to_pixels(frame)
            height, width = pixels.shape[:2]
            if stream is None:
                if height % 2 or width % 2:
                    raise ValueError(f"`frames` must have an even height and width, got {height}x{width}.")
                stream = container.add_stream("libx264", rate=Fraction(fps), options=ENCODER_OPTIONS)
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                track = None if sound is None else SoundTrack(container, sound)
            if (height, width) != (stream.height, stream.width):
                raise ValueError(f"`frames` must all be {stream.height}x{stream.width}, got one of {height}x{width}.")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if track is not None:
                track.write(until=Fraction(number) / Fraction(fps))
        if stream is None:
            raise ValueError("`frames` must hold at least one frame.")
        container.mux(stream.encode())
        if track is not None:
            track.write()
    return buffer.getvalue()


def least_mp4_bytes(frames: int, height: int, width: int) -> int:
    """Return the bytes that an MP4 of `encode_mp4` hardly ever falls below, unless it shows nothing.

    The calmest videos of moving shapes take five times as many, filmed scenes more than twenty times.
    """
    return 1500 + frames * height * width // 200


def read_mp4(path: str | Path) -> torch.Tensor:
    """Return the video in a file, (frames, 3, H, W) in [0, 1]: for small ones, as it is all in memory."""
    return torch.stack(list(mp4_frames(path))).float() / 255


def mp4_frames(path: str | Path) -> Iterator[torch.Tensor]:
    """Yield the frames of the video in a file as players show them, (3, H, W) uint8, one after the other.

    Args:
        path: an MP4, or whatever else FFmpeg reads. What its display matrix says is done (a telephone's videos are
            turned, and mirrored), and pixels that are no squares are made such.

    Raises:
        OSError: if there is no such video.
    """
    for _, show in _timed_frames(path):
        yield show()


def frames_at(path: str | Path, fps: float, count: int) -> Iterator[torch.Tensor]:
    """Yield those frames of the video in a file that are nearest to 0, 1, 2, ... `fps`-ths of a second.

    So what moves keeps its speed, whatever the video's own rate, also one that varies. One frame is held at a time.

    Args:
        path: see `mp4_frames`; so are the frames.
        fps: frames a second.
        count: how many; beyond the video's end its last frame is repeated.

    Raises:
        OSError: if there is no such video.
    """
    taken, before, latest = 0, Fraction(0), None
    for time, show in _timed_frames(path):
        while latest is not None and taken < count and taken / Fraction(fps) <= (before + time) / 2:
            yield latest()
            taken += 1
        if taken == count:
            return
        before, latest = time, show
    while latest is not None and taken < count:
        yield latest()
        taken += 1


@dataclass(frozen=True, kw_only=True)
class VideoLength:
    """Length of a video in a file."""

    frames: int
    """Frames in the file."""
    seconds: Fraction
    """From its first frame to the end of its last."""

    @property
    def fps(self) -> float:
        """Frames a second, in the mean."""
        return float(self.frames / self.seconds)

    def count_at(self, fps: float) -> int:
        """Return how many frames it has at another rate; see `frames_at`."""
        return max(round(self.seconds * Fraction(fps)), 1)


def video_length(path: str | Path) -> VideoLength:
    """Return the length of the video in a file. Its packets are counted, and none is decoded.

    Args:
        path: see `mp4_frames`.

    Raises:
        OSError: if there is no such video.
    """
    with _opened(path) as (container, stream):
        duration = _frame_duration(stream)
        frames, ends, starts = 0, Fraction(0), None
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:  # the last one is empty; others are cut off by an edit list
                continue
            base = packet.time_base
            time = frames * duration if packet.pts is None or base is None else packet.pts * base
            own = packet.duration * base if packet.duration and base is not None else duration
            starts, ends = time if starts is None else min(starts, time), max(ends, time + own)
            frames += 1
    if starts is None:
        raise OSError(f"{path} has no frame.")
    return VideoLength(frames=frames, seconds=ends - starts)


def to_pixels(frame: torch.Tensor) -> np.ndarray:
    pixels = (frame.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy())


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the first video of a file."""
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise OSError(f"{path} has no video")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        raise OSError(f"{path} cannot be read as a video: {error}") from error


def _timed_frames(path: str | Path) -> Iterator[tuple[Fraction, Callable[[], torch.Tensor]]]:
    """Yield, for each frame of a file, the seconds from the first to it, and a function that returns its pixels."""
    with _opened(path) as (container, stream):
        duration, aspect, start = _frame_duration(stream), stream.sample_aspect_ratio, None
        for number, frame in enumerate(container.decode(stream)):
            base = frame.time_base
            time = number * duration if frame.pts is None or base is None else frame.pts * base
            start = time if start is None else start
            yield time - start, partial(_shown_pixels, frame, aspect)


def _frame_duration(stream: VideoStream) -> Fraction:
    """Seconds of a frame of a stream, as far as it says so."""
    return 1 / (stream.average_rate or stream.guessed_rate or Fraction(25))


def _shown_pixels(frame: VideoFrame, aspect: Fraction | None) -> torch.Tensor:
    """Return a decoded frame as players show it, (3, H, W) uint8; its pixels are `aspect` times as wide as high."""
    if aspect is None or not 1 / WIDEST_PIXEL <= aspect <= WIDEST_PIXEL:
        aspect = Fraction(1)
    pixels = frame.to_ndarray(format="rgb24", width=round(frame.width * aspect))
    matrix: Any = frame.side_data.get(DISPLAY_MATRIX)  # PyAV's types say a string
    if matrix is not None:
        pixels = _displayed(pixels, np.frombuffer(matrix, dtype=np.int32).reshape(3, 3))
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)


def _displayed(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror pixels (H, W, 3) by a display matrix, to the nearest quarter of a turn.

    The pixel at (x, y) is shown at (a x + c y, b x + d y), up to a shift. Source: FFmpeg, libavutil/display.h.
    """
    (a, b), (c, d) = matrix[:2, :2]
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
