"""Wan-Animate under BLADE: the motion of every frame reaches its own tokens, and poses follow theirs."""

import numpy as np
import pytest
import torch
from PIL import Image

from blade import BladeConfig, apply_blade, blade_summary
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.models.loading import load_empty_model
from blade.models.source import ModelError

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


def test_the_motion_of_every_frame_reaches_its_own_tokens(wan_animate, monkeypatch):
    """That of the frames in another order gives another video."""
    monkeypatch.setattr(BlockBudget, "is_full", False)
    inputs, config = wan_animate.inputs((4, 3, 5)), BladeConfig(sparsity=0.0, asa=DETAILS)
    inputs["face_pixel_values"] *= 30  # so that the motion matters
    plain = run(wan_animate.make(), inputs)
    torch.testing.assert_close(run(apply_blade(wan_animate.make(), config), inputs), plain, rtol=1e-4, atol=1e-5)
    still = {**inputs, "face_pixel_values": inputs["face_pixel_values"].flip(2)}
    assert (run(wan_animate.make(), still) - plain).abs().max() > 1e-3


def test_an_order_across_frames_is_kept_inside_each_and_the_summary_says_so(wan_animate):
    inputs = wan_animate.inputs((4, 3, 5))
    for order in ("gilbert", "token-major", "raster", "bricks(2,2,2)"):
        details = AdaptiveConfig(block_size=8, probe_tokens=4, token_order=order)
        transformer = apply_blade(wan_animate.make(), BladeConfig(asa=details))
        run(transformer, inputs)
        grid = applied_to(transformer).grid
        assert grid.positions(order)[:, 0].tolist() == [frame for frame in range(4) for _ in range(15)]
        assert "4 x 3 x 5 tokens, ordered inside each frame, in 8 blocks" in str(blade_summary(transformer))


def test_a_motion_of_another_length_leaves_the_pass_dense(wan_animate, caplog):
    inputs = wan_animate.inputs((3, 4, 3))
    inputs["face_pixel_values"] = torch.randn(1, 3, 1, 16, 16)  # two parts of 18 tokens, for three frames of 12
    plain = run(wan_animate.make(), inputs)
    transformer = apply_blade(wan_animate.make(), BladeConfig(asa=DETAILS))
    assert torch.equal(run(transformer, inputs), plain)
    note = "All layers stay dense in this forward pass: the motion of 1 frames of the face has 2 parts"
    assert note in caplog.text and note in str(blade_summary(transformer))
    strict = apply_blade(wan_animate.make(), BladeConfig(asa=DETAILS, strict=True))
    with pytest.raises(ValueError, match="the latent 3 frames"):
        run(strict, inputs)


def frames(count, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["animate", "replace"])
def test_a_character_is_animated_in_two_segments(small_pipelines, mode):
    torch.manual_seed(0)
    pipe = small_pipelines["WanAnimatePipeline"]()
    config = BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=16))
    apply_blade(pipe, config, dense_steps=1)
    videos = {"pose_video": frames(20, 128, 0), "face_video": frames(20, 16, 1)}
    if mode == "replace":
        videos |= {"background_video": frames(20, 128, 2), "mask_video": frames(20, 128, 3)}
    made = pipe(image=frames(1, 128, 4)[0], prompt="a cat", mode=mode, guidance_scale=2.0, output_type="pt", **videos)
    assert made.frames[0].shape == (20, 3, 128, 128) and made.frames[0].isfinite().all()
    layers = blade_summary(pipe).transformers[0].layers
    assert [(layer.dense_calls, layer.sparse_calls) for layer in layers] == [(4, 8)] * 2  # two passes a step
    assert all(0.3 < layer.density < 0.6 for layer in layers)


def test_the_command_line_says_what_the_pipeline_needs(configurations):
    with pytest.raises(ModelError, match=r"WanAnimatePipeline, which needs `pose_video` and `face_video`: .* Python"):
        load_empty_model(configurations("WanAnimatePipeline"))
