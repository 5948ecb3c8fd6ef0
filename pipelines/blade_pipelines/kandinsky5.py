"""Adapter for Diffusers' Kandinsky 5 transformers: visual blocks of self-attention, with NABLA or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5Attention,
    Kandinsky5AttnProcessor,
    Kandinsky5Transformer3DModel,
)
from torch import nn

from blade.families.protocol import Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.shared.processor import SparseProcessor

TEXT_TOKENS = 512
"""Longest text of the pipelines."""
LEAST_IMAGE_FRAMES = 17
"""Five latent frames: fewer make the first ones of a video from an image not-a-number in Diffusers."""


class Kandinsky5SparseProcessor(SparseProcessor):
    """Self-attention of a visual block of Kandinsky 5 with BLADE."""

    def __call__(
        self,
        attn: Kandinsky5Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        rotary_emb: torch.Tensor | None = None,
        sparse_params: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
            return dense
        if encoder_hidden_states is not None or sparse_params is not None:
            raise ValueError(
                "A sparse Kandinsky 5 layer takes neither `encoder_hidden_states` nor Diffusers' `sparse_params`."
            )

        query, key, value = (
            project(hidden_states).unflatten(2, (attn.num_heads, -1))
            for project in (attn.to_query, attn.to_key, attn.to_value)
        )
        query, key = (
            _rotate(norm(tensor.float()).type_as(tensor), rotary_emb)
            for tensor, norm in ((query, attn.query_norm), (key, attn.key_norm))
        )
        projected: torch.Tensor = attn.out_layer(self.layer.attend(query, key, value).flatten(2, 3))
        return projected


class Kandinsky5Family(DiffusersFamily):
    """Adapter for `Kandinsky5Transformer3DModel`: text and image to video; its text blocks stay dense.

    The latent is (B, F, H, W, C). Models of ten seconds have a block-sparse attention of their own, NABLA, which
    BLADE stands in for: in a run that is sparse anywhere, dense layers and steps attend to everything.
    """

    name = "Kandinsky 5 (Kandinsky5Transformer3DModel)"
    guidance_takes_two_passes = True
    transformers = (Kandinsky5Transformer3DModel,)
    processors = (Kandinsky5AttnProcessor,)
    sparse_processor = Kandinsky5SparseProcessor
    attention_name = "self_attention"
    time_embedding_name = "time_embeddings"

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "kandinsky5"

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return that FirstBlockCache fails at the first step, where it asks for `hidden_states`; None for others."""
        if cache == "first-block":
            return f"FirstBlockCache is broken for a {type(transformer).__name__} in Diffusers itself"
        return None

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the frame rate of Kandinsky 5's documentation in Diffusers, whose pipelines set the rest."""
        return SamplingDefaults(fps=24)

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return none.

        Raises:
            ValueError: for a video from an image that is too short for Diffusers' pipeline.
        """
        if _is_from_image(pipe) and request.frames < LEAST_IMAGE_FRAMES:
            raise ValueError(
                f"`frames` must be at least {LEAST_IMAGE_FRAMES} for a Kandinsky5I2VPipeline, which compares the "
                f"first four latent frames with later ones, got {request.frames}."
            )
        return {}

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the visual blocks."""
        return list(transformer.visual_transformer_blocks)

    def heads(self, attention: DiffusersModule) -> int:
        """Return the number of heads."""
        heads: int = attention.num_heads
        return heads

    def head_dim(self, transformer: DiffusersModule) -> int:
        """Return the numbers in one head of one token: those of all axes' positions."""
        return sum(transformer.config.axes_dims)

    def output_projection(self, attention: DiffusersModule) -> torch.Tensor | None:
        """Return the weight of `out_layer`, or None if it is stored in fewer bits."""
        weight = getattr(attention.out_layer, "weight", None)
        return weight if isinstance(weight, torch.Tensor) and weight.is_floating_point() else None

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a latent (B, F, H, W, C); only cross-attention sees the text."""
        latent = inputs["hidden_states"]
        if latent.ndim != 5:
            raise ValueError(f"`hidden_states` must be (B, F, H, W, C), got shape {tuple(latent.shape)}.")
        return TokenGrid(*(size // patch for size, patch in zip(latent.shape[1:4], transformer.config.patch_size)))

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros, with the pipeline's longest text and no sparse parameters."""
        config, like = transformer.config, transformer.out_layer.out_layer.weight
        text_tokens = text_tokens or TEXT_TOKENS
        channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
        sizes = [size // patch for size, patch in zip(latent_size, config.patch_size)]
        return {
            "hidden_states": like.new_zeros(batch, *latent_size, channels),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, config.in_text_dim),
            "timestep": like.new_zeros(batch),
            "pooled_projections": like.new_zeros(batch, config.in_text_dim2),
            "visual_rope_pos": [torch.arange(size, device=like.device) for size in sizes],
            "text_rope_pos": torch.arange(text_tokens, device=like.device),
        }

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the latent's patches, and leave out the parameters of NABLA, which would put them in its order."""
        latent = _permute(transformer, inputs["hidden_states"], permutation)
        return {**inputs, "hidden_states": latent, "sparse_params": None}

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the patches of the predicted latent back into raster order."""
        if isinstance(output, torch.Tensor):  # without `return_dict`
            return _permute(transformer, output, inverse)
        return type(output)(sample=_permute(transformer, output.sample, inverse))

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables, (B, F, H, W, 1, D / 2, 2, 2), that the visual rope module returns."""

        def follow(module: nn.Module, args: Any, table: torch.Tensor) -> torch.Tensor:
            order = permutation()
            if order is None:
                return table
            return table.flatten(1, 3).index_select(1, order).view_as(table)

        return [transformer.visual_rope_embeddings.register_forward_hook(follow)]


def _is_from_image(pipe: Any) -> bool:
    """Return whether a pipeline makes videos from images; older versions of Diffusers have none that does."""
    import diffusers

    return isinstance(pipe, getattr(diffusers, "Kandinsky5I2VPipeline", ()))


def _rotate(tensor: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Rotate queries or keys, (B, S, H, D), by matrices, (B, S, 1, D / 2, 2, 2), and round them as Diffusers does."""
    if rope is None:
        return tensor
    pairs = tensor.float().unflatten(-1, (-1, 1, 2))
    rotated: torch.Tensor = (rope * pairs).sum(dim=-1).flatten(-2).to(torch.bfloat16).type_as(tensor)
    return rotated


def _permute(transformer: DiffusersModule, latent: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Reorder the patches of a latent (B, F, H, W, C)."""
    return permute_patches(latent.movedim(-1, 1), transformer.config.patch_size, order).movedim(1, -1)


FAMILIES = (Kandinsky5Family(),)
"""Families of this module, for the registry."""
