from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blade.evaluation.plan import EvaluationPlan, plan_evaluation
from blade.evaluation.prompts import prompts_with_seeds
from blade.evaluation.runs import parse_run
from blade.evaluation.videos import lay_out_videos, video_path
from blade.media.pictures import LABEL_HEIGHT
from blade.media.video import encode_mp4, read_mp4

PROMPTS = prompts_with_seeds(["a red/blue cat", "long " * 60], (7, 2))
BRIGHTNESS = {"dense": 0.2, "asa": 0.8}


@pytest.fixture
def plan(evaluation) -> EvaluationPlan:
    """An evaluation whose videos are plain, each run's of its own brightness, and darker from frame to frame."""
    runs = tuple(parse_run(f"{name}={name},steps=2") for name in BRIGHTNESS)
    plan = plan_evaluation(replace(evaluation, runs=runs, prompts=PROMPTS))
    for name, brightness in BRIGHTNESS.items():
        for prompt in PROMPTS:
            path = video_path(evaluation.folder, name, prompt)
            path.parent.mkdir(parents=True, exist_ok=True)
            fading = torch.linspace(brightness, brightness / 2, 9)
            path.write_bytes(encode_mp4(fading.view(9, 1, 1, 1).expand(9, 3, 64, 64), 16))
    return plan


def test_all_runs_stand_side_by_side(plan):
    shown = lay_out_videos(plan).shown
    assert list(shown) == list(PROMPTS)
    for prompt, path in shown.items():
        assert path == plan.evaluation.folder / "compare" / f"{prompt.stem}.mp4"
    both = read_mp4(shown[PROMPTS[0]])
    edge = 64 * (288 // 64)
    assert both.shape == (9, 3, LABEL_HEIGHT + edge, 2 * edge)
    middle = LABEL_HEIGHT + edge // 2
    for frame, share in ((0, 1.0), (8, 0.5)):
        for place, brightness in enumerate(BRIGHTNESS.values()):
            seen = float(both[frame, :, middle, edge // 2 + place * edge].mean())
            assert seen == pytest.approx(brightness * share, abs=0.02)
    assert both[0, :, :LABEL_HEIGHT].max() > 0.9, "the labels are missing"


def test_contact_sheet_shows_middle_frames_of_some_prompts(plan):
    sheet = lay_out_videos(plan).sheet
    assert (plan.evaluation.folder / "contact-sheet.png").read_bytes() == sheet
    pixels = np.asarray(Image.open(io.BytesIO(sheet))) / 255
    edge, row = 256, 2 * LABEL_HEIGHT + 256
    assert pixels.shape == (len(PROMPTS) * row, 2 * edge, 3)
    for place, brightness in enumerate(BRIGHTNESS.values()):
        middles = pixels[2 * LABEL_HEIGHT + edge // 2 :: row, edge // 2 + place * edge]
        assert middles == pytest.approx(np.full((len(PROMPTS), 3), 0.75 * brightness), abs=0.02)


def test_large_frames_are_shrunk_for_the_contact_sheet(plan):
    for name in BRIGHTNESS:
        video_path(plan.evaluation.folder, name, PROMPTS[0]).write_bytes(
            encode_mp4(torch.full((9, 3, 320, 640), 0.5), 16)
        )
    one = replace(plan, evaluation=replace(plan.evaluation, prompts=PROMPTS[:1]))
    assert Image.open(io.BytesIO(lay_out_videos(one).sheet)).size == (640, 2 * LABEL_HEIGHT + 160)


def test_vbench_finds_prompts_and_indices_in_names(plan):
    for _ in range(2):  # a second time replaces what is there
        lay_out_videos(plan)
    folder, videos = plan.evaluation.folder / "vbench" / "asa", plan.evaluation.folder / "videos" / "asa"
    short, long = "a red_blue cat", ("long " * 60).encode()[:240].decode()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{text}-{index}.mp4" for text in (short, long) for index in (0, 1)
    )
    # the first is of the smaller seed
    assert (folder / f"{short}-0.mp4").samefile(videos / f"{PROMPTS[1].stem}.mp4")
    assert (folder / f"{short}-1.mp4").samefile(videos / f"{PROMPTS[0].stem}.mp4")


def test_vbench_gets_copies_where_there_are_no_links(plan, monkeypatch):
    def refuse(source: Path, place: Path) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    lay_out_videos(plan)
    copy = plan.evaluation.folder / "vbench" / "dense" / "a red_blue cat-0.mp4"
    original = video_path(plan.evaluation.folder, "dense", PROMPTS[1])
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)


def test_prompts_that_lack_a_video_are_left_out_and_counted(plan, caplog):
    video_path(plan.evaluation.folder, "asa", PROMPTS[1]).unlink()
    assert list(lay_out_videos(plan).shown) == [PROMPTS[0], *PROMPTS[2:]]
    assert ": 1 prompts." in caplog.text
    for path in plan.evaluation.folder.rglob("*.mp4"):
        path.unlink()
    empty = lay_out_videos(plan)
    assert (empty.shown, empty.sheet) == ({}, None)


def test_a_single_run_is_shown_as_it_is(plan):
    alone = replace(plan, evaluation=replace(plan.evaluation, runs=plan.evaluation.runs[:1]))
    laid_out = lay_out_videos(alone)
    assert laid_out.shown[PROMPTS[0]] == video_path(plan.evaluation.folder, "dense", PROMPTS[0])
    assert not (plan.evaluation.folder / "compare").exists()
    assert Image.open(io.BytesIO(laid_out.sheet)).width == 256
