"""Videos as files and pictures: what is read is what was written."""

from __future__ import annotations

import gc
import io
import itertools
import os
import struct
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blade.media import video
from blade.media.pictures import LABEL_HEIGHT, contact_sheet, encode_animation, encode_png, side_by_side
from blade.media.video import encode_mp4, frames_at, mp4_frames, read_mp4, video_length


def gradient_video(frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """A smooth video that moves, so that 4:2:0 loses little."""
    rows = torch.linspace(0, 1, height)[:, None].expand(height, width)
    columns = torch.linspace(0, 1, width).expand(height, width)
    times = torch.linspace(0, 1, frames)
    return torch.stack([torch.stack([rows, columns, torch.full_like(rows, t)]) for t in times.tolist()])


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    video = gradient_video()
    path = tmp_path / "video.mp4"
    path.write_bytes(encode_mp4(video, fps=16))
    seen = read_mp4(path)
    assert seen.shape == video.shape
    # quantisation to 8 bits in YUV and QUALITY's losses; a frame or channel mixed up would be 0.2 off
    assert (seen - video).abs().mean() < 0.02


@pytest.mark.parametrize(("height", "width"), [(32, 48), (98, 130), (2, 2)])
def test_frames_are_those_that_pyav_decodes(tmp_path: Path, height: int, width: int) -> None:
    """Also where FFmpeg pads the lines of a frame."""
    import av

    path = tmp_path / "video.mp4"
    noise = torch.rand(5, 3, height, width, generator=torch.Generator().manual_seed(0))
    path.write_bytes(encode_mp4(noise, fps=16))
    with av.open(str(path)) as container:
        decoded = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    frames = list(mp4_frames(path))
    assert len(frames) == len(decoded) == 5
    assert all(frame.dtype == torch.uint8 for frame in frames)
    assert all(torch.equal(frame, other.permute(2, 0, 1)) for frame, other in zip(frames, decoded))


def test_frames_are_read_one_after_the_other(tmp_path: Path) -> None:
    """The file is open while its frames are taken, and closed where no more are wanted."""
    whole = encode_mp4(torch.rand(60, 3, 64, 64, generator=torch.Generator().manual_seed(0)), fps=16)
    path = tmp_path / "video.mp4"
    path.write_bytes(whole)
    opened = len(os.listdir("/dev/fd"))
    frames = mp4_frames(path)
    first = list(itertools.islice(frames, 3))
    assert len(first) == 3 and len(os.listdir("/dev/fd")) == opened + 1
    frames.close()
    assert len(os.listdir("/dev/fd")) == opened
    assert torch.equal(first[2], list(mp4_frames(path))[2])


def test_reading_does_not_collect_the_garbage_of_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would take longer than the reading itself beside a loaded pipeline."""
    path = tmp_path / "video.mp4"
    path.write_bytes(encode_mp4(gradient_video(), fps=16))
    walked, collect = [], gc.collect

    def collecting(*generation: int) -> int:
        walked.append(len(gc.get_objects()))
        return collect(*generation)

    everything = len(gc.get_objects())
    monkeypatch.setattr(gc, "collect", collecting)
    assert len(list(mp4_frames(path))) == 5
    next(mp4_frames(path))
    assert all(number < everything / 10 for number in walked)
    assert gc.get_freeze_count() == 0, "the program's objects are set aside for good"


def numbered_video(path: Path, times: list[int], *, aspect: Fraction = Fraction(1)) -> None:
    """Write gray frames 0, 10, 20, ... that are shown at times in milliseconds; the last one for 100 ms."""
    import av

    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"crf": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt, stream.time_base = 32, 48, "yuv444p", Fraction(1, 1000)
        stream.sample_aspect_ratio = aspect
        packets = []
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((32, 48, 3), 10 * number % 250, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet, (time, following) in zip(
            [*packets, *stream.encode()], itertools.pairwise([*times, times[-1] + 100]), strict=True
        ):
            packet.duration = following - time
            container.mux(packet)


def numbers(frames: Iterable[torch.Tensor]) -> list[int]:
    """Return the numbers of the frames that `numbered_video` wrote."""
    return [round(float(frame.float().mean()) / 10) for frame in frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_are_taken_by_their_times(tmp_path: Path, suffix: str) -> None:
    """Ten frames a second, then five: a second and a half, in which the motion keeps its speed at any rate."""
    path = tmp_path / f"video.{suffix}"
    numbered_video(path, [0, 100, 200, 300, 400, 500, 700, 900, 1100, 1300, 1400])
    length = video_length(path)
    assert length.frames == 11 and float(length.seconds) == pytest.approx(1.5, abs=0.002)
    assert [length.count_at(fps) for fps in (10, 5, 20, 1)] == [15, 8, 30, 2]
    assert numbers(frames_at(path, 10, 15)) == [0, 1, 2, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 10]
    assert numbers(frames_at(path, 5, 8)) == [0, 2, 4, 5, 6, 7, 8, 10]
    assert numbers(frames_at(path, 20, 5)) == [0, 0, 1, 1, 2]
    assert numbers(frames_at(path, 10, 17))[-3:] == [10, 10, 10]


@pytest.mark.parametrize(("fps", "kept"), [(24, 24), (30, 30), (Fraction(30000, 1001), 30), (16, 16)])
def test_at_the_videos_own_rate_every_frame_is_taken_once(tmp_path: Path, fps: Fraction | int, kept: int) -> None:
    """Also where times are rounded to milliseconds, and where the rate is no whole number."""
    path = tmp_path / "video.mkv"
    numbered_video(path, [round(1000 * number / fps) for number in range(20)])
    assert numbers(frames_at(path, kept, 18)) == list(range(18))


def test_only_the_frames_that_are_wanted_are_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, converted, convert = tmp_path / "video.mp4", [], video._shown_pixels
    numbered_video(path, [10 * number for number in range(200)])
    monkeypatch.setattr(video, "_shown_pixels", lambda *given: converted.append(given) or convert(*given))
    assert numbers(frames_at(path, 10, 3)) == [0, 10, 20]
    assert len(converted) == 3
    assert video_length(path).frames == 200
    assert len(converted) == 3


CORNERS = {
    "as it is": ((1, 0, 0, 1), "top left"),
    "a quarter clockwise": ((0, 1, -1, 0), "top right"),
    "a half": ((-1, 0, 0, -1), "bottom right"),
    "a quarter counterclockwise": ((0, -1, 1, 0), "bottom left"),
    "mirrored": ((-1, 0, 0, 1), "top right"),
    "upside down": ((1, 0, 0, -1), "bottom left"),
    "mirrored at the diagonal": ((0, 1, 1, 0), "top left"),
}
"""Display matrices, and where they show the corner that is top left in the file."""


@pytest.mark.parametrize("turn", CORNERS)
def test_frames_are_turned_and_mirrored_as_the_file_says(tmp_path: Path, turn: str) -> None:
    """As telephones write them. The mark is 8 pixels high and 16 wide in the file."""
    (a, b, c, d), corner = CORNERS[turn]
    frames = torch.zeros(5, 3, 32, 48)
    frames[:, :, :8, :16] = 1
    whole = encode_mp4(frames, fps=8)
    start = whole.index(b"tkhd") + 44  # of the track's matrix, 16.16 fixed point
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(whole[:start] + matrix + whole[start + 36 :])
    (shown,) = {frame.shape for frame in mp4_frames(path)}
    assert shown == ((3, 32, 48) if b == 0 else (3, 48, 32))
    bright = next(frames_at(path, 8, 1))[0] > 127
    rows, columns = (bright.nonzero()[:, axis] for axis in (0, 1))
    assert (len(rows.unique()), len(columns.unique())) == ((8, 16) if b == 0 else (16, 8))
    assert corner == f"{'top' if 0 in rows else 'bottom'} {'left' if 0 in columns else 'right'}"


@pytest.mark.parametrize(("aspect", "width"), [(Fraction(4, 3), 64), (Fraction(1, 2), 24), (Fraction(30000), 48)])
def test_pixels_are_made_square(tmp_path: Path, aspect: Fraction, width: int) -> None:
    """Unless they are said to be wider than any screen's."""
    path = tmp_path / "video.mp4"
    numbered_video(path, [0, 100], aspect=aspect)
    assert next(mp4_frames(path)).shape == (3, 32, width)


def test_a_file_of_sound_alone_is_no_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "sound.m4a"
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for read in (read_mp4, video_length):
        with pytest.raises(OSError, match=r"sound.m4a has no video"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"no video", None])
def test_a_file_that_is_no_video_is_an_error_of_the_system(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "video.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError):
        read_mp4(path)


def test_the_frame_rate_is_in_the_file(tmp_path: Path) -> None:
    import av

    path = tmp_path / "video.mp4"
    path.write_bytes(encode_mp4(gradient_video(frames=10), fps=5))
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 5
        assert container.duration == pytest.approx(2_000_000, rel=0.01)


def test_encoding_is_repeatable() -> None:
    # noise, since only frames that need many bits showed x264's differences, and other memory every time
    video = torch.rand(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    first = encode_mp4(video, fps=16)
    for size in range(1000, 31_000, 1000):
        between = np.random.default_rng(size).random(size)
        assert encode_mp4(video, fps=16) == first
        del between


@pytest.mark.slow
def test_moving_objects_are_encoded_alike_every_time() -> None:
    # 1 of 30 to 1 of 150 encodings differed with x264's macroblock trees, by what else the machine did
    rows, columns = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
    ball = torch.full((33, 3, 96, 96), 0.8)
    for number, frame in enumerate(ball):
        frame[:, (columns - 20 - 1.7 * number) ** 2 + (rows - 48) ** 2 < 144] = torch.tensor([[0.9], [0.1], [0.1]])
    for seed in range(8):
        video = ball + 0.02 * torch.randn(ball.shape, generator=torch.Generator().manual_seed(seed))
        files = set()
        for number in range(40):
            between = torch.rand(17_000 * (number % 7 + 1))
            files.add(encode_mp4(video, fps=16))
            del between
        assert len(files) == 1


def test_values_beyond_the_range_are_clamped(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(encode_mp4(torch.full((2, 3, 16, 16), 1.7), fps=16))
    assert read_mp4(path).min() > 0.97


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        (torch.zeros(0, 3, 16, 16), "at least one frame"),
        (torch.zeros(2, 3, 15, 16), "even height and width, got 15x16"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 16, 32)], "all be 16x16, got one of 16x32"),
    ],
)
def test_unsuitable_frames_are_refused(frames, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        encode_mp4(frames, fps=16)


def test_side_by_side_keeps_both_videos_under_their_labels() -> None:
    left, right = gradient_video(), gradient_video().flip(0)
    both = side_by_side({"dense": left, "asa": right})
    factor = both.shape[-1] // 2 // left.shape[-1]
    assert factor >= 2
    height = left.shape[-2] * factor
    strip, videos = both[..., :-height, :], both[..., -height:, :]
    torch.testing.assert_close(videos[..., ::factor, ::factor], torch.cat([left, right], dim=-1))
    # each label is bright text on black, and they differ
    halves = strip.chunk(2, dim=-1)
    assert all(half.max() > 0.9 and half.min() == 0 and half.mean() < 0.4 for half in halves)
    assert not torch.equal(*halves)
    assert both.shape[-2] % 2 == both.shape[-1] % 2 == 0


def test_many_videos_take_several_rows_of_the_same_length() -> None:
    videos = {f"run {number}": torch.full((1, 3, 288, 1200), (number + 1) / 10) for number in range(5)}
    grid = side_by_side(videos)
    panel = LABEL_HEIGHT + 288
    assert grid.shape == (1, 3, 2 * panel, 3600)
    middles = grid[0, 0, LABEL_HEIGHT + 144 :: panel, 600::1200]
    torch.testing.assert_close(middles, torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))
    assert side_by_side({"wide": torch.zeros(1, 3, 288, 5000)}).shape[-1] == 5000


def test_a_long_label_is_made_to_fit() -> None:
    both = side_by_side({"asa-gt, density 0.123456789, of a run that is long": torch.zeros(1, 3, 288, 300)})
    assert both[..., -3:].max() == 0, "the label runs into the border"
    assert both.max() > 0.9


def test_a_contact_sheet_shows_evenly_spaced_frames_in_rows() -> None:
    videos = {
        name: torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 16, 24) / part
        for part, name in ((1, "a"), (2, "b"))
    }
    sheet = contact_sheet(videos, columns=3, factor=2)
    assert sheet.shape == (3, 2 * (LABEL_HEIGHT + 32), 3 * 48)
    first = sheet[0, LABEL_HEIGHT + 16, 24::48]
    assert torch.allclose(first, torch.tensor([0.0, 0.5, 1.0]))
    assert torch.allclose(sheet[0, -16, 24::48], first / 2)
    pixels = np.asarray(Image.open(io.BytesIO(encode_png(sheet))))
    assert pixels.shape == (*sheet.shape[1:], 3) and pixels[LABEL_HEIGHT + 16, -1, 0] == 255
    with pytest.raises(ValueError, match="`columns` must be from 1 to 9, the number of frames, got 10"):
        contact_sheet(videos, columns=10)


def test_a_png_holds_every_value() -> None:
    values = torch.arange(256).repeat(3).view(3, 16, 16) / 255
    png = encode_png(values)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), (values * 255).round().byte().permute(1, 2, 0))
    assert png.startswith(b"\x89PNG")


@pytest.mark.parametrize(("extension", "loses"), [(".webp", 0.03), (".gif", 0.1), (".apng", 1 / 510)])
def test_an_animation_has_all_frames_at_their_rate_for_ever(extension: str, loses: float) -> None:
    video = gradient_video(frames=4)
    picture = Image.open(io.BytesIO(encode_animation(video, fps=8, extension=extension)))
    assert picture.n_frames == 4 and picture.size == (48, 32)
    assert picture.info["loop"] == 0
    for number, frame in enumerate(video):
        picture.seek(number)
        shown = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
        assert (shown - frame).abs().mean() <= loses, number
        assert picture.info["duration"] == pytest.approx(125, abs=6)  # GIF counts in hundredths of a second


def test_an_animation_in_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`extension` must be one of \.webp, \.gif, \.apng, got '\.mp4'"):
        encode_animation(gradient_video(), fps=8, extension=".mp4")
