"""Check of an evaluation's files before the first model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from blade.common.files import check_writable
from blade.evaluation.plan import EvaluationPlan
from blade.evaluation.prompts import EvaluationPrompt
from blade.evaluation.runs import RunSettings
from blade.evaluation.videos import comparison_path, video_path
from blade.media.video import least_mp4_bytes

REPORT_FILES = ("report.json", "report.md", "report.html", "report.png", "contact-sheet.png")
"""Files of the report."""

REFERENCE_SHARE = 0.1
"""Bytes that the frames of a reference hardly fall below when compressed, as a share of what they take without."""


def records_path(folder: Path, shard: tuple[int, int]) -> Path:
    """Return the path of a shard's records."""
    return folder / "records-{}-of-{}.jsonl".format(*shard)


def reference_path(folder: Path, run: str, prompt: EvaluationPrompt) -> Path:
    """Return the path of the frames of a dense run's video, with which others are compared."""
    return folder / "references" / run / f"{prompt.stem}.npz"


def check_output_files(
    plan: EvaluationPlan, missing: Sequence[tuple[EvaluationPrompt, RunSettings]], *, compares: bool
) -> None:
    """Check that what an evaluation will write can be written, and that there is room for it.

    Args:
        plan: The evaluation.
        missing: Its videos that are still to be made.
        compares: True if frames of dense videos are kept to compare others with.

    Raises:
        OutputError: If a file cannot be written, or the disk has too little room.
    """
    evaluation, folder = plan.evaluation, plan.evaluation.folder
    paths = [records_path(folder, evaluation.shard), *(folder / name for name in REPORT_FILES)]
    size = [int(plan.size[name]) for name in ("frames", "height", "width")]
    video, needed = least_mp4_bytes(*size), 0
    for prompt, run in missing:
        paths += [video_path(folder, run.name, prompt), comparison_path(folder, prompt)]
        needed += video if len(evaluation.runs) == 1 else 2 * video
        if run.is_dense and compares:
            paths.append(reference_path(folder, run.name, prompt))
            needed += int(REFERENCE_SHARE * 3 * size[0] * size[1] * size[2])
    check_writable(*paths, needed=needed, purpose=f"an evaluation of {len(missing)} video(s)")
