"""Small random instances of LTX-Video and LTX-2, and their inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_ltx_video():
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


def ltx_video_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
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


def make_ltx2(**config):
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


def ltx2_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, *, projected=False):
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


def ltx2_3():
    """LTX-2.3, whose text comes projected."""
    return Family(lambda: make_ltx2(**LTX2_3), lambda *args, **options: ltx2_inputs(*args, **options, projected=True))
