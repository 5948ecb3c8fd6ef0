"""Adapter for Diffusers' FramePack transformers: HunyuanVideo's, with earlier frames in front of the video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video_framepack import HunyuanVideoFramepackTransformer3DModel
from torch import nn

from blade.families.protocol import Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade_pipelines.hunyuan_video import (
    ORIGINAL_NAMES,
    AssumeUnmasked,
    HunyuanVideoFamily,
    HunyuanVideoSparseProcessor,
    Tables,
)
from blade_pipelines.shared.diffusers_module import DiffusersModule

HISTORY = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 16}
"""Frames of the earlier video in the pipeline, by the input that holds them."""

HISTORY_PATCHES = {"latents_clean": (1, 2, 2), "latents_history_2x": (2, 4, 4), "latents_history_4x": (4, 8, 8)}
"""Sizes of their patches along frames, height and width."""

IMAGE_TOKENS = 729
"""Tokens of the image from the pipeline's encoder, SigLIP with 27 x 27 patches."""


class FramepackSparseProcessor(HunyuanVideoSparseProcessor):
    """Attention of a FramePack block with BLADE: the earlier frames go behind the video, where text is."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; same signature as Diffusers' processor."""
        tables = image_rotary_emb
        if not self.layer.attends:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, tables)
        grid = self.layer.grid
        history = hidden_states.shape[1] - grid.video_tokens
        # a graph does not know where a single text was cut off
        torch._check(encoder_hidden_states.shape[1] == grid.text_tokens - history)
        hidden_states = hidden_states.roll(-history, dims=1)
        if tables is not None:
            tables = (tables[0].roll(-history, dims=0), tables[1].roll(-history, dims=0))
        video, text = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, tables)
        return video.roll(history, dims=1), text


class FramepackFamily(HunyuanVideoFamily):
    """Adapter for `HunyuanVideoFramepackTransformer3DModel`: image to video, a section of frames after the other.

    The tokens of earlier frames, in three sizes of patches, stand before those of the section. Self-attention keeps
    them all, as it keeps text, so that BLADE leaves out pairs inside the section alone.
    """

    name = "FramePack (HunyuanVideoFramepackTransformer3DModel)"
    transformers = (HunyuanVideoFramepackTransformer3DModel,)
    sparse_processor = FramepackSparseProcessor
    original_names = ORIGINAL_NAMES

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "framepack"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return FramePack's frame rate, steps and guidance. Source: FramePack's example in Diffusers."""
        return SamplingDefaults(fps=30, steps=30, guidance_scale=9.0)

    def sequence_split(self, transformer: DiffusersModule) -> None:
        """Return None: the tokens of earlier frames cannot be split."""

    def plan_problem(self, pipe: Any) -> str | None:
        """Return that a video is made in sections."""
        return "it makes a video in sections of frames, and how many depends on its call"

    def text_tokens(self, inputs: Inputs) -> int:
        """Return the number of tokens behind the video: earlier frames, the image and the text.

        Of a single video, the transformer cuts off the padding of the text.
        """
        mask = inputs["encoder_attention_mask"]
        text = mask.shape[1] if len(mask) > 1 or mask.is_meta else int(mask.sum())
        history: int = sum(
            math.prod(-(-size // patch) for size, patch in zip(inputs[name].shape[2:], patches))
            for name, patches in HISTORY_PATCHES.items()
        )
        return history + int(inputs["image_embeds"].shape[1]) + text

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros, as for HunyuanVideo, with the pipeline's image and as many earlier frames as it has."""
        config, like = transformer.config, transformer.proj_out.weight
        inputs = super().example_inputs(transformer, latent_size, batch=batch, text_tokens=text_tokens)
        frames, height, width = latent_size
        inputs["image_embeds"] = like.new_zeros(batch, IMAGE_TOKENS, config.image_proj_dim)
        inputs["indices_latents"] = torch.arange(frames, device=like.device)
        for name, count in HISTORY.items():
            inputs[name] = like.new_zeros(batch, config.in_channels, count, height, width)
            inputs[f"indices_{name}"] = torch.arange(count, device=like.device)
        return inputs

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context in which no text is padded: the forward pass cuts the padding off."""
        return AssumeUnmasked()

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables that the rope module returns for the section, which are the first after its patches."""
        of_section = [False]

        def embed(module: nn.Module, args: Any) -> None:
            of_section[0] = True

        def follow(module: nn.Module, args: Any, tables: Tables) -> tuple[torch.Tensor, ...]:
            order, is_section = permutation(), of_section[0]
            of_section[0] = False
            if order is None or not is_section:
                return tables
            return tuple(table.index_select(0, order) for table in tables)

        return [
            transformer.x_embedder.register_forward_pre_hook(embed),
            transformer.rope.register_forward_hook(follow),
        ]


FAMILIES = (FramepackFamily(),)
"""Families of this module, for the registry."""
