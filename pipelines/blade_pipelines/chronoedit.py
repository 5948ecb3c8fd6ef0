"""Adapter for Diffusers' ChronoEdit transformers: Wan's, with the first and the last frame far apart in time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.transformer_chronoedit import ChronoEditTransformer3DModel, WanAttnProcessor

from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.wan import WanFamily, split_sequence

EDIT_FRAMES = 5
"""Frames that the pipeline makes for an edit alone, whatever it is asked for."""


class ChronoEditFamily(WanFamily):
    """Adapter for `ChronoEditTransformer3DModel`: edits an image as the last frame of a short video.

    A latent of two frames is the image and the edit; its times are those of the first and the last frame of a longer
    one. The rope module knows that, and its tables are permuted as Wan's are.
    """

    name = "ChronoEdit (ChronoEditTransformer3DModel)"
    transformers = (ChronoEditTransformer3DModel,)
    processors = (WanAttnProcessor,)

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "chronoedit"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the frames of an edit; Diffusers' pipeline sets the rest."""
        return SamplingDefaults(frames=EDIT_FRAMES)

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return that a longer video than an edit's is wanted as a whole, in every step."""
        if request.frames == EDIT_FRAMES:
            return {}
        return {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": request.steps}

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit:
        """Return the places of Diffusers' own plan, which are Wan's."""
        return split_sequence()


FAMILIES = (ChronoEditFamily(),)
"""Families of this module, for the registry."""
