"""The sound of a video: its encoding beside the frames, and reading it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import OutputContainer
    from av.packet import Packet

LAYOUTS = {1: "mono", 2: "stereo"}
"""FFmpeg's layouts by the number of channels."""

AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
"""Samples a second that every player of AAC in MP4 knows. Source: ISO/IEC 14496-3, table 1.18, up to 48 kHz."""

BITS = 96_000
"""Bits a second of each channel; FFmpeg's own encoder of AAC is transparent there for most sounds."""

PIECE = 1024
"""Samples of a packet of AAC."""


@dataclass(frozen=True, eq=False)
class Sound:
    """The sound of a video.

    Raises:
        ValueError: if the samples have another shape, or the rate is not positive.
    """

    samples: torch.Tensor
    """(channels, samples), float32 on the CPU, in [-1, 1]; one channel or two."""
    rate: int
    """Samples a second."""

    def __post_init__(self) -> None:
        shape = tuple(self.samples.shape)
        if len(shape) != 2 or shape[0] not in LAYOUTS or not shape[1]:
            raise ValueError(f"`samples` must be (1 or 2, samples), got shape {shape}.")
        if isinstance(self.rate, bool) or not isinstance(self.rate, int) or self.rate < 1:
            raise ValueError(f"`rate` must be a whole number of samples a second, at least 1, got {self.rate!r}.")

    @property
    def seconds(self) -> float:
        """Length."""
        return self.samples.shape[1] / self.rate


class SoundTrack:
    """The track of a sound in a file that is being written; its packets are made as the video's time goes on."""

    def __init__(self, container: OutputContainer, sound: Sound) -> None:
        """Add the track to a file, as AAC; at a rate that AAC has not, at the next higher one that it has.

        Args:
            container: the file, in which nothing was written yet.
            sound: the sound; samples beyond [-1, 1] are clipped.
        """
        from av import AudioResampler

        self._container, self._sound = container, sound
        layout = LAYOUTS[len(sound.samples)]
        rate = next((known for known in AAC_RATES if known >= sound.rate), AAC_RATES[-1])
        self._stream: AudioStream = container.add_stream("aac", rate=rate, layout=layout)
        self._stream.bit_rate = BITS * len(sound.samples)
        self._resampler = AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=PIECE)
        self._written = 0
        self._ended = False

    def write(self, until: Fraction | None = None) -> None:
        """Write the sound up to a time of the video, in seconds; None: all that is left."""
        for packet in self._packets(until):
            self._container.mux(packet)

    def _packets(self, until: Fraction | None) -> Iterator[Packet[AudioStream]]:
        from av import AudioFrame

        samples, rate = self._sound.samples, self._sound.rate
        length = samples.shape[1]
        while self._written < length and (until is None or Fraction(self._written, rate) <= until):
            part = samples[:, self._written : self._written + PIECE].detach().float().clamp(-1, 1).cpu().numpy()
            frame = AudioFrame.from_ndarray(np.ascontiguousarray(part), format="fltp", layout=LAYOUTS[len(samples)])
            frame.sample_rate, frame.pts, frame.time_base = rate, self._written, Fraction(1, rate)
            self._written += part.shape[1]
            for ready in self._resampler.resample(frame):
                yield from self._stream.encode(ready)
        if until is None and not self._ended:
            self._ended = True
            for ready in self._resampler.resample(None):
                yield from self._stream.encode(ready)
            yield from self._stream.encode(None)


def read_sound(path: str | Path) -> Sound | None:
    """Return the sound of a file, from the beginning of its first track; None if it has none.

    Args:
        path: an MP4, or whatever else FFmpeg reads.

    Raises:
        OSError: if the file cannot be read.
    """
    import av

    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                return None
            stream = container.streams.audio[0]
            resampler = av.AudioResampler(format="fltp", layout="mono" if stream.channels == 1 else "stereo")
            parts = [
                ready.to_ndarray()
                for frame in (*container.decode(stream), None)
                for ready in resampler.resample(frame)
            ]
            rate = int(stream.rate)
    except av.FFmpegError as error:
        raise OSError(f"{path} cannot be read as a sound: {error}") from error
    return Sound(torch.from_numpy(np.concatenate(parts, axis=1)), rate) if parts else None
