"""Adapters for Diffusers' HunyuanVideo transformers: dual- and single-stream blocks, with masked text at the end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_hunyuan_video import (
    HunyuanVideoAttnProcessor2_0,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.transformers.transformer_hunyuan_video15 import (
    HunyuanVideo15AttnProcessor2_0,
    HunyuanVideo15Transformer3DModel,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from blade.families.protocol import Inputs, Permutation, RowOrder
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit, SplitModule
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.shared.processor import SparseProcessor, norm_and_rope

Tables = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines of the positions of the video tokens, (tokens, D) each."""

TINY_DECODERS: dict[int, tuple[str, ...]] = {16: ("taehv",)}
"""Of HunyuanVideo. Source: the README of https://github.com/madebyollin/taehv."""
TINY_DECODERS_15: dict[int, tuple[str, ...]] = {32: ("taehv1_5", "taehv1_5_super")}
"""Of HunyuanVideo-1.5; the same source."""
ROW_ORDERS: tuple[tuple[str, RowOrder], ...] = ((r"^final_layer\.adaLN_modulation\.1$", "swapped-halves"),)
"""Shift and scale are the other way round. Source: `convert_hunyuan_video_transformer_to_diffusers` of Diffusers."""

_DOUBLE, _SINGLE = r"^transformer_blocks\.(\d+)\.", r"^single_transformer_blocks\.(\d+)\."
_REFINER = r"^context_embedder\.token_refiner\.refiner_blocks\.(\d+)\."
_ORIGINAL_REFINER = r"txt_in.individual_token_refiner.blocks.\1."
ORIGINAL_NAMES = (
    *((rf"{_DOUBLE}attn\.to_{part}$", r"double_blocks.\1.img_attn_qkv") for part in "qkv"),
    *((rf"{_DOUBLE}attn\.add_{part}_proj$", r"double_blocks.\1.txt_attn_qkv") for part in "qkv"),
    *((rf"{_SINGLE}attn\.to_{part}$", r"single_blocks.\1.linear1") for part in "qkv"),
    (rf"{_SINGLE}proj_mlp$", r"single_blocks.\1.linear1"),
    *((rf"{_REFINER}attn\.to_{part}$", rf"{_ORIGINAL_REFINER}self_attn_qkv") for part in "qkv"),
    (rf"{_DOUBLE}attn\.to_out\.0$", r"double_blocks.\1.img_attn_proj"),
    (rf"{_DOUBLE}attn\.to_add_out$", r"double_blocks.\1.txt_attn_proj"),
    (rf"{_DOUBLE}attn\.norm_(q|k)$", r"double_blocks.\1.img_attn_\2_norm"),
    (rf"{_DOUBLE}attn\.norm_added_(q|k)$", r"double_blocks.\1.txt_attn_\2_norm"),
    (rf"{_DOUBLE}norm1\.linear$", r"double_blocks.\1.img_mod.linear"),
    (rf"{_DOUBLE}norm1_context\.linear$", r"double_blocks.\1.txt_mod.linear"),
    (rf"{_DOUBLE}ff\.net\.0\.proj$", r"double_blocks.\1.img_mlp.fc1"),
    (rf"{_DOUBLE}ff\.net\.2$", r"double_blocks.\1.img_mlp.fc2"),
    (rf"{_DOUBLE}ff_context\.net\.0\.proj$", r"double_blocks.\1.txt_mlp.fc1"),
    (rf"{_DOUBLE}ff_context\.net\.2$", r"double_blocks.\1.txt_mlp.fc2"),
    (rf"{_SINGLE}proj_out$", r"single_blocks.\1.linear2"),
    (rf"{_SINGLE}norm\.linear$", r"single_blocks.\1.modulation.linear"),
    (rf"{_SINGLE}attn\.norm_(q|k)$", r"single_blocks.\1.\2_norm"),
    (rf"{_REFINER}attn\.to_out\.0$", rf"{_ORIGINAL_REFINER}self_attn_proj"),
    (rf"{_REFINER}ff\.net\.0\.proj$", rf"{_ORIGINAL_REFINER}mlp.fc1"),
    (rf"{_REFINER}ff\.net\.2$", rf"{_ORIGINAL_REFINER}mlp.fc2"),
    (rf"{_REFINER}norm_out\.linear$", rf"{_ORIGINAL_REFINER}adaLN_modulation.1"),
    (rf"{_REFINER}", _ORIGINAL_REFINER),
    (r"^context_embedder\.proj_in$", "txt_in.input_embedder"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1$", "txt_in.t_embedder.mlp.0"),
    (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2$", "txt_in.t_embedder.mlp.2"),
    (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
    (r"^x_embedder\.", "img_in."),
    (r"^time_text_embed\.timestep_embedder\.linear_1$", "time_in.mlp.0"),
    (r"^time_text_embed\.timestep_embedder\.linear_2$", "time_in.mlp.2"),
    (r"^time_text_embed\.guidance_embedder\.linear_1$", "guidance_in.mlp.0"),
    (r"^time_text_embed\.guidance_embedder\.linear_2$", "guidance_in.mlp.2"),
    (r"^time_text_embed\.text_embedder\.linear_1$", "vector_in.in_layer"),
    (r"^time_text_embed\.text_embedder\.linear_2$", "vector_in.out_layer"),
    (r"^proj_out$", "final_layer.linear"),
    (r"^norm_out\.linear$", "final_layer.adaLN_modulation.1"),
)
"""Names in HunyuanVideo's own code, but of the last layer's modulation, whose halves are swapped in Diffusers.
Source: `scripts/convert_hunyuan_video_to_diffusers.py` of Diffusers."""


class HunyuanVideoSparseProcessor(SparseProcessor):
    """Attention of a dual- or single-stream HunyuanVideo block with BLADE."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: Tables | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend; same signature as Diffusers' processor.

        The mask marks the end of each batch item's text: (B, 1, 1, S) or, in HunyuanVideo-1.5, over the text only,
        (B, text).
        """
        if not self.layer.attends:
            self.layer.count_dense()
            dense: tuple[torch.Tensor, torch.Tensor] = self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            )
            return dense

        video, places = hidden_states.shape[1], self.layer.places()
        if attn.add_q_proj is None:
            tokens = torch.cat((hidden_states, encoder_hidden_states), dim=1)
            projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
            query, key, value = _project(attn, tokens, projections, norms, image_rotary_emb, places)
        else:
            projections, norms = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k)
            video_places = None if places is None else places[:, :video]  # the text, which follows, is not reordered
            streams = [_project(attn, hidden_states, projections, norms, image_rotary_emb, video_places)]
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = (attn.norm_added_q, attn.norm_added_k)
            streams.append(_project(attn, encoder_hidden_states, projections, norms, None, None))
            query, key, value = (torch.cat(parts, dim=1) for parts in zip(*streams))

        lengths = None
        if attention_mask is not None:
            lengths = attention_mask.flatten(1).sum(dim=1, dtype=torch.int32)
            lengths = lengths + self.layer.video_tokens(video) if attention_mask.ndim == 2 else lengths
        output = self.layer.attend(query, key, value, lengths, places=places).flatten(2, 3).type_as(query)
        hidden_states, encoder_hidden_states = output[:, :video], output[:, video:]
        if attn.to_out is not None:
            hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if getattr(attn, "to_add_out", None) is not None:
            encoder_hidden_states = attn.to_add_out(encoder_hidden_states)
        return hidden_states, encoder_hidden_states


class HunyuanVideoFamily(DiffusersFamily):
    """Adapter for `HunyuanVideoTransformer3DModel`: text and image to video, with or without token replacement.

    Layers are numbered through the dual-stream blocks, then the single-stream ones. The token refiner stays dense.
    """

    name = "HunyuanVideo (HunyuanVideoTransformer3DModel)"
    guidance_takes_two_passes = False
    transformers = (HunyuanVideoTransformer3DModel,)
    processors = (HunyuanVideoAttnProcessor2_0,)
    sparse_processor = HunyuanVideoSparseProcessor
    attention_name = "attn"
    time_embedding_name = "time_text_embed.timestep_embedder"
    tiny_decoders = TINY_DECODERS
    original_names = ORIGINAL_NAMES
    row_orders = ROW_ORDERS

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the family's only preset."""
        return "hunyuan-video"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return HunyuanVideo's frame rate; Diffusers' pipelines set the rest. Source: its model card."""
        return SamplingDefaults(fps=24)

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the dual-stream blocks, followed by the single-stream ones."""
        return [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a latent (B, C, F, H, W), followed by the text, padding included."""
        latent = inputs["hidden_states"]
        if latent.ndim != 5:
            raise ValueError(f"`hidden_states` must be (B, C, F, H, W), got shape {tuple(latent.shape)}.")
        frames, height, width = (size // patch for size, patch in zip(latent.shape[2:], _patch(transformer)))
        return TokenGrid(
            frames,
            height,
            width,
            text_after=self.text_tokens(inputs),
            first_frame_apart=transformer.config.get("image_condition_type") == "token_replace",
        )

    def text_tokens(self, inputs: Inputs) -> int:
        """Return the number of text tokens, padding included."""
        length: int = inputs["encoder_hidden_states"].shape[1]
        return length

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros; the pipeline pads the text to 256 tokens."""
        config, like = transformer.config, transformer.proj_out.weight
        text_tokens = text_tokens or 256
        inputs = {
            "hidden_states": like.new_zeros(batch, config.in_channels, *latent_size),
            "timestep": like.new_zeros(batch),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, config.text_embed_dim),
            "encoder_attention_mask": torch.ones(batch, text_tokens, dtype=torch.int64, device=like.device),
            "pooled_projections": like.new_zeros(batch, config.pooled_projection_dim),
        }
        if config.guidance_embeds:
            inputs["guidance"] = like.new_zeros(batch)
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the latent's patches."""
        latent = permute_patches(inputs["hidden_states"], _patch(transformer), permutation)
        return {**inputs, "hidden_states": latent}

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the patches of the predicted latent back into raster order."""
        patch = _patch(transformer)
        if isinstance(output, tuple):
            return (permute_patches(output[0], patch, inverse), *output[1:])
        return type(output)(sample=permute_patches(output.sample, patch, inverse))

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return where video and text are cut, each by itself; Diffusers has no plan.

        Where the first frame is a given one, blocks are told how many of a rank's tokens are its.
        """
        first: dict[str, Any] = {"num_tokens": lambda count, shards: shards.local_count(count)}
        names = [name for name in ("transformer_blocks", "single_transformer_blocks") if hasattr(transformer, name)]
        return SequenceSplit(
            modules=(
                SplitModule(name="rope", cut_output=0),
                SplitModule(name="transformer_blocks.0", inputs={"hidden_states": 1, "encoder_hidden_states": 1}),
                *(SplitModule(name=f"{name}.*", inputs=first) for name in names),
                SplitModule(name="proj_out", gathered_output=1),
            ),
            text_apart=True,
        )

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables, (tokens, D), that the rope module returns."""

        def follow(module: nn.Module, args: Any, tables: Tables) -> tuple[torch.Tensor, ...]:
            order = permutation()
            return tables if order is None else tuple(table.index_select(0, order) for table in tables)

        return [transformer.rope.register_forward_hook(follow)]


class HunyuanVideo15Family(HunyuanVideoFamily):
    """Adapter for `HunyuanVideo15Transformer3DModel`: text and image to video, with dual-stream blocks only."""

    name = "HunyuanVideo-1.5 (HunyuanVideo15Transformer3DModel)"
    guidance_takes_two_passes = True
    transformers = (HunyuanVideo15Transformer3DModel,)
    processors = (HunyuanVideo15AttnProcessor2_0,)
    time_embedding_name = "time_embed.timestep_embedder"
    tiny_decoders = TINY_DECODERS_15
    original_names = ()

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the size that Diffusers' pipeline derives from the model, and its guider's guidance scale."""
        shape = pipe.default_aspect_ratio if hasattr(pipe, "default_aspect_ratio") else (16, 9)
        edges = pipe.video_processor.calculate_default_height_width(*reversed(shape), pipe.target_size)
        return SamplingDefaults(
            height=edges[0], width=edges[1], fps=24, guidance_scale=getattr(pipe.guider, "guidance_scale", None)
        )

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros; the pipeline pads its two texts to 1,000 and 256 tokens, and the image has 729."""
        config, like = transformer.config, transformer.proj_out.weight
        text_tokens = text_tokens or 1000
        mask, mask_2 = (
            torch.ones(batch, length, dtype=torch.int64, device=like.device) for length in (text_tokens, 256)
        )
        return {
            "hidden_states": like.new_zeros(batch, config.in_channels, *latent_size),
            "timestep": like.new_zeros(batch),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens, config.text_embed_dim),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": like.new_zeros(batch, 256, config.text_embed_2_dim),
            "encoder_attention_mask_2": mask_2,
            "image_embeds": like.new_zeros(batch, 729, config.image_embed_dim),
        }

    def without_values(self) -> AbstractContextManager[Any]:
        """Return a context in which no image is empty and no text is masked: the forward pass checks both."""
        return AssumeUnmasked()

    def text_tokens(self, inputs: Inputs) -> int:
        """Return the number of tokens of both texts and the image, padding included."""
        return sum(
            inputs[name].shape[1] for name in ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
        )


def _project(
    attn: Attention,
    tokens: torch.Tensor,
    projections: tuple[nn.Module, ...],
    norms: tuple[nn.Module | None, ...],
    tables: Tables | None,
    places: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Compute queries, keys and values, (B, S, H, D), of one stream; rotate as many tokens as the tables have."""
    query, key, value = (project(tokens).unflatten(2, (attn.heads, -1)) for project in projections)
    cos, sin = (None, None) if tables is None else tables
    query, key = (
        norm_and_rope(tensor, norm, "rms", cos, sin, places) for tensor, norm in ((query, norms[0]), (key, norms[1]))
    )
    return query, key, value


def _patch(transformer: DiffusersModule) -> tuple[int, int, int]:
    """Return the patch size along frames, height and width."""
    config = transformer.config
    return config.patch_size_t, config.patch_size, config.patch_size


class AssumeUnmasked(TorchFunctionMode):
    """Run a forward pass that depends on values on the meta device, which has none: nothing is masked or missing.

    HunyuanVideo-1.5 checks whether its image is empty, and sorts the tokens of its texts by their masks; FramePack
    cuts a single text off where its mask ends, and marks the ends of several.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inverted = WeakIdKeyDictionary()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.__bool__ and args[0].is_meta:
            return False
        if function is torch.Tensor.__getitem__ and _is_mask(args[1]):
            return args[0][:0] if args[1] in self._inverted else args[0]
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], tuple):
            args = (args[0], tuple(_unbounded(part) for part in args[1]), *args[2:])
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.__invert__ and _is_mask(result):
            self._inverted[result] = True
        return result


def _is_mask(value: Any) -> bool:
    """Return whether the value is one row of a mask."""
    return isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.bool and value.ndim == 1


def _unbounded(index: Any) -> Any:
    """Return a slice whose end is a value that is not there without its end."""
    if isinstance(index, slice) and isinstance(index.stop, torch.Tensor) and index.stop.is_meta:
        return slice(index.start, None)
    return index


FAMILIES = (HunyuanVideoFamily(), HunyuanVideo15Family())
"""Families of this module, for the registry."""
