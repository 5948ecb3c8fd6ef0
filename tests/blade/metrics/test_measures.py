from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blade.media.video import encode_mp4
from blade.metrics import registry
from blade.metrics.distribution import Distance
from blade.metrics.estimates import Values
from blade.metrics.measures import Measure, VideoSample, VideoSet, record_video
from blade.metrics.registry import choose_measures, compare_videos, describe_comparison, measures
from blade.metrics.similarity import psnr, ssim
from blade.moving_shapes.captions import parse_caption

CAPTION = "a red ball moving left"
OWN = {
    "layer_density": "layer density", "run_density": "run density", "psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS",
    "motion": "motion", "motion_ratio": "motion to dense", "colour": "colour", "shape": "shape",
    "direction": "direction", "size": "size", "fill": "fill", "speed": "speed", "background": "background",
    "count": "count", "basics": "basics", "all_attributes": "all", "realism_error": "realism error",
    "diversity": "diversity", "frechet": "Frechet", "seconds_denoising": "seconds",
}  # fmt: skip
FACTS = ["layer_density", "run_density", "seconds_denoising"]

BRIGHTNESS = Measure(name="brightness", heading="brightness", compute=lambda sample: float(sample.video.mean()))


def shade(value: float, frames: int = 2) -> torch.Tensor:
    return torch.full((frames, 3, 64, 64), value)


def test_the_own_measures_in_the_order_of_columns():
    assert {name: measure.heading for name, measure in measures().items()} == OWN
    assert list(measures()) == list(OWN)
    better = {name: measure.better for name, measure in measures().items()}
    assert better["psnr"] == better["basics"] == "up"
    assert better["lpips"] == better["realism_error"] == better["frechet"] == better["seconds_denoising"] == "down"
    assert {measure.per for measure in measures().values()} == {"video", "prompt", "set"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Two words"}, "`name` must be of lower-case letters, digits and underscores, got 'Two words'"),
        ({"better": "left"}, r"`better` of `brightness` must be one of \(None, 'up', 'down'\), got 'left'"),
        ({"per": "frame"}, "`per` of `brightness` must be one of .*'video', 'prompt', 'set'.*, got 'frame'"),
        ({"needs": ("luck",)}, r"`needs` of `brightness` must be of reference, caption, got \('luck',\)"),
        ({"per": "set", "compute": None}, "`compute` of `brightness` must be given, as it is measured per set"),
        ({"comparison": True, "per": "set"}, "`comparison` of `brightness` must be False"),
        ({"comparison": True, "needs": ("caption",)}, "`comparison` of `brightness` must be False"),
        ({"format": "{:.3q}"}, "`format` of `brightness` must fit a number, got '{:.3q}'"),
        ({"format": "{mean}"}, "`format` of `brightness` must fit a number, got '{mean}'"),
    ],
)
def test_bad_declarations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(BRIGHTNESS, **changes)


def test_a_video_is_recorded_by_what_measures_need():
    reference = VideoSample(video=shade(0.5), prompt=CAPTION)
    sample = VideoSample(video=shade(0.4), prompt=CAPTION, reference=reference, caption=parse_caption(CAPTION))
    near = replace(
        BRIGHTNESS,
        name="ratio",
        needs=("reference",),
        compute=lambda sample: float(sample.video.mean() / sample.reference_video.mean()),
        by_frame=lambda sample: (sample.video / sample.reference_video).mean((1, 2, 3)).tolist(),
    )
    told = replace(BRIGHTNESS, name="told", needs=("caption",), compute=lambda sample: len(sample.caption.objects))
    chosen = (*choose_measures([]), BRIGHTNESS, near, told)
    record = record_video(chosen, sample)
    assert record == {
        "brightness": pytest.approx(0.4),
        "ratio": pytest.approx(0.8),
        "ratio_by_frame": pytest.approx([0.8, 0.8]),
        "told": 1,
    }
    with pytest.raises(ValueError, match="`needs` must hold reference"):
        replace(near, needs=()).recorded(replace(sample, reference=None))
    alone = record_video(chosen, replace(sample, reference=None, caption=None))
    assert alone == {"brightness": pytest.approx(0.4), "ratio": None, "ratio_by_frame": None}


def test_measures_that_share_a_field_compute_it_once():
    calls = []

    def marks(sample: VideoSample) -> dict[str, bool]:
        calls.append(sample.prompt)
        return {"left": True, "right": False}

    left, right = (
        replace(BRIGHTNESS, name=name, key="marks", compute=marks, read=lambda recorded, name=name: recorded[name])
        for name in ("left", "right")
    )
    sample = VideoSample(video=shade(0.4), prompt=CAPTION)
    record = record_video((left, right), sample)
    assert (record, calls) == ({"marks": {"left": True, "right": False}}, [CAPTION])
    videos = VideoSet(records={(CAPTION, 0): record, (CAPTION, 1): {}}, paths={})
    assert [measure.result(videos) for measure in (left, right)] == [Values({(CAPTION, 0): value}) for value in (1, 0)]
    assert sample.once(marks) is sample.once(marks) and len(calls) == 2


def videos_of(folder: Path, values: dict[tuple[str, int], float | None]) -> VideoSet:
    return VideoSet(
        records={key: {"brightness": value} for key, value in values.items()},
        paths={key: folder / f"{key[0]}-{key[1]}.mp4" for key in values},
    )


def test_a_measure_per_video_is_averaged_over_those_that_have_it(tmp_path):
    first = BRIGHTNESS.result(videos_of(tmp_path, {("a", 0): 1.0, ("a", 1): None, ("b", 0): 3.0}))
    second = BRIGHTNESS.result(videos_of(tmp_path, {("a", 1): 9.0, ("b", 0): 2.0}))
    assert isinstance(first, Values) and first.estimate().mean == 2.0 and first.estimate().videos == 2
    assert (first.less(second).mean, first.less(second).videos) == (1.0, 1)
    assert first.less(Values({("c", 0): 1.0})) is None
    assert BRIGHTNESS.result(videos_of(tmp_path, {("a", 0): None})) is None


def test_a_measure_per_prompt_is_given_the_files_of_each(tmp_path):
    several = replace(BRIGHTNESS, per="prompt", compute=len)
    keys = [("a", 0), ("a", 1), ("b", 4), ("b", 5), ("b", 6), ("c", 0)]
    videos = videos_of(tmp_path, dict.fromkeys(keys, 1.0))
    for path in videos.paths.values():
        path.touch()
    assert several.result(videos) == Values({("a", 0): 2, ("b", 4): 3})
    videos.paths["a", 1].unlink()
    assert several.result(videos) == Values({("b", 4): 3})
    assert several.result(videos_of(tmp_path, dict.fromkeys(keys[2:], 1.0))) is None, "one repeated prompt alone"


def test_diversity_is_measured_on_files(tmp_path):
    keys = [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    videos = videos_of(tmp_path, dict.fromkeys(keys, 1.0))
    for path, value in zip(videos.paths.values(), (0.2, 0.6, 0.5, 0.5)):
        path.write_bytes(encode_mp4(shade(value), 8))
    values = measures()["diversity"].result(videos).of
    assert list(values) == [("a", 0), ("b", 0)]
    assert list(values.values()) == pytest.approx([0.4, 0.0], abs=0.02)


def test_the_distance_of_sets_needs_more_videos_than_features():
    def featured(count: int, shift: float) -> dict[tuple[str, int], dict[str, object]]:
        return {("a", seed): {"features": [shift + seed % 3, seed % 2]} for seed in range(count)}

    distance = measures()["frechet"]
    videos = VideoSet(records=featured(6, 1.0), paths={}, reference=VideoSet(records=featured(6, 0.0), paths={}))
    result = distance.result(videos)
    assert isinstance(result, Distance) and result.videos == 6 and result.value > 1
    assert distance.result(replace(videos, records=featured(2, 1.0))) is None
    assert distance.result(replace(videos, reference=None)) is None
    assert distance.result(replace(videos, records={("a", 0): {"features": None}})) is None


def test_measures_are_chosen_by_name_beside_facts(monkeypatch):
    assert [measure.name for measure in choose_measures()] == list(OWN)
    assert [measure.name for measure in choose_measures(["frechet", "psnr"])] == [
        *FACTS[:2],
        "psnr",
        "frechet",
        FACTS[2],
    ]
    with pytest.raises(ValueError, match=r"`measures` must be of layer_density, .*, frechet, .*, got 'beauty'\."):
        choose_measures(["psnr", "beauty"])
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"got 'lpips', whose package lpips is not installed: pip install 'blade-"):
        choose_measures(["lpips"])


def test_single_videos_are_compared_by_the_same_declarations(pattern):
    noisy = (pattern + 0.05 * torch.randn(pattern.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    found = compare_videos(noisy, pattern)
    assert found == {"psnr": psnr(noisy, pattern), "ssim": ssim(noisy, pattern)}
    assert describe_comparison({**found, "seed": 3}) == f"PSNR {found['psnr']:.2f} dB, SSIM {found['ssim']:.4f}"


MODULE = """
from blade.metrics.measures import Measure

MEASURES = [
    Measure(name="sharpness", heading="sharpness", better="up", compute=lambda sample: float(sample.video.std())),
]
"""

LOOK = """
import sys
from blade.metrics.registry import choose_measures

print("video_sharpness" in sys.modules)
print(choose_measures(["sharpness"])[-1].heading)
"""


@pytest.mark.slow
def test_an_installed_package_adds_a_measure(tmp_path):
    (tmp_path / "video_sharpness.py").write_text(MODULE)
    metadata = tmp_path / "video_sharpness-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: video-sharpness\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[blade.measures]\nvideo-sharpness = video_sharpness:MEASURES\n")
    path = os.pathsep.join(part for part in (str(tmp_path), os.environ.get("PYTHONPATH")) if part)
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        env={**os.environ, "PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["False", "sharpness"], done.stderr
