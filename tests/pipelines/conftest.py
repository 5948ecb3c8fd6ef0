"""Small random instances of every model family, with attention that is peaked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch

TEXT_TOKENS = 6


@dataclass(frozen=True)
class Family:
    """One kind of transformer, and its inputs."""

    make: Callable[[], Any]
    inputs: Callable[..., dict[str, Any]]
    """Takes a grid of tokens, `batch`, `seed` and `timestep`."""
    text: int = 0
    """Text tokens that self-attention sees."""
    text_first: bool = True
    """True if the model puts them before the video."""
    history: Callable[[tuple[int, int, int]], int] = lambda grid: 0
    """Tokens before the video in the model and behind it under BLADE, by the grid."""
    first_frame_apart: bool = False
    """True if the first frame stays first in every order."""
    shared: tuple[str, ...] = ()
    """Names of inputs that all items of a batch share."""
    frames_apart: bool = False
    """True if an order runs inside each frame."""
    least_frames: int = 1
    """The fewest frames that Diffusers' own class takes, or that are more than its history."""
    blocks_compile: bool = True
    """True if each block of Diffusers' own is one graph."""
    checkpoints: bool = True
    """True if Diffusers' own gradient checkpointing works."""
    float32_parts: tuple[str, ...] = ()
    """Endings of the names of modules that the class runs in float32, whatever the dtype of the others."""

    def grid(self, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return a grid with as many frames as the class needs."""
        return (max(grid[0], self.least_frames), *grid[1:])


def _make_cogvideox(**config):
    """A tiny `CogVideoXTransformer3DModel`."""
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 8,
            "num_layers": 3,
            "max_text_seq_length": TEXT_TOKENS,
            "use_rotary_positional_embeddings": True,
            **config,
        }
    ).eval()
    for block in transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(2.0)
    return transformer


def _cogvideox_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, *, patch_t=1, rotary=True):
    """Inputs for a grid of tokens, with the tables of positions that the pipeline makes."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    latent = torch.randn(batch, frames * patch_t, 4, 2 * height, 2 * width, generator=generator)
    inputs = {
        "hidden_states": latent,
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
        "timestep": torch.full((batch,), timestep),
    }
    if rotary:
        inputs["image_rotary_emb"] = get_3d_rotary_pos_embed(16, ((0, 0), (height, width)), (height, width), frames)
    return inputs


def _make_hunyuan_video(condition=None):
    """A tiny `HunyuanVideoTransformer3DModel`: a block of two streams, and two of one."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        image_condition_type=condition,
    ).eval()
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.data.mul_(2.0)
    return transformer


def _hunyuan_video_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens; the first text ends before the padding does."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    mask = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    mask[0, 4:] = 0
    return {
        "hidden_states": torch.randn(batch, 4, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(batch, 8, generator=generator),
    }


def _make_wan_vace():
    """A tiny `WanVACETransformer3DModel`: two blocks, and one of the control latents."""
    from diffusers import WanVACETransformer3DModel

    torch.manual_seed(0)
    transformer = WanVACETransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=24,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=6,
    ).eval()
    for block in (*transformer.blocks, *transformer.vace_blocks):
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(4.0)
    return transformer


def _make_ltx_video():
    """A tiny `LTXVideoTransformer3DModel`."""
    from diffusers import LTXVideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=3,
        caption_channels=8,
    ).eval()
    for block in transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(3.0)
    return transformer


def _ltx_video_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens, with positions spread as the pipeline spreads them."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def _make_ltx2(**config):
    """A tiny `LTX2VideoTransformer3DModel`, as LTX-2's; its modulation is strong enough to show in every output."""
    from diffusers import LTX2VideoTransformer3DModel

    torch.manual_seed(0)
    transformer = LTX2VideoTransformer3DModel(
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 3,
            "caption_channels": 8,
            "norm_elementwise_affine": True,
            **config,
        }
    ).eval()
    for block in transformer.transformer_blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(3.0)
        if block.attn1.to_gate_logits is not None:
            block.attn1.to_gate_logits.weight.data.mul_(4.0)
    return transformer


LTX2_3 = {
    "rope_type": "split",
    "gated_attn": True,
    "cross_attn_mod": True,
    "audio_gated_attn": True,
    "audio_cross_attn_mod": True,
    "use_prompt_embeddings": False,
    "perturbed_attn": True,
}
"""Options of LTX-2.3's transformer."""
LTX2_5 = {**LTX2_3, "ff_bias": False, "use_keyframes_abs_pos_embedding": True}
"""Options of LTX-2.5's."""


def _ltx2_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, *, projected=False):
    """Inputs for a grid of video tokens and nine of audio; `projected` texts are as wide as cross-attention takes."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    widths = (32, 16) if projected else (8, 8)
    video_text, audio_text = (torch.randn(batch, TEXT_TOKENS, size, generator=generator) for size in widths)
    return {
        "hidden_states": torch.randn(batch, frames * height * width, 4, generator=generator),
        "audio_hidden_states": torch.randn(batch, 9, 4, generator=generator),
        "encoder_hidden_states": video_text,
        "audio_encoder_hidden_states": audio_text,
        "timestep": torch.full((batch,), timestep),
        "sigma": torch.full((batch,), timestep),
        "encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "audio_encoder_attention_mask": torch.ones(batch, TEXT_TOKENS),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": 9,
    }


@pytest.fixture
def make_ltx2():
    """Return a function that makes a tiny LTX-2 transformer of a version: "2", "2.3" or "2.5"."""
    return lambda version="2", **config: _make_ltx2(**{"2": {}, "2.3": LTX2_3, "2.5": LTX2_5}[version], **config)


@pytest.fixture
def ltx2_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return _ltx2_inputs


def _make_hunyuan_video_15():
    """A tiny `HunyuanVideo15Transformer3DModel`."""
    from diffusers import HunyuanVideo15Transformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=3,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    for block in transformer.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.data.mul_(2.0)
    return transformer


def _hunyuan_video_15_inputs(*args, **options):
    """Inputs for a grid of tokens: six of text, three of another text and two of an image."""
    inputs = _hunyuan_video_inputs(*args, **options)
    inputs.pop("pooled_projections")
    batch = len(inputs["hidden_states"])
    generator = torch.Generator().manual_seed(7)
    mask = torch.ones(batch, 3, dtype=torch.int64)
    mask[-1, 1:] = 0
    return {
        **inputs,
        "encoder_hidden_states_2": torch.randn(batch, 3, 8, generator=generator),
        "encoder_attention_mask_2": mask,
        "image_embeds": torch.randn(batch, 2, 8, generator=generator),
    }


def _make_minimax_h3(**config):
    """A tiny `MiniMaxH3Transformer3DModel`."""
    from diffusers import MiniMaxH3Transformer3DModel

    torch.manual_seed(0)
    transformer = MiniMaxH3Transformer3DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 3,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "in_channels": 2,
            "audio_in_channels": 3,
            "text_dim": 8,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,
            **config,
        }
    ).eval()
    for block in transformer.transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.data.mul_(2.0)
    return transformer


def _make_like_wan(kind, peak=4.0, **config):
    """A tiny transformer of a class that is built as Wan's."""
    torch.manual_seed(0)
    transformer = kind(
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 8,
            "freq_dim": 16,
            "ffn_dim": 24,
            "num_layers": 3,
            "rope_max_seq_len": 32,
            **config,
        }
    ).eval()
    for block in transformer.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight.data.mul_(peak)
    return transformer


def _make_wan_animate():
    """A tiny `WanAnimateTransformer3DModel`, with a face adapter after each block."""
    from diffusers import WanAnimateTransformer3DModel

    return _make_like_wan(
        WanAnimateTransformer3DModel, in_channels=12, latent_channels=4, image_dim=None,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )  # fmt: skip


def _wan_animate_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens, whose first frame is the reference image; every other has a pose and faces."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, 12, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
        "pose_hidden_states": torch.randn(batch, 4, frames - 1, 2 * height, 2 * width, generator=generator),
        "face_pixel_values": torch.randn(batch, 3, (frames - 2) * 4 + 1, 16, 16, generator=generator),
    }


def _forcing_inputs(make_inputs):
    """Inputs of diffusion forcing: every frame has a timestep of its own, the first the highest."""

    def inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
        made = make_inputs(grid, batch, seed, timestep)
        steps = timestep * 0.5 ** torch.arange(grid[0], dtype=torch.float32)
        return {**made, "timestep": steps.expand(batch, -1).clone(), "enable_diffusion_forcing": True}

    return inputs


def _anyflow_inputs(make_inputs):
    """Inputs with the frames before the channels; every frame begins and ends at times of its own."""

    def inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
        made = make_inputs(grid, batch, seed, timestep)
        steps = timestep * 0.5 ** torch.arange(grid[0], dtype=torch.float32)
        return {
            **made,
            "hidden_states": made["hidden_states"].transpose(1, 2).contiguous(),
            "timestep": steps.expand(batch, -1).clone(),
            "r_timestep": (0.5 * steps).expand(batch, -1).clone(),
        }

    return inputs


def _make_framepack():
    """A tiny `HunyuanVideoFramepackTransformer3DModel`: a block of two streams, and two of one."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    torch.manual_seed(0)
    transformer = HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, guidance_embeds=False, text_embed_dim=8, pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
    ).eval()  # fmt: skip
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight.data.mul_(2.0)
    return transformer


MINIMAX_H3_LAYOUT = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
"""Inputs that lay out the packed sequence, in the order in which Diffusers' pipeline returns them."""

AUDIO_LATENTS = 2
"""Latents of sound of the tiny inputs, in each of two channels."""


def _minimax_h3_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=0.5, keyframes=()):
    """Inputs for a grid of tokens: text, conditions, sound and video, laid out by Diffusers' pipeline."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

    frames, height, width = grid
    *layout, conditions, _ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(TEXT_TOKENS, dtype=torch.int64),
        *(frames, 2 * height, 2 * width, AUDIO_LATENTS, (1, 2, 2)),
        audio_channels=2,
        audio_tag=2,
        video_tag=0,
        keyframe_anchors=keyframes,
    )
    return _minimax_h3_rows(dict(zip(MINIMAX_H3_LAYOUT, layout)), conditions, 0, batch, seed, timestep)


REFERENCE_ROWS = 6 + 6 + 4 + 8
"""Rows of an image of 2 x 3 tokens, a sound of three latents, and a video of two frames of 2 x 2 tokens with sound."""


def _minimax_h3_references(grid=(3, 5, 7), batch=1, seed=0, timestep=0.5):
    """Inputs for a grid of tokens, with references of all kinds, laid out by Diffusers' pipeline."""
    from types import SimpleNamespace

    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3Ref2VAPrepareLayoutStep

    frames, height, width = grid
    kinds = [SimpleNamespace(kind=kind, has_audio=True) for kind in ("image", "audio", "video")]
    latents = [torch.empty(1, 2, 1, 4, 6), torch.empty(1, 2, 2, 4, 4)]
    *layout, video, audio = MiniMaxH3Ref2VAPrepareLayoutStep.build_ref2va_packed_sequence(
        torch.ones(TEXT_TOKENS, dtype=torch.int64),
        *(kinds, latents, [torch.empty(6, 3), torch.empty(4, 3)]),
        *(frames, 2 * height, 2 * width, AUDIO_LATENTS, (1, 2, 2)),
        audio_channels=2,
        audio_tag=2,
        video_tag=0,
    )
    return _minimax_h3_rows(dict(zip(MINIMAX_H3_LAYOUT, layout)), video, audio, batch, seed, timestep)


def _minimax_h3_rows(layout, condition_video, condition_audio, batch=1, seed=0, timestep=0.5):
    """Random rows for a layout, with the timesteps that Diffusers' pipeline gives them."""
    from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3SetTimestepsStep

    text, video, audio = (len(layout[f"{name}_indices"]) for name in ("text", "video", "audio"))
    times, indices = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        layout["video_indices"],
        layout["audio_indices"],
        *(condition_video, condition_audio, text, timestep, timestep / 2, 0.999, 1.0),
    )
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, video, 8, generator=generator),
        "audio_hidden_states": torch.randn(batch, audio, 3, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 8, generator=generator),
        "timestep": times,
        "timestep_indices": indices,
        **layout,
    }


FRAMEPACK_INDICES = ("indices_latents", *(f"indices_latents_{name}" for name in ("clean", "history_2x", "history_4x")))


def _framepack_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens: two tokens of an image, and three kinds of earlier frames."""
    made = _hunyuan_video_inputs(grid, batch, seed, timestep)
    generator = torch.Generator().manual_seed(seed + 1)
    frames, height, width = grid
    made["image_embeds"] = torch.randn(batch, 2, 8, generator=generator)
    made["indices_latents"] = torch.arange(frames)
    for name, count in (("latents_clean", 2), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        made[name] = torch.randn(batch, 4, count, 2 * height, 2 * width, generator=generator)
        made[f"indices_{name}"] = torch.arange(count) + frames
    return made


def _framepack_history(grid):
    """Tokens of the earlier frames: 2 whole ones, 2 in patches of twice, and 4 in patches of four times the size."""
    _, height, width = grid
    return 2 * height * width + -(-height // 2) * -(-width // 2) + -(-height // 4) * -(-width // 4)


def _make_kandinsky5(**config):
    """A tiny `Kandinsky5Transformer3DModel`, whose modulations are no zeros."""
    from diffusers import Kandinsky5Transformer3DModel

    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        **{
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 16,
            "model_dim": 32, "ff_dim": 24, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 6, 6),
            **config,
        }
    ).eval()  # fmt: skip
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for block in transformer.visual_transformer_blocks:
        for norm in (block.self_attention.query_norm, block.self_attention.key_norm):
            norm.weight.data.mul_(2.0)
    return transformer


def _kandinsky5_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens; positions are the same for all items."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, frames, 2 * height, 2 * width, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "pooled_projections": torch.randn(batch, 8, generator=generator),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(TEXT_TOKENS),
    }


@pytest.fixture
def make_minimax_h3():
    """Return a function that makes a tiny MiniMax-H3 transformer."""
    return _make_minimax_h3


@pytest.fixture
def minimax_h3_inputs():
    """Return a function that makes its inputs for a grid of tokens, with keyframes or without."""
    return _minimax_h3_inputs


@pytest.fixture
def minimax_h3_references():
    """Return a function that makes its inputs for a grid of tokens, with references."""
    return _minimax_h3_references


@pytest.fixture
def make_kandinsky5():
    """Return a function that makes a tiny Kandinsky 5 transformer."""
    return _make_kandinsky5


@pytest.fixture
def kandinsky5_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return _kandinsky5_inputs


def _make_wan_animate_2():
    """A tiny `WanAnimate2Transformer3DModel`."""
    from diffusers import WanAnimate2Transformer3DModel

    torch.manual_seed(0)
    transformer = WanAnimate2Transformer3DModel(
        in_dim=12, out_dim=4, dim=32, ffn_dim=24, freq_dim=16, text_dim=8, text_len=TEXT_TOKENS, num_heads=2,
        num_layers=3, use_img_emb=False,
    ).eval()  # fmt: skip
    for block in transformer.blocks:
        for norm in (block.self_attn.norm_q, block.self_attn.norm_k):
            norm.weight.data.mul_(4.0)
    return transformer


def _wan_animate_2_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs of the pass over a driving video, for a grid of tokens; the other pass is in `test_wan_animate_2.py`."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    latents = [torch.randn(12, frames, 2 * height, 2 * width, generator=generator) for _ in range(batch)]
    return {
        "hidden_states": [latent[:4] for latent in latents],
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": [torch.randn(TEXT_TOKENS, 8, generator=generator) for _ in range(batch)],
        "condition_latents": [latent[4:] for latent in latents],
        "kv_cache": WanAnimate2KVCache(3),
        "kv_cache_mode": "extract",
        "seq_len": frames * height * width,
        "offset_grid_sizes": torch.tensor([grid] * batch),
    }


@pytest.fixture
def make_wan_animate_2():
    """Return a function that makes a tiny Wan-Animate-2 transformer."""
    return _make_wan_animate_2


@pytest.fixture
def wan_animate():
    """A tiny Wan-Animate transformer, and its inputs."""
    return Family(_make_wan_animate, _wan_animate_inputs, frames_apart=True, least_frames=2)


@pytest.fixture
def framepack():
    """A tiny FramePack transformer, and its inputs."""
    return Family(
        _make_framepack, _framepack_inputs, TEXT_TOKENS + 2, text_first=False, history=_framepack_history,
        shared=FRAMEPACK_INDICES, least_frames=3,
    )  # fmt: skip


@pytest.fixture
def make_like_wan():
    """Return a function that makes a tiny transformer of a class that is built as Wan's."""
    return _make_like_wan


@pytest.fixture
def forcing_inputs(wan_inputs):
    """Return a function that makes inputs of diffusion forcing for a grid of tokens."""
    return _forcing_inputs(wan_inputs)


@pytest.fixture
def anyflow_inputs(wan_inputs):
    """Return a function that makes inputs of AnyFlow for a grid of tokens."""
    return _anyflow_inputs(wan_inputs)


@pytest.fixture
def make_hunyuan_video():
    """Return a function that makes a tiny HunyuanVideo transformer, with a kind of image condition."""
    return _make_hunyuan_video


@pytest.fixture
def hunyuan_video_inputs():
    """Return a function that makes its inputs for a grid of tokens."""
    return _hunyuan_video_inputs


FAMILIES = (
    "wan",
    "wan-vace",
    "cogvideox",
    "cogvideox-2b",
    "cogvideox-1.5",
    "hunyuan-video",
    "hunyuan-video-i2v",
    "hunyuan-video-1.5",
    "ltx-video",
    "minimax-h3",
    "minimax-h3-references",
    "ltx-2",
    "ltx-2.3",
    "wan-animate",
    "chronoedit",
    "skyreels-v2",
    "skyreels-v2-forcing",
    "anyflow",
    "framepack",
    "kandinsky5",
    "wan-animate-2",
)


NEWER = {
    "minimax-h3": "MiniMaxH3Transformer3DModel",
    "minimax-h3-references": "MiniMaxH3Transformer3DModel",
    "ltx-2": "LTX2VideoTransformer3DModel",
    "ltx-2.3": "LTX2VideoTransformer3DModel",
    "anyflow": "AnyFlowTransformer3DModel",
    "wan-animate-2": "WanAnimate2Transformer3DModel",
}
"""Classes that the oldest Diffusers does not have."""


@pytest.fixture(params=FAMILIES)
def family(request, make_wan, wan_inputs):
    """Every kind of transformer in turn."""
    if not hasattr(diffusers, NEWER.get(request.param, "ModelMixin")):
        pytest.skip("this Diffusers lacks the class")
    simple = {
        "wan": (make_wan, wan_inputs),
        "cogvideox-2b": (
            lambda: _make_cogvideox(use_rotary_positional_embeddings=False),
            lambda *args, **options: _cogvideox_inputs(*args, **options, rotary=False),
            TEXT_TOKENS,
        ),
        "ltx-video": (_make_ltx_video, _ltx_video_inputs),
        "ltx-2": (_make_ltx2, _ltx2_inputs),
        "chronoedit": (lambda: _make_like_wan(diffusers.ChronoEditTransformer3DModel), wan_inputs),
        "anyflow": (lambda: _make_like_wan(diffusers.AnyFlowTransformer3DModel), _anyflow_inputs(wan_inputs)),
        "skyreels-v2": (lambda: _make_like_wan(diffusers.SkyReelsV2Transformer3DModel), wan_inputs),
    }
    if request.param in simple:
        return Family(*simple[request.param])
    if request.param == "wan-vace":

        def inputs(*args, **options):
            made = wan_inputs(*args, **options)
            shape = (made["hidden_states"].shape[0], 6, *made["hidden_states"].shape[2:])
            return {**made, "control_hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(9))}

        return Family(_make_wan_vace, inputs)
    if request.param.startswith("minimax-h3"):
        inputs, others = _minimax_h3_inputs, TEXT_TOKENS + 2 * AUDIO_LATENTS
        if request.param.endswith("references"):
            inputs, others = _minimax_h3_references, others + REFERENCE_ROWS
        shared = ("timestep", "timestep_indices", *MINIMAX_H3_LAYOUT)
        return Family(_make_minimax_h3, inputs, others, shared=shared)
    if request.param == "ltx-2.3":
        return Family(
            lambda: _make_ltx2(**LTX2_3), lambda *args, **options: _ltx2_inputs(*args, **options, projected=True)
        )
    if request.param == "hunyuan-video-1.5":
        return Family(_make_hunyuan_video_15, _hunyuan_video_15_inputs, 11, text_first=False)
    if request.param.startswith("hunyuan-video"):
        condition = "token_replace" if request.param.endswith("i2v") else None
        return Family(
            lambda: _make_hunyuan_video(condition),
            _hunyuan_video_inputs,
            TEXT_TOKENS,
            text_first=False,
            first_frame_apart=condition is not None,
        )
    if request.param == "kandinsky5":
        # it rounds rotated queries and keys to this dtype, which hides errors; `test_kandinsky5.py` tests the rounding
        request.getfixturevalue("monkeypatch").setattr(torch, "bfloat16", torch.float32)
        return Family(
            _make_kandinsky5, _kandinsky5_inputs, shared=("text_rope_pos", "visual_rope_pos"),
            float32_parts=("time_embeddings", "query_norm", "key_norm"),
        )  # fmt: skip
    if request.param == "wan-animate-2":
        return Family(
            _make_wan_animate_2, _wan_animate_2_inputs, frames_apart=True, blocks_compile=False, checkpoints=False
        )
    if request.param in ("framepack", "wan-animate"):
        return request.getfixturevalue(request.param.replace("-", "_"))
    if request.param == "skyreels-v2-forcing":
        make, _ = simple["skyreels-v2"]
        return Family(make, _forcing_inputs(wan_inputs), frames_apart=True)
    patch_t = 2 if request.param == "cogvideox-1.5" else None
    return Family(
        lambda: _make_cogvideox(patch_size_t=patch_t),
        lambda *args, **options: _cogvideox_inputs(*args, **options, patch_t=patch_t or 1),
        TEXT_TOKENS,
    )
