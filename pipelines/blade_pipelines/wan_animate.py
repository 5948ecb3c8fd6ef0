"""Adapter for Diffusers' Wan-Animate transformers: motion of a face is added to the tokens frame by frame."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate import WanAnimateTransformer3DModel, WanAttnProcessor

from blade.families.protocol import Inputs
from blade.families.sampling_defaults import SamplingDefaults
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.wan import ORIGINAL_NAMES, TINY_DECODERS, WanFamily

MOTION_STRIDE = 4
"""Frames of the face video that become one part of the motion: two convolutions with a stride of 2."""

ANIMATE_ORIGINAL_NAMES = (
    *ORIGINAL_NAMES,
    (r"^motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
    (r"^face_encoder\.(conv1_local|conv2|conv3)$", r"face_encoder.\1.conv"),
    (r"^face_adapter\.(\d+)\.to_(k|v)$", r"face_adapter.fuser_blocks.\1.linear1_kv"),
    (r"^face_adapter\.(\d+)\.to_q$", r"face_adapter.fuser_blocks.\1.linear1_q"),
    (r"^face_adapter\.(\d+)\.to_out$", r"face_adapter.fuser_blocks.\1.linear2"),
)
"""Names in Wan-Animate's own code, but of the motion encoder's convolutions.
Source: `scripts/convert_wan_to_diffusers.py` of Diffusers."""


class WanAnimateFamily(WanFamily):
    """Adapter for `WanAnimateTransformer3DModel`: animates a character by the poses and the face of a video.

    The face adapter cuts the tokens into as many parts as there are frames, and lets each attend to the motion of its
    frame. So the tokens of every frame stay together and the frames in order, whatever the token order; the order
    runs inside each frame. The reference image is the first frame.
    """

    name = "Wan-Animate (WanAnimateTransformer3DModel)"
    transformers = (WanAnimateTransformer3DModel,)
    processors = (WanAttnProcessor,)
    tiny_decoders = TINY_DECODERS
    original_names = ANIMATE_ORIGINAL_NAMES

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "wan-animate"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return none: Diffusers' pipeline sets size, steps and guidance as Wan-Animate's own code does."""
        return SamplingDefaults()

    def pass_dense_reason(self, transformer: DiffusersModule, inputs: Inputs) -> str | None:
        """Return that the motion does not have a part for each frame, so that no frame is apart; None if it has."""
        faces = inputs["face_pixel_values"].shape[2]
        parts, frames = (faces - 1) // MOTION_STRIDE + 2, self.token_grid(transformer, inputs).frames
        if parts == frames:
            return None
        return f"the motion of {faces} frames of the face has {parts} parts, and the latent {frames} frames"

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of the latent, frame by frame."""
        return replace(super().token_grid(transformer, inputs), frames_apart=True)

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros: as for Wan, the poses of all frames but the first, and the face in each frame of the video."""
        config, like = transformer.config, transformer.proj_out.weight
        inputs = super().example_inputs(transformer, latent_size, batch=batch, text_tokens=text_tokens)
        frames, height, width = latent_size
        edge, faces = config.motion_encoder_size, max((frames - 2) * MOTION_STRIDE + 1, 1)
        channels = config.latent_channels or (config.in_channels - 4) // 2
        inputs["pose_hidden_states"] = like.new_zeros(batch, channels, frames - 1, height, width)
        inputs["face_pixel_values"] = like.new_zeros(batch, 3, faces, edge, edge)
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the patches of the latent and, from the second frame on, of the poses."""
        permuted = super().permute_inputs(transformer, inputs, permutation)
        grid = self.token_grid(transformer, inputs)
        frame = grid.height * grid.width
        permuted["pose_hidden_states"] = permute_patches(
            inputs["pose_hidden_states"], transformer.config.patch_size, permutation[frame:] - frame
        )
        return permuted


FAMILIES = (WanAnimateFamily(),)
"""Families of this module, for the registry."""
