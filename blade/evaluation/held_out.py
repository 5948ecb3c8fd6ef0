"""Scores of a pipeline of moving shapes on captions that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blade.evaluation.prompts import EvaluationPrompt
from blade.moving_shapes.bundled import BUNDLED_DEFAULTS
from blade.moving_shapes.scoring import Score, score


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """Counts over the videos of one group of prompts."""

    group: str
    videos: int
    basics: int
    """Videos that show colour, shape and direction of every object, and nothing else."""
    all_attributes: int
    """Videos that show everything that the caption says."""
    fraction: float
    """Mean share of the named attributes that are right."""


def score_held_out(
    pipe: Any, prompts: Sequence[EvaluationPrompt], *, steps: int, batch_size: int = 16
) -> tuple[GroupScore, ...]:
    """Generate a video of every prompt with the bundled model's size and guidance, and score them.

    Args:
        pipe: A pipeline, on its device.
        prompts: Captions with their seeds and groups.
        steps: Steps of a generation.
        batch_size: Videos generated at once.

    Returns:
        The counts of every group, in the order of the prompts.
    """
    groups: dict[str, list[Score]] = {}
    for prompt, video in zip(prompts, _generate(pipe, prompts, steps, batch_size), strict=True):
        groups.setdefault(prompt.group, []).append(score(video, prompt.text))
    return tuple(
        GroupScore(
            group=group,
            videos=len(scores),
            basics=sum(it.basics for it in scores),
            all_attributes=sum(it.all_attributes for it in scores),
            fraction=sum(it.fraction for it in scores) / len(scores),
        )
        for group, scores in groups.items()
    )


def _generate(pipe: Any, prompts: Sequence[EvaluationPrompt], steps: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield a video of every prompt, (frames, 3, height, width) on the CPU."""
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        videos = pipe(
            [prompt.text for prompt in batch],
            negative_prompt=[""] * len(batch),
            height=BUNDLED_DEFAULTS["height"],
            width=BUNDLED_DEFAULTS["width"],
            num_frames=BUNDLED_DEFAULTS["frames"],
            num_inference_steps=steps,
            guidance_scale=BUNDLED_DEFAULTS["guidance_scale"],
            generator=[torch.Generator().manual_seed(prompt.seed) for prompt in batch],
            output_type="pt",
        ).frames
        yield from videos.float().cpu()
