"""An evaluation's videos as files: of each run, side by side, as a contact sheet, and laid out for VBench."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from blade.common.files import write_files
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.media.pictures import contact_sheet, encode_png, side_by_side
from blade.media.video import encode_mp4, mp4_frames

logger = logging.getLogger("blade")

SHEET_PROMPTS = 8
"""Rows of the contact sheet at the most, evenly spaced over the prompts."""

SHEET_WIDTH = 320
"""Pixels to which the frames of a contact sheet are shrunk where they are wider."""

NAME_BYTES = 240
"""Bytes of a prompt in a file's name at the most; file systems allow 255 for the whole."""


@dataclass(frozen=True, kw_only=True)
class VideoLayout:
    """What was made of an evaluation's videos."""

    shown: Mapping[EvaluationPrompt, Path]
    """By prompt, all runs side by side, or the video itself where there is one run."""
    sheet: bytes | None
    """The contact sheet as a PNG: a row a prompt, the middle frame of every run. None if no prompt has all videos."""


def video_path(folder: Path, run: str, prompt: EvaluationPrompt) -> Path:
    """Where a run's video of a prompt is, in an evaluation's folder."""
    return folder / "videos" / run / f"{prompt.stem}.mp4"


def lay_out_videos(plan: EvaluationPlan) -> VideoLayout:
    """Make `compare/`, `contact-sheet.png` and `vbench/` of the videos in an evaluation's folder, all of them anew.

    Args:
        plan: The evaluation. Prompts that lack a run's video are left out.

    Raises:
        OutputError: If a file cannot be written.
    """
    evaluation = plan.evaluation
    names = [run.name for run in evaluation.runs]
    found = {}
    for prompt in evaluation.prompts:
        paths = {name: video_path(evaluation.folder, name, prompt) for name in names}
        if all(path.is_file() for path in paths.values()):
            found[prompt] = paths
    if len(found) < len(evaluation.prompts):
        lacking = len(evaluation.prompts) - len(found)
        where = evaluation.folder / "videos"
        logger.warning(f"Left out of comparisons, as they lack a video in {where}: {lacking} prompts.")
    _write_vbench(evaluation.folder / "vbench", names, found)
    shown = {prompt: next(iter(paths.values())) for prompt, paths in found.items()}
    if len(names) > 1:
        logger.info(f"laying {len(names)} runs side by side, {len(found)} videos")
        shown = {prompt: evaluation.folder / "compare" / f"{prompt.stem}.mp4" for prompt in found}
        for prompt, paths in found.items():
            shown[prompt].parent.mkdir(parents=True, exist_ok=True)
            write_files({shown[prompt]: encode_mp4(_frames_side_by_side(paths), plan.size["fps"])})
    sheet = _sheet(found, plan.size["frames"]) if found else None
    if sheet is not None:
        write_files({evaluation.folder / "contact-sheet.png": sheet})
    return VideoLayout(shown=shown, sheet=sheet)


def _frames_side_by_side(paths: Mapping[str, Path]) -> Iterator[torch.Tensor]:
    """The frames of a comparison, one after the other, as whole videos of many runs may not fit into memory."""
    for frames in zip(*(mp4_frames(path) for path in paths.values())):
        yield side_by_side({name: frame[None] / 255 for name, frame in zip(paths, frames)})[0]


def _sheet(found: Mapping[EvaluationPrompt, Mapping[str, Path]], frames: int) -> bytes:
    prompts = list(found)
    places = torch.linspace(0, len(prompts) - 1, min(SHEET_PROMPTS, len(prompts))).round().long().tolist()
    rows = {}
    for prompt in (prompts[place] for place in places):
        panels = [side_by_side({name: _shrunk(_frame(path, frames // 2))})[0] for name, path in found[prompt].items()]
        rows[f"{prompt.text} (seed {prompt.seed})"] = torch.stack(panels)
    return encode_png(contact_sheet(rows, columns=len(next(iter(found.values()))), factor=1))


def _frame(path: Path, number: int) -> torch.Tensor:
    """A frame of a video, (1, 3, H, W) in [0, 1]."""
    return next(frame for place, frame in enumerate(mp4_frames(path)) if place == number)[None] / 255


def _shrunk(frame: torch.Tensor) -> torch.Tensor:
    height, width = frame.shape[-2:]
    if width <= SHEET_WIDTH:
        return frame
    return functional.interpolate(frame, size=(round(height * SHEET_WIDTH / width), SHEET_WIDTH), mode="area")


def _write_vbench(folder: Path, names: Sequence[str], found: Mapping[EvaluationPrompt, Mapping[str, Path]]) -> None:
    """Link each run's videos under the names that VBench reads prompts from, "{prompt}-{index}.mp4".

    The index counts the videos of a prompt from 0, by seed. What a file system cannot have in a name is replaced.
    Source: VBench, arXiv 2311.17982, the layout of its prompt suite.
    """
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
    counted = Counter[str]()
    for prompt in sorted(found, key=lambda prompt: prompt.seed):
        text = prompt.text.replace("/", "_").encode()[:NAME_BYTES].decode(errors="ignore")
        for name in names:
            place = folder / name / f"{text}-{counted[text]}.mp4"
            place.unlink(missing_ok=True)
            _link(found[prompt][name], place)
        counted[text] += 1


def _link(source: Path, place: Path) -> None:
    """Make a file appear at another place too, as a copy where the file system has no hard links."""
    try:
        os.link(source, place)
    except OSError:
        shutil.copyfile(source, place)
