"""Videos made by pipelines of every family, from request to summary."""

import pytest
import torch

from blade import BladeConfig
from blade.config import AdaptiveConfig
from blade.generation import generate
from blade.generation_request import GenerationRequest

CONFIG = BladeConfig(sparsity=0.5, dense_steps=1, asa=AdaptiveConfig(block_size=32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["WanPipeline", "CogVideoXPipeline", "HunyuanVideoPipeline"])
def test_a_video_is_made_and_summed_up(small_pipelines, name):
    torch.manual_seed(0)
    pipe = small_pipelines[name]()
    request = GenerationRequest(
        prompt="a cat", steps=3, height=128, width=128, frames=13, guidance_scale=3.0, seed=0, blade_config=CONFIG
    )
    made = generate(pipe, request)
    assert made.video.shape[1:] == (3, 128, 128) and made.video.isfinite().all()
    assert min(made.seconds_text, made.seconds_denoising, made.seconds_decoding) >= 0
    layers = made.summary.transformers[0].layers
    passes = 6 if name == "WanPipeline" else 3  # guidance in two calls, in a batch, or within the model
    assert all((layer.dense_calls, layer.sparse_calls) == (passes // 3, 2 * passes // 3) for layer in layers)
