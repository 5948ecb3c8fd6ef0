"""Counted operations are PyTorch's own, the published totals come out, and sparsity is charged as planned."""

import runpy
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from blade import BladeConfig
from blade.attention.config import AdaptiveConfig
from blade.attention.pattern_table import uniform_table
from blade.attention.patterns import HeadPattern, diagonal_density
from blade.families.registry import find_family
from blade.models.costs import forward_cost, run_cost

SCRIPT = runpy.run_path(str(Path(__file__).parents[3] / "scripts" / "count_flops.py"))
PUBLISHED = SCRIPT["RUNS"]


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_totals_come_out_within_two_percent(name):
    make, latent, guidance, expected = PUBLISHED[name]
    cost = run_cost(forward_cost(on_meta(make), latent), 50, guidance=guidance)
    assert cost.total == cost.dense_total
    assert cost.total == pytest.approx(expected * 1e15, rel=0.02)


ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
WAN = {**ATTENTION, "text_dim": 8, "freq_dim": 16, "ffn_dim": 24, "num_layers": 3, "rope_max_seq_len": 32}
COGVIDEOX = {
    **ATTENTION, "time_embed_dim": 8, "text_embed_dim": 8, "num_layers": 2, "max_text_seq_length": 6,
    "use_rotary_positional_embeddings": True,
}  # fmt: skip
HUNYUAN_VIDEO = {
    **ATTENTION,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}

LTX2 = {
    **ATTENTION, "cross_attention_dim": 32, "num_layers": 2, "audio_in_channels": 4, "audio_out_channels": 4,
    "audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16,
    "rope_type": "split",
}  # fmt: skip
GATED = dict.fromkeys(("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod"), True)

SMALL = {
    "Wan": lambda: WanTransformer3DModel(**WAN),
    "Wan, image to video": lambda: WanTransformer3DModel(**WAN, image_dim=8, added_kv_proj_dim=32),
    "Wan VACE": lambda: WanVACETransformer3DModel(**WAN, vace_layers=[0, 2], vace_in_channels=6),
    "CogVideoX": lambda: CogVideoXTransformer3DModel(**COGVIDEOX),
    "CogVideoX 1.5": lambda: CogVideoXTransformer3DModel(**COGVIDEOX, patch_size_t=2, patch_bias=False),
    "HunyuanVideo": lambda: HunyuanVideoTransformer3DModel(
        **HUNYUAN_VIDEO, num_single_layers=2, pooled_projection_dim=8
    ),
    "HunyuanVideo-1.5": lambda: HunyuanVideo15Transformer3DModel(
        **HUNYUAN_VIDEO, text_embed_2_dim=8, image_embed_dim=8, patch_size=2
    ),
    "LTX-Video": lambda: LTXVideoTransformer3DModel(
        **ATTENTION, cross_attention_dim=32, num_layers=2, caption_channels=8
    ),
    "Wan-Animate": lambda: diffusers.WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 32}, latent_channels=4,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=8, face_encoder_hidden_dim=8, face_encoder_num_heads=2,
        inject_face_latents_blocks=1,
    ),
    "ChronoEdit": lambda: diffusers.ChronoEditTransformer3DModel(**WAN, image_dim=8, added_kv_proj_dim=32),
    "SkyReels-V2": lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN),
    "SkyReels-V2, diffusion forcing": lambda: diffusers.SkyReelsV2Transformer3DModel(**WAN, inject_sample_info=True),
    "AnyFlow": lambda: diffusers.AnyFlowTransformer3DModel(**WAN),
    "FramePack": lambda: diffusers.HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN_VIDEO, num_single_layers=2, pooled_projection_dim=8, has_image_proj=True, image_proj_dim=8,
        has_clean_x_embedder=True,
    ),
    "Kandinsky 5": lambda: diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=24,
        num_text_blocks=1, num_visual_blocks=3, axes_dims=(4, 6, 6),
    ),
    "LTX-2": lambda: LTX2VideoTransformer3DModel(**LTX2, caption_channels=8),
    "LTX-2.3": lambda: LTX2VideoTransformer3DModel(**LTX2, **GATED, use_prompt_embeddings=False, perturbed_attn=True),
    "MiniMax-H3": lambda: MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=2, audio_in_channels=3, text_dim=8, freq_dim=16, time_embed_hidden_dim=16, time_embed_dim=8,
        rope_freq_dim=2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_counts_are_those_of_a_real_forward_pass(name):
    real, counted = SMALL[name](), on_meta(SMALL[name])
    family, latent, batch = find_family(real), (3, 10, 14), 1 if "forcing" in name else 2  # it is told one frame rate
    cost = forward_cost(counted, latent, batch=batch, text_tokens=6)
    inputs = family.example_inputs(real, latent, batch=batch, text_tokens=6)
    # PyTorch counts the CPU's fused attention as nothing
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        real(**inputs)
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=1e-3)
    tokens, layers = cost.grid.sequence_length, len(family.attention_layers(real))
    assert (cost.layers, cost.heads, cost.head_dim) == (layers, 2, 16)
    assert cost.flops["self-attention"] == batch * layers * 4 * tokens**2 * 32
    assert cost.parameters == sum(parameter.numel() for parameter in real.parameters())


def test_sparsity_is_charged_where_it_is_in_force():
    forward = forward_cost(on_meta(SMALL["Wan"]), (4, 16, 16), text_tokens=6)  # 256 tokens, 3 layers
    dense = run_cost(forward, 10)
    config = BladeConfig(sparsity=0.5, dense_steps=2, dense_layers=[0], asa=AdaptiveConfig(block_size=32))
    sparse = run_cost(forward, 10, config=config)
    assert (sparse.passes, sparse.sparse_passes, sparse.sparse_layers, sparse.density) == (20, 16, 2, 0.5)
    saved = 16 * 2 / (20 * 3) * 0.5
    assert sparse.flops["self-attention"] == pytest.approx((1 - saved) * dense.flops["self-attention"])
    assert sparse.flops["block selection"] == 16 * 2 * 2 * 2 * 16 * (8 * 16) ** 2
    assert {part: sparse.flops[part] for part in dense.flops if part != "self-attention"} == {
        part: count for part, count in dense.flops.items() if part != "self-attention"
    }
    for nothing in (BladeConfig(attention="dense"), BladeConfig(sparsity=0.5)):  # one block of 128 is all there is
        assert run_cost(forward_cost(on_meta(SMALL["Wan"]), (1, 16, 16)), 10, config=nothing).total > 0
    assert run_cost(forward, 10, guidance=False).total == dense.total / 2


class Peeking(WanTransformer3DModel):
    """A transformer that takes another way for other inputs."""

    def forward(self, hidden_states, **inputs):
        """Look at a number."""
        return super().forward(hidden_states * hidden_states.sum().item(), **inputs)


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="`transformer` must be on the meta device"):
        forward_cost(SMALL["Wan"](), (1, 4, 4))
    with pytest.raises(ValueError, match="the forward pass of Peeking depends on what its inputs hold"):
        forward_cost(on_meta(lambda: Peeking(**WAN)), (1, 4, 4))
    with pytest.raises(ValueError, match="is of no model family that BLADE knows"):
        forward_cost(on_meta(lambda: torch.nn.Linear(1, 1)), (1, 4, 4))


WINDOWS = SCRIPT["WINDOWS"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "density"), list(zip(WINDOWS, (0.266, 0.1217, 0.25))))
def test_diagonals_are_charged_by_their_blocks(name, density):
    # Sparse-vDiT: 3 frames of Wan2.1, 2 of HunyuanVideo, a quarter of CogVideoX1.5; 4 N^2 H d L for all pairs
    frames = WINDOWS[name][0]
    make, latent = SCRIPT["RUNS"][name][:2]
    forward = forward_cost(on_meta(make), latent)
    pattern = SCRIPT["widest_diagonal"](forward.grid)
    if frames is not None:
        pattern = HeadPattern(kind="diagonal", frames=frames)
        assert diagonal_density(forward.grid, frames, 128) == pytest.approx(density, abs=0.001)
    table = uniform_table(pattern, forward.layers, forward.heads, block_size=128)
    cost = run_cost(forward, 1, guidance=False, config=BladeConfig(attention="patterns", patterns=table))
    pairs = 4 * forward.grid.sequence_length**2 * forward.heads * forward.head_dim * forward.layers
    expected = density if frames is None else diagonal_density(forward.grid, frames, 128)
    assert cost.flops["self-attention"] == pytest.approx(pairs * expected, rel=0.01)
