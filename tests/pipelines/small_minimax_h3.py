"""A small random instance of MiniMax-H3, and its inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_minimax_h3(**config):
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


MINIMAX_H3_LAYOUT = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
"""Inputs that lay out the packed sequence, in the order in which Diffusers' pipeline returns them."""


AUDIO_LATENTS = 2
"""Latents of sound of the tiny inputs, in each of two channels."""


def minimax_h3_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=0.5, keyframes=()):
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
    return minimax_h3_rows(dict(zip(MINIMAX_H3_LAYOUT, layout)), conditions, 0, batch, seed, timestep)


REFERENCE_ROWS = 6 + 6 + 4 + 8
"""Rows of an image of 2 x 3 tokens, a sound of three latents, and a video of two frames of 2 x 2 tokens with sound."""


def minimax_h3_references(grid=(3, 5, 7), batch=1, seed=0, timestep=0.5):
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
    return minimax_h3_rows(dict(zip(MINIMAX_H3_LAYOUT, layout)), video, audio, batch, seed, timestep)


def minimax_h3_rows(layout, condition_video, condition_audio, batch=1, seed=0, timestep=0.5):
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


def family(*, references=False):
    """MiniMax-H3, with references or without."""
    inputs, others = minimax_h3_inputs, TEXT_TOKENS + 2 * AUDIO_LATENTS
    if references:
        inputs, others = minimax_h3_references, others + REFERENCE_ROWS
    shared = ("timestep", "timestep_indices", *MINIMAX_H3_LAYOUT)
    return Family(make_minimax_h3, inputs, others, shared=shared)
