"""Small random instances of Wan's classes and of those that are built as they are, and their inputs."""

import torch
from small_family import TEXT_TOKENS, Family


def make_wan(layers=3, heads=2, seed=0, peak=4.0, **config):
    """A tiny `WanTransformer3DModel` with random weights.

    Its attention is peaked: the norms of queries and keys are scaled up, so that it matters which token attends to
    which, and where they are.
    """
    from diffusers import WanTransformer3DModel

    return make_like_wan(WanTransformer3DModel, peak, seed, num_attention_heads=heads, num_layers=layers, **config)


def wan_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0, channels=4):
    """Inputs of it for a grid of tokens."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, channels, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((batch,), timestep),
        "encoder_hidden_states": torch.randn(batch, TEXT_TOKENS, 8, generator=generator),
    }


def make_wan_vace():
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


def make_like_wan(kind, peak=4.0, seed=0, **config):
    """A tiny transformer of a class that is built as Wan's."""
    torch.manual_seed(seed)
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


def make_wan_animate():
    """A tiny `WanAnimateTransformer3DModel`, with a face adapter after each block."""
    from diffusers import WanAnimateTransformer3DModel

    return make_like_wan(
        WanAnimateTransformer3DModel, in_channels=12, latent_channels=4, image_dim=None,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    )  # fmt: skip


def wan_animate_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
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


def forcing_inputs(make_inputs):
    """Inputs of diffusion forcing: every frame has a timestep of its own, the first the highest."""

    def inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
        made = make_inputs(grid, batch, seed, timestep)
        steps = timestep * 0.5 ** torch.arange(grid[0], dtype=torch.float32)
        return {**made, "timestep": steps.expand(batch, -1).clone(), "enable_diffusion_forcing": True}

    return inputs


def anyflow_inputs(make_inputs):
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


def make_wan_animate_2():
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


def wan_animate_2_inputs(grid=(3, 5, 7), batch=1, seed=0, timestep=500.0):
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


def wan_animate():
    """Wan-Animate: token orders run inside each frame."""
    return Family(make_wan_animate, wan_animate_inputs, frames_apart=True, least_frames=2)


def wan_animate_2():
    """Wan-Animate-2, in its pass of the reference."""
    return Family(make_wan_animate_2, wan_animate_2_inputs, frames_apart=True, blocks_compile=False, checkpoints=False)


def vace_inputs(make_inputs):
    """Inputs with control latents."""

    def inputs(*args, **options):
        made = make_inputs(*args, **options)
        shape = (made["hidden_states"].shape[0], 6, *made["hidden_states"].shape[2:])
        return {**made, "control_hidden_states": torch.randn(shape, generator=torch.Generator().manual_seed(9))}

    return inputs
