"""Adapter for Diffusers' Wan transformers (2.1 and 2.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan_vace import WanVACETransformer3DModel
from torch import nn

from blade.families.protocol import Condition, Inputs, Permutation
from blade.families.sampling_defaults import SamplingDefaults
from blade.families.sequence_split import SequenceSplit, SplitModule
from blade.token_grid import TokenGrid
from blade_pipelines.shared.diffusers_family import DiffusersFamily
from blade_pipelines.shared.diffusers_module import DiffusersModule
from blade_pipelines.shared.patches import permute_patches
from blade_pipelines.shared.processor import SparseProcessor, norm_and_rope

NEGATIVE_PROMPT = (
    "色调艳丽 过曝 静态 细节模糊不清 字幕 风格 作品 画作 画面 静止 整体发灰 最差质量 低质量 JPEG压缩残留 "
    "丑陋的 残缺的 多余的手指 画得不好的手部 画得不好的脸部 畸形的 毁容的 形态畸形的肢体 手指融合 "
    "静止不动的画面 杂乱的背景 三条腿 背景人很多 倒着走"
).replace(" ", "\uff0c")
"""Negative prompt recommended by Wan, verbatim."""
CAMERA_SHAKE = "镜头晃动"
"""Addition to the negative prompt for Wan 2.1's image-to-video models."""
SMALLEST_WIDTH = 1536
"""Width of Wan's smallest own model, 1.3B."""
LARGE_VIDEO = 704 * 1280
"""Pixels per frame from which Wan 2.1 uses the larger flow shift."""
TINY_DECODERS: dict[int, tuple[str, ...]] = {16: ("taew2_1",), 48: ("taew2_2", "taew2_2_super")}
"""Of Wan 2.1 and 2.2 14B, and of Wan 2.2 5B. Source: the README of https://github.com/madebyollin/taehv."""

BLOCK_CACHES = {"first-block": "FirstBlockCache", "mag": "MagCache", "sea": "SeaCache"}
"""Diffusers' caches that skip whole blocks."""

ORIGINAL_NAMES = (
    (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", "time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", "img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", "img_emb.proj.4"),
    (r"^proj_out$", "head.head"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"^(vace_blocks\.\d+)\.proj_in$", r"\1.before_proj"),
    (r"^(vace_blocks\.\d+)\.proj_out$", r"\1.after_proj"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0$", ".o"),
    (r"\.to_(q|k|v)$", r".\1"),
    (r"\.add_(k|v)_proj$", r".\1_img"),
    (r"\.norm_added_k$", ".norm_k_img"),
    (r"\.ffn\.net\.0\.proj$", ".ffn.0"),
    (r"\.ffn\.net\.2$", ".ffn.2"),
    (r"\.norm2$", ".norm3"),
)
"""Names in Wan's own code. Source: `scripts/convert_wan_to_diffusers.py` of Diffusers."""


class WanSparseProcessor(SparseProcessor):
    """Self-attention of a Wan block with BLADE."""

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend; same signature as Diffusers' processor."""
        if not self.layer.attends:
            self.layer.count_dense()
            dense: torch.Tensor = self.previous(
                attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, **kwargs
            )
            return dense
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError("A sparse Wan layer takes neither `encoder_hidden_states` nor an `attention_mask`.")

        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        cos, sin = (None, None) if rotary_emb is None else rotary_emb
        places = self.layer.places()
        query, key = (
            norm_and_rope(tensor, norm, "rms-all-heads", cos, sin, places)
            for tensor, norm in ((query, attn.norm_q), (key, attn.norm_k))
        )

        output = self.layer.attend(query, key, value, places=places).flatten(2, 3).type_as(query)
        projected: torch.Tensor = attn.to_out[1](attn.to_out[0](output))
        return projected


class WanFamily(DiffusersFamily):
    """Adapter for `WanTransformer3DModel` and `WanVACETransformer3DModel`.

    Supports text, image and video to video, per-token timesteps (TI2V-5B) and VACE's control latents. VACE's blocks
    are numbered after the others, although they run before them.
    """

    name = "Wan (WanTransformer3DModel, WanVACETransformer3DModel)"
    guidance_takes_two_passes = True
    transformers: ClassVar[tuple[type[nn.Module], ...]] = (WanTransformer3DModel, WanVACETransformer3DModel)
    processors: ClassVar[tuple[type, ...]] = (WanAttnProcessor,)
    sparse_processor: ClassVar[type[SparseProcessor]] = WanSparseProcessor
    attention_name = "attn1"
    time_embedding_name = "condition_embedder.time_embedder"
    condition_pipelines: ClassVar[Mapping[tuple[str, Condition], str]] = {
        ("WanPipeline", "video"): "WanVideoToVideoPipeline"
    }
    tiny_decoders = TINY_DECODERS
    original_names: Sequence[tuple[str, str]] = ORIGINAL_NAMES

    def preset_name(self, transformer: DiffusersModule) -> str:
        """Return the preset for the model's size."""
        width = _width(transformer.config)
        if width < SMALLEST_WIDTH:
            return "shapes"
        return "wan2.1-t2v-1.3b" if width == 1536 else "wan"

    def sampling_defaults(self, pipe: Any, height: int | None, width: int | None) -> SamplingDefaults:
        """Return the settings recommended for Wan 2.1 or 2.2.

        Source: the configurations of the Wan 2.1 and 2.2 releases (sizes, steps, guidance, `sample_neg_prompt`) and
        their documentation in Diffusers (flow shift 3 at 480p and 5 at 720p). Schedulers of Wan 2.2 set their shift.
        """
        config = (pipe.transformer or pipe.transformer_2).config
        if _width(config) < SMALLEST_WIDTH:  # not one of Wan's own models
            return SamplingDefaults()
        image = config.in_channels > config.out_channels
        if getattr(pipe.config, "expand_timesteps", False):  # 2.2 TI2V-5B
            return SamplingDefaults(
                height=704,
                width=1280,
                frames=121,
                fps=24,
                steps=50,
                guidance_scale=5.0,
                negative_prompt=NEGATIVE_PROMPT,
            )
        if getattr(pipe.config, "boundary_ratio", None) is not None:  # 2.2 A14B
            return SamplingDefaults(
                height=720,
                width=1280,
                frames=81,
                fps=16,
                steps=40,
                guidance_scale=3.5 if image else 4.0,
                guidance_scale_2=3.5 if image else 3.0,
                negative_prompt=NEGATIVE_PROMPT,
            )
        height, width = height or 480, width or 832
        return SamplingDefaults(
            height=height,
            width=width,
            frames=81,
            fps=16,
            steps=40 if image else 50,
            guidance_scale=5.0,
            negative_prompt=f"{CAMERA_SHAKE}\uff0c{NEGATIVE_PROMPT}" if image else NEGATIVE_PROMPT,
            flow_shift=5.0 if height * width >= LARGE_VIDEO else 3.0,
        )

    def condition_pipeline(self, pipe: Any, condition: Condition) -> str | None:
        """Return the pipeline class that accepts a condition with the same weights; TI2V's also accept images."""
        if condition == "image" and getattr(pipe.config, "expand_timesteps", False):
            return "WanImageToVideoPipeline"
        return super().condition_pipeline(pipe, condition)

    def cache_problem(self, transformer: nn.Module, cache: str) -> str | None:
        """Return that caches of whole blocks are broken for VACE, or None.

        Its control is added between the blocks: once within what is kept of them, and again where they are skipped.
        """
        if cache in BLOCK_CACHES and isinstance(transformer, WanVACETransformer3DModel):
            return f"{BLOCK_CACHES[cache]} is broken for a {type(transformer).__name__} in Diffusers itself"
        return None

    def blocks(self, transformer: DiffusersModule) -> Sequence[nn.Module]:
        """Return the transformer's blocks, followed by VACE's."""
        return [*transformer.blocks, *getattr(transformer, "vace_blocks", ())]

    def token_grid(self, transformer: DiffusersModule, inputs: Inputs) -> TokenGrid:
        """Return the grid of a latent (B, C, F, H, W); only cross-attention sees the text."""
        latent = inputs["hidden_states"]
        if latent.ndim != 5:
            raise ValueError(f"`hidden_states` must be (B, C, F, H, W), got shape {tuple(latent.shape)}.")
        return TokenGrid(*(size // patch for size, patch in zip(latent.shape[2:], transformer.config.patch_size)))

    def example_inputs(
        self,
        transformer: DiffusersModule,
        latent_size: tuple[int, int, int],
        *,
        batch: int = 1,
        text_tokens: int | None = None,
    ) -> Inputs:
        """Return zeros; Wan's pipelines pad the text to 512 tokens."""
        config, like = transformer.config, transformer.proj_out.weight
        inputs = {
            "hidden_states": like.new_zeros(batch, config.in_channels, *latent_size),
            "timestep": like.new_zeros(batch),
            "encoder_hidden_states": like.new_zeros(batch, text_tokens or 512, config.text_dim),
        }
        if config.get("image_dim") is not None:
            inputs["encoder_hidden_states_image"] = like.new_zeros(batch, 257, config.image_dim)
        if config.get("vace_in_channels") is not None:
            inputs["control_hidden_states"] = like.new_zeros(batch, config.vace_in_channels, *latent_size)
        return inputs

    def permute_inputs(self, transformer: DiffusersModule, inputs: Inputs, permutation: torch.Tensor) -> Inputs:
        """Permute the patches of the latents and per-token timesteps."""
        patch = transformer.config.patch_size
        permuted = {**inputs, "hidden_states": permute_patches(inputs["hidden_states"], patch, permutation)}
        control = inputs.get("control_hidden_states")
        if control is not None:
            if control.shape[2:] != inputs["hidden_states"].shape[2:]:
                expected = tuple(inputs["hidden_states"].shape[2:])
                raise ValueError(
                    f"`control_hidden_states` must be as large as the latent, {expected} in frames, height and width, "
                    f"got {tuple(control.shape[2:])}."
                )
            permuted["control_hidden_states"] = permute_patches(control, patch, permutation)
        timestep = inputs["timestep"]
        if timestep.ndim == 2:
            if timestep.shape[1] != len(permutation):
                raise ValueError(
                    f"`timestep` must be (B,) or (B, tokens) with {len(permutation)} tokens, got shape "
                    f"{tuple(timestep.shape)}."
                )
            permuted["timestep"] = timestep.index_select(1, permutation)
        return permuted

    def restore_output(self, transformer: DiffusersModule, output: Any, inverse: torch.Tensor) -> Any:
        """Put the patches of the predicted latent back into raster order."""
        patch = transformer.config.patch_size
        if isinstance(output, tuple):
            return (permute_patches(output[0], patch, inverse), *output[1:])
        return type(output)(sample=permute_patches(output.sample, patch, inverse))

    def sequence_split(self, transformer: DiffusersModule) -> SequenceSplit | None:
        """Return the places where Diffusers' own plan cuts the sequence, and those of VACE's blocks beside."""
        if isinstance(transformer, WanVACETransformer3DModel):
            return split_sequence(
                SplitModule(name="vace_blocks.0", inputs={"control_hidden_states": 1}),
                SplitModule(name="vace_blocks.*", inputs={"hidden_states": 1}),
            )
        return split_sequence() if isinstance(transformer, WanTransformer3DModel) else None

    def hook_positions(self, transformer: DiffusersModule, permutation: Permutation) -> Sequence[Any]:
        """Permute the tables, (1, S, 1, D), that the rope module returns."""

        def follow(module: nn.Module, args: Any, tables: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            order = permutation()
            return tables if order is None else tuple(table.index_select(1, order) for table in tables)

        return [transformer.rope.register_forward_hook(follow)]


def split_sequence(*beside: SplitModule) -> SequenceSplit:
    """Return the places where the sequence of Wan's architecture is cut, and others beside."""
    return SequenceSplit(
        modules=(
            SplitModule(name="", inputs={"timestep": 1}),
            SplitModule(name="rope", cut_output=1),
            *beside,
            SplitModule(name="blocks.0", inputs={"hidden_states": 1}),
            SplitModule(name="proj_out", gathered_output=1),
        )
    )


def _width(config: Any) -> int:
    width: int = config.num_attention_heads * config.attention_head_dim
    return width


FAMILIES = (WanFamily(),)
"""Families of this module, for the registry."""
