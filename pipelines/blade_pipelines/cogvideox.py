"""Adapter for Diffusers' CogVideoX transformers: joint attention over video and text, RoPE or learned positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import (
    Attention,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
)
from diffusers.models.transformers.cogvideox_transformer_3d import CogVideoXTransformer3DModel
from torch import nn

from blade.families.protocol import Condition, Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit, SplitModule
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.shared.processor import SparseProcessor, norm_and_rope


class CogVideoXSparseProcessor(SparseProcessor):
    """Joint attention of a CogVideoX block with BLADE."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: tuple[torch.Tensor, torch.Tensor] = self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense
        if attention_mask is not None:
            raise ValueError("A sparse CogVideoX layer takes no `attention_mask`.")

        video = hidden_states.shape[1]
        tokens = torch.cat((hidden_states, encoder_hidden_states), dim=1)
        if attn.fused_projections:
            query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        cos, sin = (None, None) if image_rotary_emb is None else image_rotary_emb
        places = self.layer.places()
        query, key = (
            norm_and_rope(tensor, norm, "layer", cos, sin, places)
            for tensor, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )

        output = self.layer.attend(query, key, value, places=places).flatten(2, 3).type_as(query)
        output = attn.to_out[1](attn.to_out[0](output))
        return output[:, :video], output[:, video:]


class CogVideoXFamily(DiffusersFamily):
    """Adapter for `CogVideoXTransformer3DModel`: 2B, 5B and 1.5-5B, text, image and video to video.

    The model puts the text before the video. Inside attention the video comes first, so that blocks are aligned with
    its start. Source of that order: BLADE, arXiv 2508.10774.
    """

    name = "CogVideoX (CogVideoXTransformer3DModel)"
    guidance_takes_two_passes = True
    batched_guidance = "BFCHW"
    transformers = (CogVideoXTransformer3DModel,)
    processors = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)
    sparse_processor = CogVideoXSparseProcessor
    attention_name = "attn1"
    time_embedding_name = "time_embedding"
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {
        ("CogVideoXPipeline", "video"): "CogVideoXVideoToVideoPipeline"
    }

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the preset for the model's version and size."""
        if transformer.config.patch_size_t is not None:
            return "cogvideox-1.5"
        return "cogvideox-5b" if transformer.config.num_attention_heads == 48 else "cogvideox"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the settings recommended for CogVideoX.

        Source: the model cards of CogVideoX (49 frames of 480 x 720 at 8 fps) and CogVideoX 1.5 (81 frames of
        768 x 1360 at 16 fps).
        """
        if pipe.transformer.config.patch_size_t is not None:
            return SamplingDefaults(height=768, width=1360, frames=81, fps=16, steps=50, guidance_scale=6.0)
        return SamplingDefaults(height=480, width=720, frames=49, fps=8, steps=50, guidance_scale=6.0)

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a latent (B, F, C, H, W), followed by the text."""
        latent = inputs["hidden_states"]
        if latent.ndim != 5:
            raise ValueError(f"`hidden_states` must be (B, F, C, H, W), got shape {tuple(latent.shape)}.")
        sizes = (latent.shape[1], *latent.shape[3:])
        frames, height, width = (size // patch for size, patch in zip(sizes, _patch(transformer)))
        return TokenGrid(frames, height, width, text_after=inputs["encoder_hidden_states"].shape[1])

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros; the pipeline pads text to the model's maximum length, and frames to whole patches."""
        config, like, patch = transformer.config, transformer.proj_out.weight, _patch(transformer)
        frames, height, width = latent_size
        frames = -(-frames // patch[0]) * patch[0]
        text_tokens = text_tokens or config.max_text_seq_length
        inputs = {
            "hidden_states": like.new_zeros(batch, frames, config.in_channels, height, width),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, config.text_embed_dim),
            "timestep": like.new_zeros(batch),
        }
        if config.use_rotary_positional_embeddings:
            tokens = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
            table = torch.zeros(tokens, config.attention_head_dim, device=like.device)
            inputs["image_rotary_emb"] = (table, table)
        if config.ofs_embed_dim is not None:
            inputs["ofs"] = like.new_zeros(1)
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the rotary tables, (tokens, D) each; the tokens themselves are permuted after embedding."""
        tables = inputs.get("image_rotary_emb")
        if tables is None:
            return inputs
        return {**inputs, "image_rotary_emb": tuple(table.index_select(0, permutation) for table in tables)}

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the patches of the predicted latent (B, F, C, H, W) back into raster order."""
        latent = output[0] if isinstance(output, tuple) else output.sample
        latent = permute_patches(latent.transpose(1, 2), _patch(transformer), inverse).transpose(1, 2)
        return (latent, *output[1:]) if isinstance(output, tuple) else type(output)(sample=latent)

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return where video and text are cut, each by itself; Diffusers has no plan."""
        return SequenceSplit(
            modules=(
                SplitModule(name="", inputs={"image_rotary_emb": 0}),
                SplitModule(name="transformer_blocks.0", inputs={"hidden_states": 1, "encoder_hidden_states": 1}),
                SplitModule(name="proj_out", gathered_output=1),
            ),
            text_apart=True,
        )

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the output tokens of the patch embedding, which adds the learned positions."""

        def follow(module: nn.Module, args: Any, tokens: torch.Tensor) -> torch.Tensor:
            order = permutation()
            if order is None:
                return tokens
            text = tokens.shape[1] - len(order)
            return torch.cat((tokens[:, :text], tokens[:, text:].index_select(1, order)), dim=1)

        return [transformer.patch_embed.register_forward_hook(follow)]


def _patch(transformer: DiffusersModule) -> tuple[int, int, int]:
    """Return the patch size along frames, height and width."""
    config = transformer.config
    return config.patch_size_t or 1, config.patch_size, config.patch_size


FAMILIES = (CogVideoXFamily(),)
"""Families of this module, for the registry."""
