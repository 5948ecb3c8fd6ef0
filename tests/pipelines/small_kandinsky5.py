"""A small random instance of Kandinsky 5, and its inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_kandinsky5(**config):
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


def kandinsky5_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
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


def family():
    """Kandinsky 5."""
    return Family(
        make_kandinsky5, kandinsky5_inputs, shared=("text_rope_pos", "visual_rope_pos"),
        float32_parts=("time_embeddings", "query_norm", "key_norm"),
    )  # fmt: skip
