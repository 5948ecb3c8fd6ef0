"""SkyReels-V2 under BLADE: frames with timesteps of their own stay apart, and causal passes stay dense."""

from dataclasses import replace

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel

from blade import BladeConfig, apply_blade, blade_summary
from blade.attention.applied import applied_to
from blade.attention.budget import BlockBudget
from blade.attention.config import AdaptiveConfig
from blade.generation.request import GenerationRequest
from blade.models.loaded import LoadedModel

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.fixture
def make(make_like_wan):
    """Return a function that makes a tiny transformer."""
    return lambda **config: make_like_wan(SkyReelsV2Transformer3DModel, **config)


def test_timesteps_of_frames_follow_their_tokens(make, forcing_inputs, monkeypatch):
    monkeypatch.setattr(BlockBudget, "is_full", False)
    inputs = {**forcing_inputs((4, 3, 5)), "fps": [0]}
    plain = run(make(inject_sample_info=True), inputs)
    transformer = apply_blade(make(inject_sample_info=True), BladeConfig(sparsity=0.0, asa=DETAILS))
    torch.testing.assert_close(run(transformer, inputs), plain, rtol=1e-4, atol=1e-5)
    assert applied_to(transformer).grid.frames_apart
    assert [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers] == [1, 1, 1]
    other = {**inputs, "timestep": inputs["timestep"].flip(1)}
    assert (run(transformer, other) - plain).abs().max() > 1e-3


def test_without_diffusion_forcing_the_order_runs_across_frames(make, wan_inputs):
    transformer = apply_blade(make(), BladeConfig(asa=DETAILS))
    run(transformer, wan_inputs())
    assert not applied_to(transformer).grid.frames_apart


def test_causal_attention_stays_dense_and_exact(make, forcing_inputs, caplog):
    """The mask is set by the pipeline's call, after `apply_blade`."""
    inputs, plain = forcing_inputs((4, 3, 5)), make()
    plain._set_ar_attention(2)
    expected = run(plain, inputs)
    transformer = apply_blade(make(), BladeConfig(asa=DETAILS))
    assert not torch.equal(run(transformer, inputs), expected)
    transformer._set_ar_attention(2)
    assert torch.equal(run(transformer, inputs), expected)
    assert "attention is causal in blocks of 2 frames (`causal_block_size`)" in caplog.text
    assert [layer.dense_calls for layer in blade_summary(transformer).transformers[0].layers] == [1, 1, 1]
    transformer._set_ar_attention(1)
    run(transformer, inputs)
    assert [layer.sparse_calls for layer in blade_summary(transformer).transformers[0].layers] == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("ar_step", "size", "calls"), [(0, None, (2, 4)), (2, 1, (14, 4)), (2, 2, (10, 0))])
def test_a_video_is_made_in_step_and_frame_after_frame(small_pipelines, ar_step, size, calls):
    """Frame after frame, the noisiest one decides, which has not begun for long; with a mask all stays dense."""
    torch.manual_seed(0)
    pipe = small_pipelines["SkyReelsV2DiffusionForcingPipeline"]()
    config = BladeConfig(sparsity=0.5, asa=AdaptiveConfig(block_size=16))
    apply_blade(pipe, config, dense_steps=1)
    options = {"ar_step": ar_step, "causal_block_size": size, "guidance_scale": 2.0, "output_type": "pt"}
    video = pipe("a cat", **options).frames[0]
    assert video.shape == (13, 3, 128, 128) and video.isfinite().all()
    layers = blade_summary(pipe).transformers[0].layers
    assert [(layer.dense_calls, layer.sparse_calls) for layer in layers] == [calls] * 2


def test_a_video_to_continue_is_refused_and_an_image_taken(small_pipelines):
    """Of the command line; the pipeline from an image has the weights of the one from text."""
    pipe = small_pipelines["SkyReelsV2DiffusionForcingPipeline"]()
    family = LoadedModel(pipe).family
    request = GenerationRequest(prompt="a cat", video="cat.mp4", fps=16)
    with pytest.raises(ValueError, match="`video` must not be given: SkyReels-V2 continues it"):
        family.call_options(pipe, request)
    assert family.call_options(pipe, replace(request, video=None)) == {"fps": 16}
    assert family.call_options(small_pipelines["SkyReelsV2Pipeline"](), replace(request, video=None)) == {}
    pipe = type("SkyReelsV2DiffusionForcingPipeline", (), {"config": {}})()
    assert family.condition_pipeline(pipe, "image") == "SkyReelsV2DiffusionForcingImageToVideoPipeline"
    assert family.condition_pipeline(pipe, "video") is None
