"""Adapter for Diffusers' LTX-Video transformers: latents packed into tokens, rotary tables across all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_ltx import (
    LTXAttention,
    LTXVideoAttnProcessor,
    LTXVideoTransformer3DModel,
    apply_rotary_emb,
)
from torch import nn

from blade.families.protocol import Condition, Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit, SplitModule
from blade.token_grid import TokenGrid
from blade_pipelines.shared.coordinates import grid_of_coordinates
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions, (B, tokens, heads * D) each."""

NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
"""Negative prompt recommended by LTX-Video."""

ORIGINAL_NAMES = (
    (r"^proj_in$", "patchify_proj"),
    (r"^time_embed\.", "adaln_single."),
    (r"\.norm_(q|k)$", r".\1_norm"),
)
"""Names in LTX-Video's own code. Source: `scripts/convert_ltx_to_diffusers.py` of Diffusers."""


class LTXVideoSparseProcessor(SparseProcessor):
    """Self-attention of an LTX-Video block with BLADE."""

    def __call__(
        self,
        attn: LTXAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("A sparse LTX-Video layer takes neither `encoder_hidden_states` nor an `attention_mask`.")

        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:  # frequencies differ between heads, so `norm_and_rope` does not apply
            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        output = self.layer.attend(query, key, value).flatten(2, 3).type_as(query)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


class LTXVideoFamily(DiffusersFamily):
    """Adapter for `LTXVideoTransformer3DModel`: text, image and conditions to video, with timesteps of single tokens.

    The tokens of the video that is made form the grid; condition tokens beside it are kept exactly.
    """

    name = "LTX-Video (LTXVideoTransformer3DModel)"
    guidance_takes_two_passes = True
    batched_guidance = "tokens"
    whole_sequence = True
    transformers = (LTXVideoTransformer3DModel,)
    processors = (LTXVideoAttnProcessor,)
    sparse_processor = LTXVideoSparseProcessor
    attention_name = "attn1"
    time_embedding_name = "time_embed.emb.timestep_embedder"
    original_names = ORIGINAL_NAMES
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {
        ("LTXPipeline", "image"): "LTXImageToVideoPipeline"
    }

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "ltx-video"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return LTX-Video's frame rate and negative prompt; Diffusers' pipelines set the rest.

        Source: the documentation of Diffusers' `LTXPipeline`.
        """
        return SamplingDefaults(fps=25, negative_prompt=NEGATIVE_PROMPT)

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid given by `num_frames`, `height` and `width`, or else by the tokens' coordinates.

        `LTXConditionPipeline` puts condition tokens before the video's, and `LTXI2VLongMultiPromptPipeline` those of
        earlier windows behind them. Only cross-attention sees the text.
        """
        frames, height, width = (inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
        tokens = inputs["hidden_states"].shape[1]
        if frames * height * width == tokens:
            return TokenGrid(frames, height, width)
        coordinates = inputs.get("video_coords")
        if coordinates is None or coordinates.shape[2] != tokens:
            raise ValueError(
                f"`num_frames`, `height` and `width`, or `video_coords`, must say how {tokens} tokens lie, got "
                f"{frames}, {height}, {width} and {'none' if coordinates is None else tuple(coordinates.shape)}."
            )
        return grid_of_coordinates(coordinates)

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros; the pipeline pads the text to 128 tokens."""
        config, like = transformer.config, transformer.proj_out.weight
        frames, height, width = latent_size
        text_tokens = text_tokens or 128
        return {
            "hidden_states": like.new_zeros(batch, frames * height * width, config.in_channels),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, config.caption_channels),
            "timestep": like.new_zeros(batch),
            "encoder_attention_mask": like.new_ones(batch, text_tokens),
            "num_frames": frames,
            "height": height,
            "width": width,
        }

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the tokens and per-token timesteps."""
        permuted = {**inputs, "hidden_states": inputs["hidden_states"].index_select(1, permutation)}
        if inputs["timestep"].ndim > 1 and inputs["timestep"].shape[1] == len(permutation):
            permuted["timestep"] = inputs["timestep"].index_select(1, permutation)
        return permuted

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the predicted tokens back into raster order."""
        if isinstance(output, tuple):
            return (output[0].index_select(1, inverse), *output[1:])
        return type(output)(sample=output.sample.index_select(1, inverse))

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return the places of Diffusers' own plan; timesteps of single tokens are cut too, and the text is whole."""
        return SequenceSplit(
            modules=(
                SplitModule(name="", inputs={"hidden_states": 1, "timestep": 1}),
                SplitModule(name="rope", cut_output=1),
                SplitModule(name="proj_out", gathered_output=1),
            )
        )

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables that the rope module returns."""

        def follow(module: nn.Module, args: Any, tables: Tables) -> tuple[torch.Tensor, ...]:
            order = permutation()
            return tables if order is None else tuple(table.index_select(1, order) for table in tables)

        return [transformer.rope.register_forward_hook(follow)]


FAMILIES = (LTXVideoFamily(),)
"""Families of this module, for the registry."""
