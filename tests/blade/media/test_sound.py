"""The sound track of a video: what is read is what was written, at its time."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from blade.media.sound import AAC_RATES, Sound, read_sound
from blade.media.video import encode_mp4, read_mp4, video_length

AAC_DELAY = 2048
"""Samples that FFmpeg's encoder may add in front or behind, to fill its first and last packets."""


def tone(rate: int, seconds: float = 1.0, channels: int = 2, hertz: tuple[float, ...] = (440.0, 880.0)) -> Sound:
    """A tone of its own in each channel."""
    times = torch.arange(int(rate * seconds)) / rate
    return Sound(torch.stack([0.5 * torch.sin(2 * math.pi * pitch * times) for pitch in hertz[:channels]]), rate)


def pitch(samples: torch.Tensor, rate: int) -> float:
    """The strongest frequency."""
    spectrum = torch.fft.rfft(samples * torch.hann_window(len(samples))).abs()
    return spectrum.argmax().item() * rate / len(samples)


def written(tmp_path: Path, sound: Sound, frames: int = 16, fps: int = 16) -> Path:
    path = tmp_path / "video.mp4"
    video = torch.rand(frames, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    path.write_bytes(encode_mp4(video, fps, sound))
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [24_000, 44_100, 48_000])
def test_each_channel_keeps_its_tone(tmp_path: Path, rate: int, channels: int) -> None:
    sound = tone(rate, channels=channels)
    heard = read_sound(written(tmp_path, sound))
    assert heard is not None and heard.rate == rate and len(heard.samples) == channels
    assert abs(heard.samples.shape[1] - sound.samples.shape[1]) <= AAC_DELAY
    for channel, expected in zip(heard.samples, (440.0, 880.0)):
        assert pitch(channel, rate) == pytest.approx(expected, rel=0.01)
    length = min(heard.samples.shape[1], sound.samples.shape[1]) - AAC_DELAY
    error = heard.samples[:, AAC_DELAY:length] - sound.samples[:, AAC_DELAY:length]
    assert error.square().mean().sqrt() < 0.02  # so it is in time too: a shift of one sample errs by 0.02 to 0.08


def test_a_rate_that_aac_has_not_is_raised_to_one_that_it_has(tmp_path: Path) -> None:
    heard = read_sound(written(tmp_path, tone(20_000)))
    assert heard is not None and heard.rate == 22_050
    assert pitch(heard.samples[0], heard.rate) == pytest.approx(440, rel=0.01)
    assert heard.samples.shape[1] / heard.rate == pytest.approx(1, abs=AAC_DELAY / 20_000)
    assert read_sound(written(tmp_path, tone(96_000))).rate == AAC_RATES[-1]


def test_the_video_is_the_same_with_sound_or_without(tmp_path: Path) -> None:
    path = written(tmp_path, tone(48_000))
    silent = tmp_path / "silent.mp4"
    silent.write_bytes(encode_mp4(torch.rand(16, 3, 32, 48, generator=torch.Generator().manual_seed(0)), 16))
    assert read_sound(silent) is None
    assert torch.equal(read_mp4(path), read_mp4(silent))
    assert video_length(path) == video_length(silent)


def test_sound_and_frames_stand_side_by_side_in_the_file(tmp_path: Path) -> None:
    """A player that streams the file needs no more than a second of one track before the other's."""
    path = written(tmp_path, tone(48_000, seconds=6.0), frames=96)
    with av.open(str(path)) as container:
        times = [
            (packet.stream.type, float(packet.dts * packet.time_base)) for packet in container.demux() if packet.size
        ]
    latest = {"video": 0.0, "audio": 0.0}
    for kind, time in times:
        latest[kind] = time
        assert abs(latest["video"] - latest["audio"]) < 1
    assert min(latest.values()) > 5.8


@pytest.mark.parametrize("seconds", [0.01, 0.4, 2.5])
def test_a_sound_of_another_length_is_kept_whole(tmp_path: Path, seconds: float) -> None:
    sound = tone(48_000, seconds)
    heard = read_sound(written(tmp_path, sound))
    assert heard is not None and 0 <= heard.samples.shape[1] - sound.samples.shape[1] <= AAC_DELAY


def test_encoding_is_repeatable() -> None:
    sound = Sound(torch.rand(2, 30_000, generator=torch.Generator().manual_seed(0)) - 0.5, 48_000)
    video = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = encode_mp4(video, 16, sound)
    for size in range(1000, 11_000, 1000):
        between = np.random.default_rng(size).random(size)
        assert encode_mp4(video, 16, sound) == first
        del between


def test_samples_beyond_the_range_are_clipped(tmp_path: Path) -> None:
    sound = tone(48_000)
    heard = read_sound(written(tmp_path, Sound(4 * sound.samples, sound.rate)))
    assert heard is not None and heard.samples.std() < 1 < (4 * sound.samples).std()


@pytest.mark.parametrize(
    ("samples", "rate", "problem"),
    [
        (torch.zeros(3, 10), 48_000, r"`samples` must be \(1 or 2, samples\), got shape \(3, 10\)"),
        (torch.zeros(10), 48_000, r"got shape \(10,\)"),
        (torch.zeros(1, 0), 48_000, r"got shape \(1, 0\)"),
        (torch.zeros(1, 10), 0, r"`rate` must be a whole number of samples a second, at least 1, got 0"),
        (torch.zeros(1, 10), 48e3, r"`rate` must be .*, got 48000.0"),
    ],
)
def test_what_is_no_sound_is_refused(samples: torch.Tensor, rate: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Sound(samples, rate)


def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    path.write_bytes(b"no sound")
    with pytest.raises(OSError, match=r"sound.mp4 cannot be read as a sound"):
        read_sound(path)
