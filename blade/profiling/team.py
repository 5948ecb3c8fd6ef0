"""Videos of a profile that several processes make together: the first leads and writes files, the others follow it.

The first process decides everything, what is resumed too, so that the others need neither its folder nor its results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blade.attention.apply import use_blade
from blade.attention.config import BladeConfig
from blade.generation.request import ResolvedRequest
from blade.generation.run import Generation, run_request
from blade.generation.team import follow as follow_generations
from blade.models.loaded import LoadedModel
from blade.models.parallel import Team
from blade.profiling.recording import recorded, saved_passes
from blade.profiling.recording_plan import Recording


@dataclass(frozen=True, kw_only=True)
class RecordedVideo:
    """A video whose attention is measured."""

    request: ResolvedRequest
    """Its request."""
    recording: Recording
    """Options of the recording."""

    def make(
        self, model: LoadedModel, folder: Path | None, on_pass: Callable[[int, bool, int | None], None] | None = None
    ) -> Generation:
        """Make it. See `blade.profiling.recording.recorded`."""
        (transformer,) = model.transformers.values()
        attention = recorded(transformer, self.recording, folder, model.pipe, on_pass)
        return run_request(model, self.request, attention=attention)


@dataclass(frozen=True, kw_only=True)
class ConfiguredVideo:
    """A video with a configuration of BLADE, whose passes are saved."""

    request: ResolvedRequest
    """Its request."""
    config: BladeConfig
    """The configuration."""

    def make(self, model: LoadedModel, folder: Path | None) -> Generation:
        """Make it. See `blade.profiling.recording.saved_passes`."""
        with use_blade(model.pipe, self.config):
            return run_request(model, self.request, attention=saved_passes(model.transformer, folder))


def make_recorded(
    model: LoadedModel,
    request: ResolvedRequest,
    recording: Recording,
    folder: Path,
    on_pass: Callable[[int, bool, int | None], None] | None = None,
) -> Generation:
    """Make a video and measure its attention, with all processes of the model's team, of which this is the first.

    Args:
        model: the model, with one transformer.
        request: the resolved request.
        recording: the options of the recording.
        folder: the folder of the passes.
        on_pass: see `blade.profiling.recording.saved_passes`.
    """
    video = RecordedVideo(request=request, recording=recording)
    _tell(model, video)
    return video.make(model, folder, on_pass)


def make_configured(model: LoadedModel, request: ResolvedRequest, config: BladeConfig, folder: Path) -> Generation:
    """Make a video with a configuration of BLADE and save its passes, with all processes of the model's team.

    Args:
        model: the model, with one transformer.
        request: the resolved request.
        config: the configuration.
        folder: the folder of the passes.
    """
    video = ConfiguredVideo(request=request, config=config)
    _tell(model, video)
    return video.make(model, folder)


def follow(team: Team) -> None:
    """Take part in the videos that the first process makes for a profile, until it has made all."""
    follow_generations(team, _make)


def _make(model: LoadedModel, video: Any) -> None:
    if isinstance(video, ResolvedRequest):
        run_request(model, video)
    else:
        video.make(model, None)


def _tell(model: LoadedModel, video: RecordedVideo | ConfiguredVideo) -> None:
    if model.team is not None:
        model.team.tell(video)
