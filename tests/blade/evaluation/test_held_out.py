"""Scores of a pipeline on held-out captions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from blade.evaluation.held_out import score_held_out
from blade.evaluation.prompts import held_out_prompts
from blade.moving_shapes.captions import parse_caption
from blade.moving_shapes.world import render, sample_scene


class Renderer:
    """Draws what single captions say, and nothing for captions of two objects."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def set_progress_bar_config(self, **options: Any) -> None:
        """Take what a pipeline takes."""

    def __call__(self, prompts, *, generator, height, width, num_frames, num_inference_steps, **options: Any):
        assert num_inference_steps == 3
        self.calls.append(len(prompts))
        assert [it.initial_seed() for it in generator] == [0, 1, 0][sum(self.calls[:-1]) :][: len(prompts)]
        size = {"frames": num_frames, "height": height, "width": width}
        videos = torch.full((len(prompts), num_frames, 3, height, width), 0.08)
        for number, prompt in enumerate(prompts):
            if " and " not in prompt:
                videos[number] = render(sample_scene(parse_caption(prompt), np.random.default_rng(0), **size), **size)
        return SimpleNamespace(frames=videos)


def test_counts_are_by_group() -> None:
    pipe = Renderer()
    single, two = score_held_out(pipe, held_out_prompts(2, 1), steps=3, batch_size=2)
    assert pipe.calls == [2, 1]
    assert (single.group, single.videos, single.basics, single.all_attributes, single.fraction) == (
        "single",
        2,
        2,
        2,
        1,
    )
    assert (two.group, two.videos, two.basics, two.all_attributes) == ("two", 1, 0, 0)
    assert two.fraction < 0.5
