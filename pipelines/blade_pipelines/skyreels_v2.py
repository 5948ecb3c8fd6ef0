"""Adapter for Diffusers' SkyReels-V2 transformers: Wan's, with timesteps of single frames and causal masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_skyreels_v2 import (
    SkyReelsV2AttnProcessor,
    SkyReelsV2Transformer3DModel,
)

from blade.families.protocol import Condition, Inputs
from blade.families.sampling_defaults import SamplingDefaults
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.wan import ORIGINAL_NAMES, WanFamily

SKYREELS_ORIGINAL_NAMES = (
    (r"^fps_projection\.net\.0\.proj$", "fps_projection.0"),
    (r"^fps_projection\.net\.2$", "fps_projection.2"),
    *ORIGINAL_NAMES,
)
"""Names in SkyReels-V2's own code. Source: `scripts/convert_skyreelsv2_to_diffusers.py` of Diffusers."""


class SkyReelsV2Family(WanFamily):
    """Adapter for `SkyReelsV2Transformer3DModel`: text and image to video, and diffusion forcing.

    Diffusion forcing gives every frame a timestep of its own, which the model repeats for the tokens of the frame: so
    the tokens of every frame stay together there, and the order runs inside each. With a causal mask (`causal_block_
    size` above 1) a pass stays dense: a block of tokens may hold frames on both sides of the mask's edge.
    """

    name = "SkyReels-V2 (SkyReelsV2Transformer3DModel)"
    transformers = (SkyReelsV2Transformer3DModel,)
    processors = (SkyReelsV2AttnProcessor,)
    original_names = SKYREELS_ORIGINAL_NAMES
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {
        ("SkyReelsV2DiffusionForcingPipeline", "image"): "SkyReelsV2DiffusionForcingImageToVideoPipeline"
    }

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "skyreels-v2"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the frame rate and the flow shift: 8 from text, 5 from an image.

        Source: the documentation of SkyReels-V2 in Diffusers, whose pipelines set the rest.
        """
        image = pipe.transformer.config.image_dim is not None or _is_a(pipe, "Image")
        return SamplingDefaults(fps=24, flow_shift=5.0 if image else 8.0)

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return the frame rate, which diffusion forcing tells the transformer.

        Raises:
            ValueError: for a video, which the pipelines continue, by rules that no option gives.
        """
        if request.video is not None:
            raise ValueError(
                "`video` must not be given: SkyReels-V2 continues it, which needs `overlap_history`. Call the "
                "pipeline from Python for that; `apply_blade` works with it."
            )
        return {"fps": request.fps} if _is_a(pipe, "DiffusionForcing") else {}

    def pass_dense_reason(self, transformer: DiffusersModule, inputs: Inputs) -> str | None:
        """Return that the model has a causal mask, or None."""
        frames = transformer.config.num_frame_per_block
        if frames <= 1:
            return None
        return (
            f"attention is causal in blocks of {frames} frames (`causal_block_size`), which may cut a block of tokens"
        )

    def scheduler_counts_steps(self, inputs: Inputs) -> bool:
        """Return whether this is no diffusion forcing, whose pipelines step a copy of the scheduler for each frame."""
        return not inputs.get("enable_diffusion_forcing")

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of the latent; frame by frame where frames have timesteps of their own."""
        apart = bool(inputs.get("enable_diffusion_forcing"))
        return replace(super().token_grid(transformer, inputs), frames_apart=apart)

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros, as for Wan; a model that is told the frame rate is one of diffusion forcing."""
        inputs = super().example_inputs(transformer, latent_size, batch=batch, text_tokens=text_tokens)
        if transformer.config.inject_sample_info:
            frames = latent_size[0] // transformer.config.patch_size[0]
            inputs["timestep"] = transformer.proj_out.weight.new_zeros(batch, frames)
            inputs["enable_diffusion_forcing"], inputs["fps"] = True, [1] * batch
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the latent's patches; timesteps belong to frames."""
        single = {**inputs, "timestep": inputs["timestep"].flatten()[:1]}
        return {**super().permute_inputs(transformer, single, permutation), "timestep": inputs["timestep"]}


def _is_a(pipe: Any, kind: str) -> bool:
    """Return whether a word is in the name of a pipeline's class, or of one that it comes from."""
    return any(kind in base.__name__ for base in type(pipe).__mro__)


FAMILIES = (SkyReelsV2Family(),)
"""Families of this module, for the registry."""
