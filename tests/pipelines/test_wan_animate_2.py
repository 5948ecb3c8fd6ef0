"""Wan-Animate-2 under BLADE: sparse over the video that is made, whole over the frame of the reference."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

import blade
from blade import BladeConfig, apply_blade, blade_summary, remove_blade
from blade.attention import adaptive
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.attention.pattern_table import mixed_table
from blade.attention.patterns import HeadPattern, Window

transformer_wan_animate_2 = pytest.importorskip("diffusers.models.transformers.transformer_wan_animate_2")
DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)
FRAMES, HEIGHT, WIDTH = 3, 4, 6
TOKENS = HEIGHT * WIDTH


@pytest.fixture(autouse=True)
def without_compiler(monkeypatch):
    """Make the mask of FlexAttention without compiling what makes it."""
    make = transformer_wan_animate_2.create_block_mask
    monkeypatch.setattr(
        transformer_wan_animate_2,
        "create_block_mask",
        lambda *args, **options: make(*args, **options | {"_compile": False}),
    )


@pytest.fixture
def make(make_wan_animate_2):
    """Return a function that makes the tiny transformer of the families' tests."""
    return make_wan_animate_2


def run(transformer, *, timestep=500.0, area=None, seed=0):
    """The output of the pass over the driving video, and of one that makes the video."""
    generator = torch.Generator().manual_seed(seed)
    cache, outputs = transformer_wan_animate_2.WanAnimate2KVCache(len(transformer.blocks)), []
    grid = torch.tensor([[FRAMES, HEIGHT, WIDTH]])
    for mode, frames in (("extract", FRAMES), ("cached", FRAMES + 1)):
        latent, condition = (
            torch.randn(channels, frames, 2 * HEIGHT, 2 * WIDTH, generator=generator) for channels in (4, 8)
        )
        inputs = {
            "hidden_states": [latent],
            "timestep": torch.tensor([timestep]),
            "encoder_hidden_states": [torch.randn(5, 8, generator=generator)],
            "condition_latents": [condition],
            "kv_cache": cache,
            "kv_cache_mode": mode,
            "seq_len": frames * TOKENS,
        }
        if mode == "extract":
            inputs["offset_grid_sizes"] = grid
        else:
            inputs |= {
                "reference_grid_sizes": grid,
                "origin_len": 4 * (FRAMES - 1) + 1,
                "origin_area": area or [16 * HEIGHT, 16 * WIDTH],
            }
        outputs.append(transformer(**inputs).sample[0])
    return outputs


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_close(outputs, others, **tolerances):
    for output, other in zip(outputs, others, strict=True):
        torch.testing.assert_close(output, other, **tolerances or {"rtol": 1e-4, "atol": 1e-5})


@pytest.mark.parametrize("config", [BladeConfig(attention="dense"), BladeConfig(dense_layers="0-2")])
def test_where_every_layer_is_dense_the_output_is_bitwise_the_same(make, config):
    plain, dense = run(make()), run(apply_blade(make(), config))
    assert all(torch.equal(output, other) for output, other in zip(plain, dense))


@pytest.mark.parametrize("order", ["gilbert", "token-major", "raster"])
def test_with_every_block_kept_the_output_is_dense_but_for_rounding(make, monkeypatch, order):
    monkeypatch.setattr(BlockBudget, "is_full", False)
    details = AdaptiveConfig(block_size=8, probe_tokens=4, token_order=order)
    transformer = apply_blade(make(), BladeConfig(sparsity=0.0, dense_layers=[1], asa=details))
    assert_close(run(transformer), run(make()))
    assert [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers] == [2, 0, 2]
    assert applied_to(transformer).grid.frames_apart


def test_sparse_layers_are_dense_ones_with_the_blocks_in_their_mask(make, monkeypatch):
    """The oracle attends with a whole mask: kept blocks of the video, and the same frame of the reference."""
    kept, attend = [], adaptive.block_sparse_attention

    def spy(query, key, value, mask, **options):
        kept.append(mask.keep.repeat_interleave(8, -1).repeat_interleave(8, -2))
        return attend(query, key, value, mask, **options)

    monkeypatch.setattr(adaptive, "block_sparse_attention", spy)
    transformer = apply_blade(make(), BladeConfig(sparsity=0.5, asa=DETAILS))
    sparse = run(transformer)
    assert len(kept) == 6 and 0.3 < blade_summary(transformer).layer_density < 0.7
    masks = iter(kept)
    dispatch, dense = transformer_wan_animate_2.dispatch_attention_fn, torch.nn.functional.scaled_dot_product_attention

    def masked(query, key, value, attn_mask=None, **options):
        if key.shape[1] < FRAMES * TOKENS:  # cross-attention
            return dispatch(query, key, value, attn_mask=attn_mask, **options)
        frames = FRAMES if attn_mask is None else FRAMES + 1
        order = applied_order(frames)
        video = next(masks)[..., : frames * TOKENS, : frames * TOKENS][..., order, :][..., order]
        allowed = torch.zeros(1, 2, query.shape[1], key.shape[1], dtype=torch.bool)
        allowed[..., : frames * TOKENS, : frames * TOKENS] = video
        for frame in range(1, frames if attn_mask is not None else 0):
            reference = 128 + (frame - 1) * TOKENS  # packed behind 128 places of the video
            rows = slice(frame * TOKENS, (frame + 1) * TOKENS)
            allowed[:, :, rows, reference : reference + TOKENS] = True
        allowed[..., frames * TOKENS :, 0] = True  # padding, which is cut off
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return dense(query, key, value, attn_mask=allowed).transpose(1, 2)

    def applied_order(frames):
        grid = adaptive.TokenGrid(frames, HEIGHT, WIDTH, frames_apart=True)
        return grid.inverse_order("gilbert")

    monkeypatch.setattr(transformer_wan_animate_2, "dispatch_attention_fn", masked)
    plain = run(make())
    assert next(masks, None) is None
    assert_close(sparse, plain)


def test_removal_is_exact_and_sparsity_changes_the_video(make):
    transformer = make()
    plain = run(transformer)
    sparse = run(apply_blade(transformer, BladeConfig(asa=DETAILS)))
    assert (sparse[1] - plain[1]).abs().max() > 1e-3
    assert all(torch.equal(output, other) for output, other in zip(run(remove_blade(transformer)), plain))


def test_a_segment_that_does_not_fill_the_mask_stays_dense(make, caplog):
    """Diffusers pads it with keys of zeros, which every query attends to."""
    area = [16 * HEIGHT, 16 * (WIDTH + 1)]
    plain = run(make(), area=area)
    transformer = apply_blade(make(), BladeConfig(asa=DETAILS, dense_layers="0-2"))
    assert_close(run(transformer, area=area), plain, rtol=0, atol=0)
    apply_blade(transformer, BladeConfig(asa=DETAILS))
    assert not torch.equal(run(transformer, area=area)[1], plain[1])  # the reference pass was sparse
    assert "do not fill the mask, which is for 3 frames of 64 x 112 pixels" in caplog.text
    assert [layer.dense_calls for layer in blade_summary(transformer).transformers[0].layers] == [1, 1, 1]


def test_gradients_reach_both_videos(make):
    """Through the queries, and the keys of both."""
    transformer = apply_blade(make(), BladeConfig(asa=DETAILS)).train()
    with torch.enable_grad():
        run(transformer)[1].square().sum().backward()
    attention = transformer.blocks[0].self_attn
    assert all(part.weight.grad.abs().max() > 0 for part in (attention.to_q, attention.to_k, attention.to_v))


def test_head_patterns_with_orders_of_their_own_are_refused(make):
    window = HeadPattern(kind="window", windows={"frame": Window(width=1)}, order="token-major")
    table = mixed_table([HeadPattern(kind="full"), window], 3, 2, block_size=8, token_order="gilbert")
    config = BladeConfig(attention="patterns", sparsity=0.5, patterns=table, asa=DETAILS)
    with pytest.raises(ValueError, match="`order` of a head pattern must be the model's token order here"):
        run(apply_blade(make(), config))


def test_fused_projections_give_the_same(make):
    expected, fused = run(apply_blade(make(), BladeConfig(asa=DETAILS))), make()
    fused.fuse_qkv_projections()
    assert_close(run(apply_blade(fused, BladeConfig(asa=DETAILS))), expected)


@pytest.mark.slow
def test_a_character_is_animated_in_two_segments(make_wan_vae):
    """The pass over the driving video counts as of the first step; two passes a step with guidance."""
    torch.manual_seed(0)
    folder = Path(blade.__file__).parent / "assets" / "shapes" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = UMT5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    vision = CLIPVisionConfig(
        hidden_size=1280, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224,
        patch_size=112,
    )  # fmt: skip
    transformer = diffusers.WanAnimate2Transformer3DModel(
        in_dim=12, out_dim=4, dim=32, ffn_dim=24, freq_dim=16, text_dim=8, text_len=16, num_heads=2, num_layers=2
    ).eval()
    pipe = diffusers.modular_pipelines.WanAnimate2Blocks().init_pipeline()
    assert type(pipe).__name__ == "WanAnimate2ModularPipeline"
    pipe.update_components(
        text_encoder=UMT5EncoderModel(text).eval(), tokenizer=tokenizer, image_encoder=CLIPVisionModel(vision).eval(),
        vae=make_wan_vae(), transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    apply_blade(pipe, BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=16)), dense_steps=1)
    pixels = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)
    frames = [Image.fromarray(frame) for frame in pixels]
    video = pipe(
        prompt="a cat", image=frames[0], driving_video=frames, num_inference_steps=3, height=128, width=128,
        segment_frame_length=9, max_sequence_length=16, output_type="pt", output="videos",
    )[0]  # fmt: skip
    assert video.shape == (17, 3, 128, 128) and video.isfinite().all()
    layers = blade_summary(pipe).transformers[0].layers
    assert [(layer.dense_calls, layer.sparse_calls) for layer in layers] == [(6, 8)] * 2
