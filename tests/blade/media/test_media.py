"""Videos as files: what is read is what was written, and nothing half-written is ever left."""

from __future__ import annotations

import errno
import io
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blade.common.files import OutputError, check_writable, write_files
from blade.media.pictures import LABEL_HEIGHT, contact_sheet, encode_png, side_by_side
from blade.media.video import encode_mp4, read_mp4


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


def test_files_are_written_whole_with_ordinary_permissions(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.touch()
    write_files({tmp_path / "a.mp4": b"video", tmp_path / "a.json": b"{}"})
    assert (tmp_path / "a.mp4").read_bytes() == b"video"
    assert (tmp_path / "a.mp4").stat().st_mode == reference.stat().st_mode
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "a.mp4", "reference"]


def test_a_full_disk_leaves_nothing_of_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"of an earlier run")
    real, calls = os.fsync, []

    def full_at_the_second(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second)
    with pytest.raises(OutputError, match=r"a\.json cannot be written: No space left on device"):
        write_files({tmp_path / "a.mp4": b"video", tmp_path / "a.json": b"{}"})
    assert [item.name for item in tmp_path.iterdir()] == ["a.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == b"of an earlier run"


def test_a_write_that_the_system_cuts_short_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OutputError, match=r"a\.mp4 cannot be written: File too large"):
            write_files({tmp_path / "a.mp4": bytes(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_files({tmp_path / "a.mp4": b"video"})
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_is_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder" / "a.mp4")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize("name", ["file/a.mp4", "folder", "/proc/a.mp4", "/dev/null/a.mp4"])
def test_an_unwritable_output_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"`output` .*(cannot be written|is a folder)"):
        check_writable(tmp_path / name)
