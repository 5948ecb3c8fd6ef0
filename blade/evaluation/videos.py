"""An evaluation's videos as files: one per run, side by side, as a contact sheet, and in VBench's layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from blade.common.files import link_or_copy, write_files
from blade.common.names import literal_name
from blade.common.terminal import logger
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.media.pictures import contact_sheet, encode_jpeg, encode_png, shrunk, side_by_side
from blade.media.video import encode_mp4, mp4_frames

SHEET_PROMPTS = 8
"""Most rows of the contact sheet, evenly spaced over the prompts."""

SHEET_WIDTH = 320
"""Largest width of a frame in the contact sheet, in pixels; wider frames are shrunk."""

POSTER_WIDTH = 640
"""Largest width of what a page shows of a video before it plays, in pixels."""

PROMPT_BYTES = 240
"""Most bytes of a prompt in the name of VBench's layout; file systems allow 255 for the whole name."""


@dataclass(frozen=True, kw_only=True)
class VideoLayout:
    """The files made from an evaluation's videos."""

    shown: Mapping[EvaluationPrompt, Path]
    """Comparison by prompt: all runs side by side, or the video itself if there is only one run."""
    sheet: bytes | None
    """The contact sheet as a PNG: a row per prompt with every run's middle frame. None if no prompt has all videos."""


def video_path(folder: Path, run: str, prompt: EvaluationPrompt) -> Path:
    """Return the path of a run's video of a prompt in an evaluation's folder."""
    return folder / "videos" / run / f"{prompt.stem}.mp4"


def comparison_path(folder: Path, prompt: EvaluationPrompt) -> Path:
    """Return the path of all runs' videos of a prompt side by side, in an evaluation's folder."""
    return folder / "compare" / f"{prompt.stem}.mp4"


def lay_out_videos(plan: EvaluationPlan) -> VideoLayout:
    """Make or replace `compare/`, `contact-sheet.png` and `vbench/` from the videos in an evaluation's folder.

    Args:
        plan: The evaluation. Prompts that lack the video of a run are left out.

    Raises:
        OutputError: If a file cannot be written.
    """
    evaluation = plan.evaluation
    names = [run.name for run in evaluation.runs]
    complete = {}
    for prompt in evaluation.prompts:
        paths = {name: video_path(evaluation.folder, name, prompt) for name in names}
        if all(path.is_file() for path in paths.values()):
            complete[prompt] = paths
    if len(complete) < len(evaluation.prompts):
        incomplete = len(evaluation.prompts) - len(complete)
        videos = evaluation.folder / "videos"
        logger.warning(f"Left out of comparisons, as they lack a video in {videos}: {incomplete} prompts.")
    _write_vbench(evaluation.folder / "vbench", names, complete)
    shown = {prompt: next(iter(paths.values())) for prompt, paths in complete.items()}
    if len(names) > 1:
        logger.info(f"writing {len(complete)} videos of {len(names)} runs side by side")
        shown = {prompt: comparison_path(evaluation.folder, prompt) for prompt in complete}
        for prompt, paths in complete.items():
            write_files({shown[prompt]: encode_mp4(_frames_side_by_side(paths), plan.size["fps"])})
    sheet = _sheet(complete, plan.size["frames"]) if complete else None
    if sheet is not None:
        write_files({evaluation.folder / "contact-sheet.png": sheet})
    return VideoLayout(shown=shown, sheet=sheet)


def poster(path: Path) -> bytes:
    """Return the first frame of a video as a small JPEG."""
    return encode_jpeg(_frame(path, 0)[0], POSTER_WIDTH)


def _frames_side_by_side(paths: Mapping[str, Path]) -> Iterator[torch.Tensor]:
    """Yield the frames of a comparison one at a time, since whole videos of many runs may not fit into memory."""
    for frames in zip(*(mp4_frames(path) for path in paths.values())):
        yield side_by_side({name: frame[None] / 255 for name, frame in zip(paths, frames)})[0]


def _sheet(complete: Mapping[EvaluationPrompt, Mapping[str, Path]], frames: int) -> bytes:
    prompts = list(complete)
    indices = torch.linspace(0, len(prompts) - 1, min(SHEET_PROMPTS, len(prompts))).round().long().tolist()
    rows = {}
    for prompt in (prompts[index] for index in indices):
        middles = {name: shrunk(_frame(path, frames // 2), SHEET_WIDTH) for name, path in complete[prompt].items()}
        panels = [side_by_side({name: frame})[0] for name, frame in middles.items()]
        rows[f"{prompt.text} (seed {prompt.seed})"] = torch.stack(panels)
    return encode_png(contact_sheet(rows, columns=len(next(iter(complete.values()))), factor=1))


def _frame(path: Path, number: int) -> torch.Tensor:
    """Read a frame of a video: (1, 3, H, W) in [0, 1]."""
    return next(frame for index, frame in enumerate(mp4_frames(path)) if index == number)[None] / 255


def _write_vbench(folder: Path, names: Sequence[str], complete: Mapping[EvaluationPrompt, Mapping[str, Path]]) -> None:
    """Link each run's videos under the names from which VBench reads prompts, "{prompt}-{index}.mp4".

    The index counts the videos of a prompt from 0, by seed. Characters that a file system may not allow are replaced.
    Source: VBench, arXiv 2311.17982, the layout of its prompt suite.
    """
    counts = Counter[str]()
    for prompt in sorted(complete, key=lambda prompt: prompt.seed):
        text = literal_name(prompt.text, PROMPT_BYTES)
        for name in names:
            link = folder / name / f"{text}-{counts[text]}.mp4"
            link_or_copy(complete[prompt][name], link)
        counts[text] += 1
