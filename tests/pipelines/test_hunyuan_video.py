"""HunyuanVideo under BLADE: text that ends early, a first frame apart, and the preset."""

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel

from blade import BladeConfig, apply_blade, blade_summary
from blade.attention.applied import applied_to
from blade.attention.config import AdaptiveConfig

DETAILS = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4)


def run(transformer, inputs):
    with torch.no_grad():
        return transformer(**inputs).sample


@pytest.mark.parametrize("selector", ["sampled", "mean-pooled"])
@pytest.mark.parametrize("pooled", ["none", "all", "dropped"])
def test_what_stands_in_the_padding_changes_nothing(make_hunyuan_video, hunyuan_video_inputs, selector, pooled):
    details = AdaptiveConfig(block_size=8, probe_tokens=4, pooled_window=4, selector=selector)
    config = BladeConfig(sparsity=0.4, pooled_tokens=pooled, asa=details)
    transformer, inputs = apply_blade(make_hunyuan_video(), config), hunyuan_video_inputs(batch=2)
    expected = run(transformer, inputs)
    inputs["encoder_hidden_states"][0, 4:] = 1e3
    torch.testing.assert_close(run(transformer, inputs), expected)
    inputs["encoder_hidden_states"][0, 3] += 1.0
    assert (run(transformer, inputs) - expected).abs().max() > 1e-3


def test_a_first_frame_that_is_treated_apart_stays_in_front(make_hunyuan_video, hunyuan_video_inputs):
    for condition, apart in ((None, False), ("latent_concat", False), ("token_replace", True)):
        transformer = apply_blade(make_hunyuan_video(condition), BladeConfig(asa=DETAILS))
        run(transformer, hunyuan_video_inputs())
        grid = applied_to(transformer).grid
        first = set(grid.order("gilbert")[:35].tolist())
        assert (first == set(range(35))) == apart
        assert (grid.video_tokens, grid.text_before, grid.text_after) == (105, 0, 6)


def test_blocks_of_two_streams_come_before_those_of_one(make_hunyuan_video, hunyuan_video_inputs):
    transformer = apply_blade(make_hunyuan_video(), BladeConfig(dense_layers=[0], asa=DETAILS))
    run(transformer, hunyuan_video_inputs())
    layers = blade_summary(transformer).transformers[0].layers
    assert [layer.sparse_calls for layer in layers] == [0, 1, 1]
    assert not hasattr(transformer.context_embedder.token_refiner.refiner_blocks[0].attn.processor, "layer")


def test_the_preset_is_found():
    with torch.device("meta"):
        transformer = HunyuanVideoTransformer3DModel(num_layers=1, num_single_layers=1, num_refiner_layers=1)
    apply_blade(transformer)
    assert applied_to(transformer).config == BladeConfig.from_preset("hunyuan-video")
