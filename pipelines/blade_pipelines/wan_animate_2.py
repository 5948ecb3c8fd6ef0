"""Adapter for Diffusers' Wan-Animate-2 transformers: every frame also attends to that frame of a reference video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan_animate_2 import (
    WanAnimate2Attention,
    WanAnimate2AttnProcessor,
    WanAnimate2KVCache,
    WanAnimate2KVLayerCache,
    WanAnimate2Transformer3DModel,
    rope_apply,
)
from torch import nn

from blade.families.protocol import Inputs, Permutation
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.processor import SparseProcessor
from blade_pipelines.wan import TINY_DECODERS

LATENT_FRAMES = 4
"""Frames of the video that become one of the latent."""
TOKEN_AREA = 16 * 16
"""Pixels of a frame that become one token."""


class WanAnimate2SparseProcessor(SparseProcessor):
    """Self-attention of a Wan-Animate-2 block with BLADE.

    Tokens are in raster order outside of it, as Diffusers works out their positions and masks from their places.
    """

    order: torch.Tensor | None = None
    """The token order in force."""

    def __call__(
        self,
        attn: WanAnimate2Attention,
        hidden_states: torch.Tensor,
        rotary_emb: torch.Tensor,
        grid_sizes: torch.Tensor,
        kv_cache: WanAnimate2KVLayerCache,
        kv_cache_mode: str,
        rope_stride: int = 1,
        reference_rotary_emb: torch.Tensor | None = None,
        reference_grid_sizes: torch.Tensor | None = None,
        reference_rope_stride: int = 1,
        attention_mask: Any = None,
        origin_latent_frames: int | None = None,
        origin_latent_hw: int | None = None,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(
                attn, hidden_states, rotary_emb, grid_sizes, kv_cache, kv_cache_mode, rope_stride,
                reference_rotary_emb, reference_grid_sizes, reference_rope_stride, attention_mask,
                origin_latent_frames, origin_latent_hw,
            )  # fmt: skip
            return dense

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        frame_keys = None
        if kv_cache_mode == "extract":
            kv_cache.store(key, value)
        else:
            frame_keys = _reference(kv_cache, reference_grid_sizes, reference_rotary_emb, reference_rope_stride)
        query, key = (rope_apply(part, grid_sizes, rotary_emb, rope_stride).type_as(value) for part in (query, key))
        order = self.order
        assert order is not None  # a sparse pass has a plan
        query, key, value = (tensor.index_select(1, order) for tensor in (query, key, value))
        output = self.layer.attend(query, key, value, frame_keys=frame_keys).index_select(1, order.argsort())
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output.flatten(2, 3).type_as(query)))
        return projected


class WanAnimate2Family(DiffusersFamily):
    """Adapter for `WanAnimate2Transformer3DModel`: animates a character as a driving video moves.

    A pass over the driving video fills a cache of keys; then every frame that is made attends to all of its own
    video, sparsely, and to its frame of the other, whole. The first frame is the character's.
    """

    name = "Wan-Animate-2 (WanAnimate2Transformer3DModel)"
    guidance_takes_two_passes = True
    transformers = (WanAnimate2Transformer3DModel,)
    processors = (WanAnimate2AttnProcessor,)
    sparse_processor = WanAnimate2SparseProcessor
    attention_name = "self_attn"
    time_embedding_name = "time_embedding"
    tiny_decoders = TINY_DECODERS

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "wan-animate-2"

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the transformer's blocks."""
        return list(transformer.blocks)

    def head_dim(self, transformer: DiffusersModule) -> int:
        """Return the numbers in one head of one token."""
        size: int = transformer.config.dim // transformer.config.num_heads
        return size

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a list of latents (C, F, H, W), frame by frame."""
        sizes = {tuple(latent.shape[1:]) for latent in inputs["hidden_states"]}
        if len(sizes) != 1 or len(min(sizes)) != 3:
            raise ValueError(f"`hidden_states` must be latents (C, F, H, W) of one size, got sizes {sorted(sizes)}.")
        frames, height, width = (size // patch for size, patch in zip(min(sizes), transformer.config.patch_size))
        return TokenGrid(frames, height, width, frames_apart=True)

    def pass_dense_reason(self, transformer: DiffusersModule, inputs: Inputs) -> str | None:
        """Return that the segment is smaller than the mask of the whole video, which then lets zeros in; else None."""
        if inputs["kv_cache_mode"] == "extract":
            return None
        grid = self.token_grid(transformer, inputs)
        frames = inputs["origin_len"] // LATENT_FRAMES + 1
        height, width = inputs["origin_area"]
        reference = [int(side) for side in inputs["reference_grid_sizes"][0]]
        if (
            grid.frames == frames + 1
            and grid.height * grid.width == height * width // TOKEN_AREA
            and reference == [frames, grid.height, grid.width]
        ):
            return None
        return (
            f"{grid.frames} frames of {grid.height} x {grid.width} tokens and {reference} of the reference do not "
            f"fill the mask, which is for {frames} frames of {height} x {width} pixels"
        )

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros for the pass over a driving video, which attends as the generation does but to the reference.

        The generation's own pass needs the keys that this one leaves in the cache.
        """
        config, like = transformer.config, transformer.patch_embedding.weight
        sides = [size // patch for size, patch in zip(latent_size, config.patch_size)]
        inputs = {
            "hidden_states": [like.new_zeros(config.out_dim, *latent_size) for _ in range(batch)],
            "condition_latents": [like.new_zeros(config.in_dim - config.out_dim, *latent_size) for _ in range(batch)],
            "timestep": like.new_zeros(batch),
            "encoder_hidden_states": [
                like.new_zeros(text_tokens or config.text_len, config.text_dim) for _ in range(batch)
            ],
            "kv_cache": WanAnimate2KVCache(config.num_layers),
            "kv_cache_mode": "extract",
            "seq_len": sides[0] * sides[1] * sides[2],
            "offset_grid_sizes": torch.tensor([sides] * batch),
        }
        if config.use_img_emb:
            inputs["encoder_hidden_states_image"] = like.new_zeros(batch, 257, 1280)
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Return the inputs as they are: tokens are put into order inside each layer."""
        return inputs

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Return the output as it is."""
        return output

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Tell every processor the token order before its layer runs."""

        def tell(module: DiffusersModule, args: Any) -> None:
            order = permutation()  # None when a backward pass recomputes the layer
            if order is not None and isinstance(module.processor, WanAnimate2SparseProcessor):
                module.processor.order = order

        return [module.register_forward_pre_hook(tell) for module in self.attention_layers(transformer)]


def _reference(
    kv_cache: WanAnimate2KVLayerCache, grid_sizes: Any, rotary_emb: Any, rope_stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cached keys and values by frame, (B, F, tokens of a frame, H, D), the keys rotated."""
    key, value = kv_cache.get()
    key = rope_apply(key, grid_sizes, rotary_emb, rope_stride).type_as(value)
    frames = int(grid_sizes[0][0])
    return key.unflatten(1, (frames, -1)), value.unflatten(1, (frames, -1))


FAMILIES = (WanAnimate2Family(),)
"""Families of this module, for the registry."""
