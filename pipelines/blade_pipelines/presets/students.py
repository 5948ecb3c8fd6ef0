"""Published students that are no folders of this project: which attention, sampler and steps they were trained for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ReleasedStudent:
    """What a published LoRA needs beside itself."""

    family: str
    """A word of the subfolder that holds it."""
    preset: str
    """Name of the student preset of its attention."""
    steps: tuple[int, ...]
    """Numbers of steps that it was trained for."""
    make_scheduler: Callable[[Any], Any]
    """Takes the model's own scheduler."""


def _unipc(scheduler: Any) -> Any:
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler.from_config(
        scheduler.config, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _trailing_dpm(scheduler: Any) -> Any:
    from diffusers import CogVideoXDPMScheduler

    return CogVideoXDPMScheduler.from_config(scheduler.config, timestep_spacing="trailing")


RELEASED: dict[str, tuple[ReleasedStudent, ...]] = {
    "GYP666/VIDEO-BLADE": (
        ReleasedStudent(family="wan", preset="wan2.1-t2v-1.3b", steps=(8,), make_scheduler=_unipc),
        ReleasedStudent(family="cog", preset="cogvideox-5b", steps=(8,), make_scheduler=_trailing_dpm),
    )
}
"""By Hub id. Source: the release of BLADE (arXiv 2508.10774): rank 64, UniPC with flow shift 3 for Wan, trailing
DPM-Solver for CogVideoX, 8 steps, guidance 1."""
