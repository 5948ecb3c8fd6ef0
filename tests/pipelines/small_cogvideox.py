"""Small random instances of CogVideoX, and their inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_cogvideox(**config):
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


def cogvideox_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, *, patch_t=1, rotary=True):
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


def family(**config):
    """CogVideoX of a configuration."""
    patch_t, rotary = config.get("patch_size_t") or 1, config.get("use_rotary_positional_embeddings", True)
    return Family(
        lambda: make_cogvideox(**config),
        lambda *args, **options: cogvideox_inputs(*args, **options, patch_t=patch_t, rotary=rotary),
        TEXT_TOKENS,
    )
