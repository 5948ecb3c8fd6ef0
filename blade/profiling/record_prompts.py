"""Recording of an attention profile: dense generations of a few prompts, measured pass by pass."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from blade.common.files import write_files
from blade.common.reading import read_json
from blade.generation.request import ResolvedRequest
from blade.models.loaded import LoadedModel
from blade.profiling.profile import AttentionProfile, ProfileSource, aggregate_passes, make_profile
from blade.profiling.recording_plan import Recording
from blade.profiling.team import make_recorded

SOURCE_NAME = "source.json"
"""File in a folder of recordings that says what they were made of."""

SAME_FIELDS = (
    "revision", "negative_prompt", "flow_shift", "dtype", "student", "student_weight", "scheduler", "noise_kept",
    "loras", "quantize",
)  # fmt: skip
"""Fields of a request, besides those of the source, that must agree among the recordings of a folder."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of the recording, after each step of a generation."""

    prompt: int
    """Number of the prompt, from 1."""
    prompts: int
    """Total number of prompts."""
    step: int
    """Finished steps of its generation."""
    steps: int
    """Steps of a generation."""
    seconds_left: float
    """Estimated time until all prompts are done."""

    def __str__(self) -> str:
        remaining = f"{self.seconds_left / 60:.0f} min" if self.seconds_left >= 90 else f"{self.seconds_left:.0f} s"
        return f"prompt {self.prompt}/{self.prompts}, step {self.step}/{self.steps}, {remaining} left"


def record_profile(
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    recording: Recording,
    source: ProfileSource,
    folder: Path,
    on_step: Callable[[Progress], None] | None = None,
) -> AttentionProfile:
    """Record all prompts and combine the measurements into a profile; see `record_prompts`."""
    record_prompts(model, requests, recording, source, folder, on_step)
    return make_profile(source, [recording_path(folder, number) for number in range(len(requests))])


def record_prompts(
    model: LoadedModel,
    requests: Sequence[ResolvedRequest],
    recording: Recording,
    source: ProfileSource,
    folder: Path,
    on_step: Callable[[Progress], None] | None = None,
    share: tuple[int, int] = (1, 1),
) -> None:
    """Generate videos with dense attention, or by the recording's rule, and measure the errors of all candidates.

    An interrupted recording resumes bit-exactly: a pass of the transformer that was saved is not computed again.

    Args:
        model: the model, with one transformer. Of a team's, this is the first process, and the others follow it.
        requests: one resolved request per prompt.
        recording: the options of the recording.
        source: the origin of the profile.
        folder: the folder of the passes and of the prompts' videos.
        on_step: called after each pass.
        share: (i, n): record every n-th prompt from the i-th, as one of n processes.

    Raises:
        ValueError: if the model has two transformers, or the folder holds recordings made with other settings.
        NonFiniteError: see `blade.generation.run.generate`.
        OSError: if a file cannot be written.
    """
    transformers = model.transformers
    if len(transformers) > 1:
        raise ValueError(
            f"`model` must have one transformer to be profiled, but a {type(model.pipe).__name__} has "
            f"{len(transformers)}."
        )
    _check_folder(folder, source, recording, requests[0])
    numbers = range(share[0] - 1, len(requests), share[1])
    pace = _Pace(len(numbers), source.steps, on_step)
    for index, number in enumerate(numbers):
        passes, path = folder / f"prompt-{number:03d}", recording_path(folder, number)
        pace.prompt_began(index)
        if not path.is_file():
            generation = make_recorded(model, requests[number].dense(), recording, passes, pace.passed)
            pixels = (generation.video.clamp(0, 1) * 255).round().byte().numpy()
            buffer = io.BytesIO()
            np.savez_compressed(buffer, frames=pixels)
            write_files({folder / f"video-{number:03d}.npz": buffer.getvalue()})
            aggregate_passes(passes, path, source.steps)
        shutil.rmtree(passes, ignore_errors=True)


def recording_path(folder: Path, number: int) -> Path:
    """Return the path of what was recorded of a prompt."""
    return folder / f"prompt-{number:03d}.safetensors"


def dense_video(folder: Path, number: int) -> np.ndarray:
    """Load the video that `record_profile` made of a prompt: (frames, 3, H, W) uint8."""
    with np.load(folder / f"video-{number:03d}.npz") as archive:
        frames: np.ndarray = archive["frames"]
    return frames


def _check_folder(folder: Path, source: ProfileSource, recording: Recording, request: ResolvedRequest) -> None:
    """Refuse to mix recordings made with different settings; write those of a new folder to `SOURCE_NAME`."""
    options = {"recording": _plain(recording), **{name: getattr(request, name) for name in SAME_FIELDS}}
    settings = source.to_dict() | json.loads(json.dumps(options))
    path = folder / SOURCE_NAME
    if not path.is_file():
        write_files({path: (json.dumps(settings, indent=1) + "\n").encode()})
        return
    try:
        existing = read_json(path, f"`{path}`")
        existing |= _current(existing)
    except ValueError as problem:
        raise ValueError(f"{str(problem).rstrip('.')}; take another folder.") from None
    for name, value in settings.items():
        if existing.get(name) != value:
            raise ValueError(
                f"`output` holds recordings with another `{name}`, {_short(existing.get(name))} instead of "
                f"{_short(value)}; take another folder."
            )


def _current(recorded_settings: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a recorded source in their current spelling."""
    names = {item.name for item in fields(ProfileSource)}
    if not names <= recorded_settings.keys():
        return {}
    return ProfileSource.from_dict({name: recorded_settings[name] for name in names}).to_dict()


def _plain(recording: Recording) -> dict[str, Any]:
    rule = recording.rule
    return {
        "sampled_blocks": recording.sampled_blocks,
        "rule": None if rule is None else [rule.weight, rule.threshold],
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Pace:
    """Estimate of the remaining time, updated after every pass."""

    def __init__(self, prompts: int, steps: int, on_step: Callable[[Progress], None] | None) -> None:
        self.prompts, self.steps, self.on_step = prompts, steps, on_step
        self.prompt = 0
        self.computed: set[tuple[int, int]] = set()
        self.spent, self.latest = 0.0, time.monotonic()

    def prompt_began(self, number: int) -> None:
        self.prompt, self.latest = number, time.monotonic()

    def passed(self, number: int, resumed: bool, step: int | None) -> None:
        assert step is not None
        now = time.monotonic()
        if not resumed:
            self.spent += now - self.latest
            self.computed.add((self.prompt, step))
        self.latest = now
        if self.on_step is not None:
            remaining = self.steps * (self.prompts - self.prompt) - step - 1
            seconds_left = self.spent / max(len(self.computed), 1) * remaining
            progress = Progress(
                prompt=self.prompt + 1,
                prompts=self.prompts,
                step=step + 1,
                steps=self.steps,
                seconds_left=seconds_left,
            )
            self.on_step(progress)
