"""Adapter for Diffusers' AnyFlow transformers: Wan's, told where a step ends beside where it begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow import (
    AnyFlowAttention,
    AnyFlowAttnProcessor,
    AnyFlowTransformer3DModel,
    apply_rotary_emb,
)
from torch import nn

from blade.families.protocol import Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.shared.processor import SparseProcessor
from blade_pipelines.wan import WanFamily


class AnyFlowSparseProcessor(SparseProcessor):
    """Self-attention of an AnyFlow block with BLADE."""

    def __call__(
        self,
        attn: AnyFlowAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
            return dense
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("A sparse AnyFlow layer takes neither `encoder_hidden_states` nor an `attention_mask`.")

        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:  # complex numbers of double precision, so `norm_and_rope` does not apply
            query, key = (
                apply_rotary_emb(tensor.transpose(1, 2), rotary_emb[name]).transpose(1, 2)
                for tensor, name in ((query, "query"), (key, "key"))
            )
        output = self.layer.attend(query, key, value).flatten(2, 3).type_as(query)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


class AnyFlowFamily(WanFamily):
    """Adapter for `AnyFlowTransformer3DModel`: text to video in any number of steps, by a map along the flow.

    The latent is (B, F, C, H, W). Timesteps belong to frames; the embedding of the conditions repeats theirs for the
    tokens of each frame, and a hook on it lets these follow the token order.
    """

    name = "AnyFlow (AnyFlowTransformer3DModel)"
    batched_guidance = "BFCHW"
    transformers = (AnyFlowTransformer3DModel,)
    processors = (AnyFlowAttnProcessor,)
    sparse_processor = AnyFlowSparseProcessor
    original_names = ()  # AnyFlow's own code has Diffusers' names

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "anyflow"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the steps and the frame rate of AnyFlow's documentation in Diffusers."""
        return SamplingDefaults(steps=4, fps=16)

    def call_options(self, pipe: Any, request: Any) -> Mapping[str, Any]:
        """Return none.

        Raises:
            ValueError: for a video, which the pipeline keeps as the first frames of its own.
        """
        if request.video is not None:
            raise ValueError(
                "`video` must not be given: an AnyFlowPipeline keeps it as the first frames of the one that it makes. "
                "Call the pipeline from Python for that; `apply_blade` works with it."
            )
        return {}

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a latent (B, F, C, H, W); only cross-attention sees the text."""
        latent = inputs["hidden_states"]
        if latent.ndim != 5:
            raise ValueError(f"`hidden_states` must be (B, F, C, H, W), got shape {tuple(latent.shape)}.")
        return super().token_grid(transformer, {**inputs, "hidden_states": latent.transpose(1, 2)})

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros, as for Wan, with the frames before the channels and two timesteps for each frame."""
        inputs = super().example_inputs(transformer, latent_size, batch=batch, text_tokens=text_tokens)
        inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)
        like = transformer.proj_out.weight
        inputs["timestep"], inputs["r_timestep"] = (like.new_zeros(batch, latent_size[0]) for _ in range(2))
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the latent's patches."""
        return {**inputs, "hidden_states": self._permute(transformer, inputs["hidden_states"], permutation)}

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the patches of the predicted latent back into raster order."""
        if isinstance(output, tuple):
            return (self._permute(transformer, output[0], inverse), *output[1:])
        return type(output)(sample=self._permute(transformer, output.sample, inverse))

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables, (1, 1, S, D / 2), and the embedded timesteps, (B, S, channels)."""

        def follow_positions(module: nn.Module, args: Any, tables: dict[str, torch.Tensor]) -> Any:
            order = permutation()
            if order is None:
                return tables
            return {name: table.index_select(2, order) for name, table in tables.items()}

        def follow_times(module: nn.Module, args: Any, embedded: tuple[torch.Tensor, ...]) -> Any:
            order = permutation()
            if order is None:
                return embedded
            return (*(times.index_select(1, order) for times in embedded[:2]), *embedded[2:])

        return [
            transformer.rope.register_forward_hook(follow_positions),
            transformer.condition_embedder.register_forward_hook(follow_times),
        ]

    def _permute(self, transformer: DiffusersModule, latent: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """Reorder the patches of a latent (B, F, C, H, W)."""
        return permute_patches(latent.transpose(1, 2), transformer.config.patch_size, order).transpose(1, 2)


FAMILIES = (AnyFlowFamily(),)
"""Families of this module, for the registry."""
