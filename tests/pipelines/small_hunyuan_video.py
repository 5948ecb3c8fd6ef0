"""Small random instances of HunyuanVideo's classes and FramePack's, and their inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_hunyuan_video(condition=None):
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


def hunyuan_video_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
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


def make_hunyuan_video_15():
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


def hunyuan_video_15_inputs(*args, **options):
    """Inputs for a grid of tokens: six of text, three of another text and two of an image."""
    inputs = hunyuan_video_inputs(*args, **options)
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


def make_framepack():
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


FRAMEPACK_INDICES = ("indices_latents", *(f"indices_latents_{name}" for name in ("clean", "history_2x", "history_4x")))


def framepack_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
    """Inputs for a grid of tokens: two tokens of an image, and three kinds of earlier frames."""
    made = hunyuan_video_inputs(grid, batch, seed, timestep)
    generator = torch.Generator().manual_seed(seed + 1)
    frames, height, width = grid
    made["image_embeds"] = torch.randn(batch, 2, 8, generator=generator)
    made["indices_latents"] = torch.arange(frames)
    for name, count in (("latents_clean", 2), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        made[name] = torch.randn(batch, 4, count, 2 * height, 2 * width, generator=generator)
        made[f"indices_{name}"] = torch.arange(count) + frames
    return made


def framepack_history(grid):
    """Tokens of the earlier frames: 2 whole ones, 2 in patches of twice, and 4 in patches of four times the size."""
    _, height, width = grid
    return 2 * height * width + -(-height // 2) * -(-width // 2) + -(-height // 4) * -(-width // 4)


def family(condition):
    """HunyuanVideo with a kind of image condition."""
    return Family(
        lambda: make_hunyuan_video(condition),
        hunyuan_video_inputs,
        TEXT_TOKENS,
        text_first=False,
        first_frame_apart=condition is not None,
    )


def family_15():
    """HunyuanVideo-1.5."""
    return Family(make_hunyuan_video_15, hunyuan_video_15_inputs, 11, text_first=False)


def framepack():
    """FramePack, with earlier frames in the sequence."""
    return Family(
        make_framepack, framepack_inputs, TEXT_TOKENS + 2, text_first=False, history=framepack_history,
        shared=FRAMEPACK_INDICES, least_frames=3,
    )  # fmt: skip
